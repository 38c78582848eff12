"""From probability to mask on the study's own grid."""

import types

import numpy as np
import pytest

from covseg_jax.data.opacities import PaintedScan
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


class HealthyCase:
    """One slice of 1 ml voxels: probability 0.3 in 12 of them, 0.6 in 4, 0.1 in the others."""

    geometry = types.SimpleNamespace(voxel_ml=1.0)

    def image(self):
        found = np.full((1, 8, 8), 0.1)
        found[0, 0] = 0.3
        found[0, 4, :4] = 0.3
        found[0, 7, :4] = 0.6
        return found

    lungs = image


def painted_scan():
    # Best cut by Dice: above 0.2, where 16 false voxels lie, and up to 0.5, where the lesion does.
    mask = np.zeros((1, 8, 8), bool)
    mask[0, 2:6, 2:6] = True
    image = np.where(mask, 0.5, 0.0)
    image[0, :2] = 0.2
    return PaintedScan(image, np.ones_like(image), mask)


@pytest.mark.parametrize(
    ('max_healthy_ml', 'expected_cut', 'expected_ml'),
    [(20.0, 0.25, 16.0), (10.0, 0.35, 4.0), (1.0, 0.65, 0.0)],
)
def test_calibrate_threshold_is_the_best_cut_that_spares_healthy_lungs(
    max_healthy_ml, expected_cut, expected_ml
):
    cut, healthy_ml = predict.calibrate_threshold(
        lambda image, lungs: image,
        [painted_scan()],
        [HealthyCase(), HealthyCase()],
        max_healthy_ml=max_healthy_ml,
        min_component_ml=0.0,
    )
    assert (cut, healthy_ml) == (expected_cut, expected_ml)


def test_calibrate_threshold_without_a_cut_that_spares_healthy_lungs_is_the_highest():
    class Marked(HealthyCase):
        def image(self):
            return np.ones((1, 8, 8))

        lungs = image

    cut, healthy_ml = predict.calibrate_threshold(
        lambda image, lungs: image,
        [painted_scan()],
        [Marked()],
        max_healthy_ml=10.0,
        min_component_ml=0.0,
    )
    assert (cut, healthy_ml) == (0.9, 64.0)
