"""From a difference to a pseudo-mask: numbers by hand."""

import json

import numpy as np
import pytest

from covseg_jax.errors import InputError
from covseg_jax.gan import synthesize
from covseg_jax.imaging.geometry import Geometry
from covseg_jax.prepare.cases import find_cases
from tests.conftest import write_case
from tests.settings import pseudo_mask_settings

PLAIN = pseudo_mask_settings(smoothing_mm=0, erosion_mm=0, percentile=99)


def test_soft_mask_is_one_half_at_the_threshold():
    score = np.array([[[0.0, 0.05, 0.1, 0.15, 0.2, 0.9]]])
    soft = synthesize.soft_mask(score, 0.1, 1.0, PLAIN)
    np.testing.assert_allclose(soft[0, 0], [0, 0.25, 0.5, 0.75, 1, 1], atol=1e-3)


def test_soft_mask_drops_components_under_the_least_volume():
    score = np.zeros((4, 10, 10))
    score[1, 1:3, 1:3] = 1  # 4 voxels of 0.02 ml: 0.08 ml, under 0.1
    score[1:3, 5:9, 5:9] = 1  # 32 voxels: 0.64 ml
    binary = synthesize.soft_mask(score, 0.1, 0.02, PLAIN) >= 0.5
    assert binary.sum() == 32
    assert not binary[1, 1, 1]


def test_soft_mask_rounds_nothing_up_to_a_lesion():
    # float16 has steps of about 2.4e-4 here: 0.49999 would become 0.5.
    soft = synthesize.soft_mask(np.array([[[0.099998]]]), 0.1, 1.0, PLAIN)
    assert soft[0, 0, 0] < 0.5


def test_score_difference_counts_only_brighter_voxels_inside_the_eroded_lungs():
    lungs = np.zeros((1, 11, 11), np.uint8)
    lungs[0, 1:10, 1:10] = 1
    healthy = np.full(lungs.shape, 0.2)
    image = healthy + 0.1
    image[0, 5, 5] = 0.0
    settings = pseudo_mask_settings(smoothing_mm=0, erosion_mm=2.0)
    score = synthesize.score_difference(image, healthy, lungs, (1.0, 1.0, 1.0), settings)
    # Voxels more than 2 mm inside: the 5 × 5 about the centre; the centre is darker, so 0.
    assert (score > 0).sum() == 24
    assert score.max() == pytest.approx(0.1, abs=1e-6)
    assert score[0, 5, 5] == 0


def test_score_difference_published_is_signed_and_scaled_by_each_volumes_extremes():
    image = np.array([[[0.0, 0.2, 0.4]]], np.float16)
    healthy = np.array([[[0.1, 0.6, 0.35]]], np.float32)
    score = synthesize.score_difference(
        image,
        healthy,
        np.zeros((1, 1, 3)),  # lungs make no difference
        (1.0, 1.0, 1.0),
        pseudo_mask_settings(difference='published'),
    )
    np.testing.assert_allclose(score, [[[0.0, -0.5, 0.5]]], atol=1e-3)
    with pytest.raises(InputError, match='difference'):
        pseudo_mask_settings(difference='signed')


@pytest.fixture
def cases(tmp_path):
    geometry = Geometry((32, 32, 16), tuple(map(tuple, np.eye(4) * 2.0)),
                        ((0, 16), (0, 32), (0, 32)), (16, 32, 32))  # fmt: skip
    for study_id, category in (('h1', 'CT-0'), ('h2', 'CT-0'), ('c1', 'CT-1')):
        write_case(tmp_path, study_id, category)
        description = json.loads((tmp_path / study_id / 'geometry.json').read_text())
        description['geometry'] = geometry.to_json()
        (tmp_path / study_id / 'geometry.json').write_text(json.dumps(description))
    return {case.study_id: case for case in find_cases(tmp_path)}


def heal(scan, study_id):
    """Takes out 0.01 everywhere, and 0.2 from a block of the COVID scan."""
    healthy = scan - 0.01 * np.random.default_rng(0).uniform(0, 1, scan.shape)
    if study_id == 'c1':
        healthy[4:8, 8:16, 8:16] -= 0.2
    return healthy


def test_synthesize_marks_the_difference_that_healthy_scans_do_not_have(cases, tmp_path):
    folder = tmp_path / 'masks'
    summary = synthesize.synthesize(heal, [cases['h1'], cases['h2']], [cases['c1']], folder, PLAIN)
    mask = synthesize.read_pseudo_mask(folder, 'c1')
    assert mask.dtype == np.float16
    binary = np.asarray(mask) >= 0.5
    assert binary[4:8, 8:16, 8:16].all()
    # One voxel in a hundred is above the threshold by its definition: few touch the block, and the
    # others are too small to be kept.
    assert binary.sum() <= 1.05 * 4 * 8 * 8
    # float16 images blur the 99th percentile of U(0, 0.01) a little.
    assert summary['threshold'] == pytest.approx(0.0099, rel=0.05)
    assert summary == json.loads((folder / 'summary.json').read_text())


def test_synthesize_published_keeps_the_raw_signed_difference(cases, tmp_path):
    settings = pseudo_mask_settings(difference='published', share_of_max=0.2, min_component_ml=0.0)

    def heal_half(scan, study_id):
        """0.5 in one voxel of the box, 0.25 in another, 0 elsewhere: extremes 0 and 0.5."""
        healthy = np.zeros_like(scan)
        healthy[8, 16, 16], healthy[8, 16, 17] = 0.5, 0.25
        return healthy

    summary = synthesize.synthesize(
        heal_half, [cases['h1']], [cases['c1']], tmp_path / 'masks', settings
    )
    mask = synthesize.read_pseudo_mask(tmp_path / 'masks', 'c1')
    image = np.asarray(cases['c1'].image(), np.float32)
    expected = image / image.max()  # its least value is 0
    expected[8, 16, 16] -= 1
    expected[8, 16, 17] -= 0.5
    assert mask.dtype == np.float16
    np.testing.assert_allclose(mask, expected, atol=1e-3)
    assert mask.min() < -0.1
    assert (summary['threshold'], summary['share_of_max']) == (None, 0.2)
    lungs = np.asarray(cases['c1'].lungs()) > 0
    marked = np.asarray(mask, np.float32) > 0.2 * float(mask.max())
    assert summary['infection_percent']['c1'] == pytest.approx(
        100 * (marked & lungs).sum() / lungs.sum()
    )


def test_synthesize_refuses_a_generator_that_changes_nothing(cases, tmp_path):
    with pytest.raises(InputError, match='changes nothing'):
        synthesize.synthesize(lambda scan, _: scan, [cases['h1']], [], tmp_path / 'm', PLAIN)
    assert not (tmp_path / 'm').exists()


def test_read_pseudo_mask_names_what_is_missing(tmp_path):
    with pytest.raises(InputError, match=r'c9\.npy'):
        synthesize.read_pseudo_mask(tmp_path, 'c9')
