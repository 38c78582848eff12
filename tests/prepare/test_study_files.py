"""Pictures whose values stand for other HU than they say."""

import numpy as np
import pytest

from covseg_jax.imaging.studies import find_inputs
from covseg_jax.phantom.studies import make_phantom
from covseg_jax.prepare import study_files
from tests.imaging.chest import write_stored

MUSCLE_HU = study_files.MUSCLE_HU


@pytest.fixture(scope='module')
def chest_hu():
    return make_phantom((3, 0), 'CT-2', (128, 128, 16), (3.0, 3.0, 8.0)).image.astype(float)


def _picture(hu, end_hu, factor):
    """A crop whose window ends at `end_hu`, all of it that much nearer to -1000, in steps of 4 HU,
    and 40 HU around it."""
    picture = np.rint(((np.clip(hu, -1000, end_hu) + 1000) * factor - 1000) / 4) * 4
    return np.pad(picture[:, 25:-25, 25:-25], ((0, 0), (25, 25), (25, 25)), constant_values=40)


def test_soft_tissue_of_a_picture_is_brought_back(chest_hu, tmp_path):
    picture = _picture(chest_hu, 250, 0.84)
    assert picture.max() == 48
    # The files' axes run to Left, Anterior and Superior.
    stored = picture.transpose(2, 1, 0)[:, ::-1].astype(np.int16)
    write_stored(tmp_path / 'a.nii.gz', stored, np.diag([-3.0, 3.0, 8.0, 1.0]))
    volume = study_files.read_image(find_inputs(tmp_path / 'a.nii.gz')[0])
    assert 'nothing is denser than 48 HU, and soft tissue lies at -1' in volume.notes[-1]
    inside = (slice(None), slice(25, -25), slice(25, -25))
    shown = np.clip(chest_hu, -1000, 250)[inside]
    assert np.abs(volume.array[inside] - shown).mean() < 20
    assert np.abs(picture[inside] - shown).mean() > 60


@pytest.mark.parametrize(
    ('end_hu', 'factor'),
    [
        (2000, 1.0),  # a scan
        (2000, 0.9),  # it has bone, so nobody cut it, and what is wrong is not known
        (50, 1.0),  # soft tissue is at the window's end itself
        (90, 1.0),  # it lies where it belongs
        (20, 0.95),  # it is cut off
    ],
)
def test_other_scans_and_pictures_stay(chest_hu, end_hu, factor):
    picture = _picture(chest_hu, end_hu, factor)
    assert study_files.find_soft_tissue(picture) is None


def test_fat_is_not_taken_for_displaced_muscle():
    rng = np.random.default_rng(0)
    means = rng.choice([-1000, -850, -100, 45], (8, 64, 64), p=[0.2, 0.2, 0.4, 0.2])
    scan = np.minimum(means + rng.normal(0, 12, means.shape), 90)
    assert study_files.find_soft_tissue(scan) is None
    all_fat = np.where(means == 45, -850, scan)
    assert study_files.find_soft_tissue(all_fat) == pytest.approx(-100, abs=8)
