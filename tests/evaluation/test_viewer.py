import base64
import io

import numpy as np
import pytest
from PIL import Image

from covseg_jax.evaluation.evaluate_cases import draw_views
from covseg_jax.predict import preview
from tests.evaluation.conftest import case_images


def decode(url):
    return Image.open(io.BytesIO(base64.b64decode(url.split(',', 1)[1])))


def slice_of(picture, view, number):
    row, column = divmod(number, view['columns'])
    top, left = row * view['height'], column * view['width']
    return np.asarray(picture)[top : top + view['height'], left : left + view['width']]


def test_views_hold_each_slice_of_the_lungs_in_its_place():
    # Every slice has another density, so that a wrong place shows.
    image_hu = np.full((7, 60, 60), -1000.0, np.float32)
    image_hu += np.arange(7)[:, None, None] * 100
    lungs, truth = np.zeros((2, 7, 60, 60), bool)
    lungs[1:6, 20:40, 25:45] = True
    truth[4, 22:28, 30:38] = True
    case = case_images(
        image_hu=image_hu, lungs=lungs, truth=truth, prediction=~lungs & truth,
        spacing_mm=(5.0, 1.0, 1.0),
    )  # fmt: skip
    view = draw_views(case, 10**6)
    assert view['slices'] == [1, 2, 3, 4, 5]
    assert view['slices'][view['start']] == 4
    # 20 voxels of 1 mm and 10 mm more on each side
    assert (view['width'], view['height'], view['columns']) == (40, 40, 3)
    scan = decode(view['scan']).convert('L')
    low, high = preview.LUNG_WINDOW_HU
    for number, z in enumerate(view['slices']):
        expected = 255 * (-1000 + 100 * z - low) / (high - low)
        assert slice_of(scan, view, number).mean() == pytest.approx(expected, abs=3)
    # 0 outside, 1 inside, 2 on the border; the box begins at row 10, column 15
    codes = slice_of(decode(view['masks']['truth']), view, 3)
    assert (codes > 0).sum() == 48
    assert (codes[12:18, 15:23] > 0).all()
    assert (codes == 1).sum() == 4 * 6
    assert not np.asarray(decode(view['masks']['prediction'])).any()
    assert list(view['masks']) == ['truth', 'prediction']


def test_views_of_fine_scans_are_scaled_down_to_square_pixels():
    shape = (3, 400, 600)
    lungs = np.zeros(shape, bool)
    lungs[1, 50:350, 100:500] = True
    case = case_images(
        image_hu=np.zeros(shape, np.float32), lungs=lungs, truth=lungs, prediction=lungs,
        spacing_mm=(5.0, 0.8, 0.4),
    )  # fmt: skip
    view = draw_views(case, 10**6)
    # (300 + 2·13) rows of 0.8 mm, (400 + 2·25) columns of 0.4 mm
    assert (view['width'], view['height']) == (round(180 / (260.8 / 288)), 288)
    share = (np.asarray(decode(view['masks']['truth'])) > 0).mean()
    assert share == pytest.approx(300 * 400 / (326 * 450), rel=0.01)


def test_views_of_noise_keep_to_their_bytes():
    rng = np.random.default_rng(0)
    image_hu = rng.normal(-700, 150, (41, 256, 256)).astype(np.float32)
    lungs = np.ones(image_hu.shape, bool)
    empty = ~lungs
    case = case_images(image_hu=image_hu, lungs=lungs, truth=empty, prediction=empty)
    view = draw_views(case, 400_000)
    assert len(view['scan']) + sum(map(len, view['masks'].values())) <= 400_000
    assert len(draw_views(case, 3_000_000)['scan']) > 400_000


def test_views_of_a_study_without_lungs_show_all_of_it():
    empty = np.zeros((6, 40, 50), bool)
    view = draw_views(case_images(lungs=empty, truth=empty, prediction=empty), 10**6)
    assert view['slices'] == list(range(6))
