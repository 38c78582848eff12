"""From probability to mask on the study's own grid."""

import numpy as np
import pytest

from covseg_jax.imaging.geometry import Geometry
from covseg_jax.inference import predict
from covseg_jax.inference.predict import MaskSettings

# A study of 16 slices of 64 × 64 whose box is the model's grid, two study voxels to one in plane.
GEOMETRY = Geometry((64, 64, 16), ((-1.0, 0, 0, 0), (0, -1.0, 0, 0), (0, 0, 5.0, 0), (0, 0, 0, 1)),
                    ((0, 16), (0, 64), (0, 64)), (16, 32, 32))  # fmt: skip


def test_mask_on_study_grid_brings_a_block_back():
    probability = np.zeros((16, 32, 32), np.float32)
    probability[4:8, 10:20, 10:20] = 1.0
    found = predict.mask_on_study_grid(
        probability, np.ones_like(probability), GEOMETRY, MaskSettings(0.5, 0.1)
    )
    expected = np.zeros((16, 64, 64), bool)
    expected[4:8, 20:40, 20:40] = True
    overlap = 2 * (found.mask & expected).sum() / (found.mask.sum() + expected.sum())
    assert overlap > 0.97
    assert found.lungs.all()


def test_mask_on_study_grid_keeps_to_the_lungs_and_drops_specks():
    probability = np.zeros((16, 32, 32), np.float32)
    probability[2:6, 4:12, 4:12] = 0.9  # 4 · 16 · 16 voxels of 0.005 ml: 5 ml
    probability[10, 20, 20] = 0.9  # about 4 voxels: 0.02 ml
    lungs = np.ones_like(probability)
    lungs[:, :, :8] = 0
    found = predict.mask_on_study_grid(probability, lungs, GEOMETRY, MaskSettings(0.5, 0.1))
    assert not found.mask[10].any()
    assert not found.mask[~found.lungs].any()
    assert found.mask[4, 12, 20]


def test_calibrate_threshold_finds_the_cut_with_the_best_dice():
    class Case:
        def image(self):
            return target * 0.4 + 0.1  # probability 0.5 in lesions, 0.1 elsewhere

        lungs = image

    target = np.zeros((2, 8, 8))
    target[:, 2:6, 2:6] = 1.0
    cut = predict.calibrate_threshold(lambda image, lungs: image, [Case()], lambda case: target)
    assert 0.1 < cut <= 0.5


@pytest.mark.parametrize('empty', [[], [np.zeros((2, 8, 8))]])
def test_calibrate_threshold_without_lesions_is_one_half(empty):
    class Case:
        def image(self):
            return np.zeros((2, 8, 8))

        lungs = image

    targets = iter(empty)
    cut = predict.calibrate_threshold(
        lambda image, lungs: image, [Case() for _ in empty], lambda case: next(targets)
    )
    assert cut == 0.5
