"""From probability to mask on the study's own grid."""

import numpy as np
from scipy import ndimage

from covseg_jax.imaging import masks
from covseg_jax.imaging.geometry import Geometry
from covseg_jax.imaging.masks import MaskSettings

# A study of 16 slices of 64 × 64 whose box is the model's grid, two study voxels to one in plane.
GEOMETRY = Geometry((64, 64, 16), ((-1.0, 0, 0, 0), (0, -1.0, 0, 0), (0, 0, 5.0, 0), (0, 0, 0, 1)),
                    ((0, 16), (0, 64), (0, 64)), (16, 32, 32))  # fmt: skip


def test_mask_on_study_grid_brings_a_block_back():
    probability = np.zeros((16, 32, 32), np.float32)
    probability[4:8, 10:20, 10:20] = 1.0
    found = masks.mask_on_study_grid(
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
    found = masks.mask_on_study_grid(probability, lungs, GEOMETRY, MaskSettings(0.5))
    assert not found.mask[10].any()
    assert not found.mask[~found.lungs].any()
    assert found.mask[4, 12, 20]


def test_a_share_of_the_maximum_marks_what_exceeds_it():
    settings = MaskSettings(0.5, 0.9, 0.0, share_of_max=0.2)
    probability = np.zeros((4, 4, 4), np.float32)
    probability[0, 0, :4] = 0.03, 0.01, 0.02, 0.1  # the share is 0.02, which 0.02 is not above
    found = masks.mask_on_model_grid(probability, 1.0, settings)
    assert np.argwhere(found).tolist() == [[0, 0, 0], [0, 0, 3]]
    # where nothing is above 0 there is no lesion
    for empty in (np.zeros_like(probability), np.full_like(probability, -0.5)):
        assert not masks.mask_on_model_grid(empty, 1.0, settings).any()


def test_a_share_of_the_maximum_is_that_of_the_models_grid():
    probability = np.zeros((16, 32, 32), np.float32)
    probability[4:8, 10:20, 10:20] = 0.1
    probability[10, 4, 4] = 0.16  # a single voxel, blurred to less on the study's grid
    settings = MaskSettings(min_component_ml=0.0, share_of_max=0.5)
    lungs = np.ones_like(probability)
    found = masks.mask_on_study_grid(probability, lungs, GEOMETRY, settings)
    expected = masks.mask_on_study_grid(probability, lungs, GEOMETRY, MaskSettings(0.08, 0, 0))
    np.testing.assert_array_equal(found.mask, expected.mask)
    assert found.mask[5, 30, 30]


def test_a_lesion_keeps_its_faint_slices_and_what_is_faint_throughout_is_dropped():
    probability = np.zeros((6, 16, 16), np.float32)
    probability[0:3, 2:6, 2:6] = 0.4  # three slices of one lesion,
    probability[2, 3, 3] = 0.9  # sure in the last
    probability[4:6, 10:14, 10:14] = 0.6
    probability[2, 6, 6] = 0.4  # touches the lesion by an edge only
    expected = probability.copy()
    expected[4:6, 10:14, 10:14] = expected[2, 6, 6] = 0
    found = masks.drop_unsure_lesions(probability, MaskSettings(0.3, 0.8))
    np.testing.assert_array_equal(found, expected)
    one_cut = masks.drop_unsure_lesions(probability, MaskSettings(0.3))
    np.testing.assert_array_equal(one_cut, probability)


def test_lesions_are_labelled_and_small_ones_dropped_in_masks_of_any_form():
    generator = np.random.default_rng(0)
    # Lines of voxels among them, and sides that are one voxel thin.
    for shape in [(1, 1, 13), (7, 1, 1), (1, 9, 1), (3, 3, 1), (1, 8, 8), (5, 6, 7)] * 40:
        mask = generator.random(shape) < 0.3
        expected, num = ndimage.label(mask, np.ones((3, 3, 3)))
        labels, found = masks.label_lesions(mask)
        assert found == num
        assert len({*zip(labels[mask], expected[mask], strict=True)}) == num
        np.testing.assert_array_equal(labels > 0, mask)
        sizes = np.bincount(expected.ravel())
        large = mask & (sizes >= 2)[expected]
        np.testing.assert_array_equal(masks.drop_small_components(mask, 1.5), large)
