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
        probability, np.ones_like(probability), GEOMETRY, MaskSettings(0.5)
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
    found = predict.mask_on_study_grid(probability, lungs, GEOMETRY, MaskSettings(0.5))
    assert not found.mask[10].any()
    assert not found.mask[~found.lungs].any()
    assert found.mask[4, 12, 20]


def test_a_lesion_keeps_its_faint_slices_and_what_is_faint_throughout_is_dropped():
    probability = np.zeros((6, 16, 16), np.float32)
    probability[0:3, 2:6, 2:6] = 0.4  # three slices of one lesion,
    probability[2, 3, 3] = 0.9  # sure in the last
    probability[4:6, 10:14, 10:14] = 0.6
    probability[2, 6, 6] = 0.4  # touches the lesion by an edge only
    expected = probability.copy()
    expected[4:6, 10:14, 10:14] = expected[2, 6, 6] = 0
    found = predict.drop_unsure_lesions(probability, MaskSettings(0.3, 0.8))
    np.testing.assert_array_equal(found, expected)
    one_cut = predict.drop_unsure_lesions(probability, MaskSettings(0.3))
    np.testing.assert_array_equal(one_cut, probability)


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
    # A lesion of 16 voxels at 0.5, 0.9 in one of them; 8 voxels of 0.3 lie apart from it.
    mask = np.zeros((1, 8, 8), bool)
    mask[0, 2:6, 2:6] = True
    image = np.where(mask, 0.5, 0.0)
    image[0, 3, 3] = 0.9
    image[0, 0] = 0.3
    return PaintedScan(image, np.ones_like(image), mask, voxel_ml=1.0)


@pytest.mark.parametrize(
    ('seed_thresholds', 'max_healthy_ml', 'expected_cuts', 'expected_ml'),
    [
        ((), 20.0, (0.4, 0.4), 4.0),
        ((), 1.0, (0.7, 0.7), 0.0),  # finds one voxel of the lesion
        ((0.5, 0.8), 20.0, (0.2, 0.5), 4.0),
        ((0.5, 0.8), 1.0, (0.2, 0.8), 0.0),  # finds all of it
    ],
)
def test_calibrate_mask_takes_the_best_cuts_that_spare_healthy_lungs(
    seed_thresholds, max_healthy_ml, expected_cuts, expected_ml
):
    settings, healthy_ml = predict.calibrate_mask(
        lambda image, lungs: image,
        [painted_scan()],
        [HealthyCase(), HealthyCase()],
        max_healthy_ml=max_healthy_ml,
        min_component_ml=0.0,
        thresholds=(0.2, 0.4, 0.7),
        seed_thresholds=seed_thresholds,
    )
    assert settings == MaskSettings(*expected_cuts, min_component_ml=0.0)
    assert healthy_ml == expected_ml


def test_calibrate_mask_without_cuts_that_spare_healthy_lungs_takes_the_highest():
    class Marked(HealthyCase):
        def image(self):
            return np.ones((1, 8, 8))

        lungs = image

    settings, healthy_ml = predict.calibrate_mask(
        lambda image, lungs: image,
        [painted_scan()],
        [Marked()],
        max_healthy_ml=10.0,
        min_component_ml=0.0,
    )
    assert (settings.threshold, settings.seed_threshold, healthy_ml) == (0.9, 0.9, 64.0)
