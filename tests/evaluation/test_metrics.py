import dataclasses
import math

import numpy as np
import pytest
from scipy import ndimage

from covseg_jax.evaluation import metrics

SPACING_MM = (5.0, 1.5, 0.7)


def box_mask(shape, *bounds):
    mask = np.zeros(shape, bool)
    mask[tuple(slice(*bound) for bound in bounds)] = True
    return mask


def brute_force_distances(truth, prediction, spacing_mm):
    """The same definition from scipy: erosion, and distance transforms over the whole array."""
    surfaces = [mask & ~ndimage.binary_erosion(mask) for mask in (truth, prediction)]
    fields = [ndimage.distance_transform_edt(~surface, sampling=spacing_mm) for surface in surfaces]
    return fields[1][surfaces[0]], fields[0][surfaces[1]]


def test_overlap_metrics_equal_hand_counts():
    truth = np.array([1, 1, 1, 0, 0, 0, 0, 0], bool)
    prediction = np.array([0, 1, 1, 1, 1, 0, 0, 0], bool)
    # TP 2 (places 1, 2), FP 2 (3, 4), FN 1 (0), TN 3 (5, 6, 7).
    counts = metrics.count_confusion(truth, prediction)
    assert counts == metrics.Confusion(2, 2, 1, 3)
    assert counts.dice == pytest.approx(4 / 7)
    assert counts.iou == pytest.approx(2 / 5)
    assert counts.sensitivity == pytest.approx(2 / 3)
    assert counts.precision == pytest.approx(1 / 2)
    assert counts.specificity == pytest.approx(3 / 5)
    # Within the first five places the negatives are 3 and 4, both predicted.
    assert metrics.count_confusion(truth, prediction, np.arange(8) < 5).specificity == 0


def test_confusion_of_slices_adds_up_to_that_of_the_volume():
    truth, prediction, lungs = np.random.default_rng(0).random((3, 6, 9, 7)) < 0.4
    slices = [
        metrics.count_confusion(*arrays) for arrays in zip(truth, prediction, lungs, strict=True)
    ]
    total = np.sum([dataclasses.astuple(each) for each in slices], axis=0)
    assert tuple(total) == dataclasses.astuple(metrics.count_confusion(truth, prediction, lungs))
    assert total.sum() == lungs.sum()


NAN = math.nan


@pytest.mark.parametrize(
    ('truth_empty', 'prediction_empty', 'expected'),
    [
        # dice, iou, sensitivity, precision, specificity, hd95, nsd
        (True, True, (NAN, NAN, NAN, NAN, 1.0, NAN, NAN)),
        (True, False, (0.0, 0.0, NAN, 0.0, 26 / 27, NAN, 0.0)),
        (False, True, (0.0, 0.0, 0.0, NAN, 1.0, NAN, 0.0)),
    ],
)
def test_empty_masks_follow_the_empty_rule(truth_empty, prediction_empty, expected):
    empty, voxel = np.zeros((3, 3, 3), bool), box_mask((3, 3, 3), (1, 2), (1, 2), (1, 2))
    masks = (empty if truth_empty else voxel, empty if prediction_empty else voxel)
    counts, distances = (
        metrics.count_confusion(*masks),
        metrics.surface_distances(*masks, SPACING_MM),
    )
    found = (
        *(counts.dice, counts.iou, counts.sensitivity, counts.precision, counts.specificity),
        *(distances.hd95_mm, distances.nsd(2.0)),
    )
    assert found == pytest.approx(expected, nan_ok=True)


def test_full_truth_leaves_specificity_undefined():
    full = np.ones((2, 2, 2), bool)
    assert math.isnan(metrics.count_confusion(full, full).specificity)
    assert metrics.count_confusion(full, full).dice == 1
    assert metrics.surface_distances(full, full, SPACING_MM).hd95_mm == 0


def test_surfaces_of_parallel_plates_lie_two_slices_apart():
    # Each voxel of a plate has its nearest straight above or below: 2 slices of 5 mm.
    truth, prediction = (box_mask((6, 7, 8), (z, z + 1), (1, 6), (1, 6)) for z in (1, 3))
    distances = metrics.surface_distances(truth, prediction, SPACING_MM)
    assert distances.hd95_mm == pytest.approx(10)
    assert [distances.nsd(tolerance_mm) for tolerance_mm in (2, 9.99, 10)] == [0, 0, 1]


def test_cube_shifted_by_one_column_has_the_hand_counted_surface_dice():
    # A 4³ cube has 4³ - 2³ = 56 surface voxels. Shifted by one column (0.7 mm), the two surfaces
    # share the 12-voxel rings of their 3 common columns; the other 20 voxels are 0.7 mm away.
    truth = box_mask((9, 9, 9), (2, 6), (2, 6), (2, 6))
    prediction = box_mask((9, 9, 9), (2, 6), (2, 6), (3, 7))
    distances = metrics.surface_distances(truth, prediction, SPACING_MM)
    for found in (distances.from_truth_mm, distances.from_prediction_mm):
        np.testing.assert_allclose(np.sort(found), [0] * 36 + [0.7] * 20, rtol=1e-6)
    assert distances.hd95_mm == pytest.approx(0.7)
    assert distances.nsd(0.5) == pytest.approx(36 / 56)
    assert distances.nsd(2.0) == 1


def test_hd95_takes_the_worse_direction():
    # A plate of 100 voxels, and the same with a far voxel: from the truth all distances are 0; from
    # the prediction 1 of 101, which the 95th percentile leaves out; with 10 far voxels it does not.
    truth = box_mask((1, 10, 40), (0, 1), (0, 10), (0, 10))
    one_far, ten_far = truth.copy(), truth.copy()
    one_far[0, 0, 30] = True
    ten_far[0, :, 30] = True
    assert metrics.surface_distances(truth, one_far, (1, 1, 1)).hd95_mm == 0
    assert metrics.surface_distances(truth, ten_far, (1, 1, 1)).hd95_mm == 21
    assert metrics.surface_distances(ten_far, truth, (1, 1, 1)).hd95_mm == 21


def test_distance_equal_to_the_tolerance_counts_whatever_the_rounding():
    # 3 × 0.8 mm is 2.4 mm, which in float32 is above 2.4.
    truth = box_mask((1, 1, 9), (0, 1), (0, 1), (2, 3))
    prediction = np.roll(truth, 3, axis=2)
    assert metrics.surface_distances(truth, prediction, (1, 1, 0.8)).nsd(2.4) == 1


def random_mask_pairs():
    rng = np.random.default_rng(7)
    for index in range(120):
        shape = tuple(int(n) for n in rng.integers(1, 14, size=3))
        smooth = ndimage.gaussian_filter(rng.standard_normal((2, *shape)), (0, 1, 1, 1))
        truth, prediction = smooth > rng.uniform(-0.1, 0.2)
        if index % 10 == 0:
            truth = np.ones(shape, bool)
        if index % 10 == 1:
            prediction = np.zeros(shape, bool)
            prediction.flat[rng.integers(prediction.size)] = True
        if truth.any() and prediction.any():
            yield truth, prediction, tuple(rng.uniform(0.4, 8.0, size=3))


def test_surface_metrics_equal_brute_force_on_random_masks():
    pairs = list(random_mask_pairs())
    assert len(pairs) > 80
    for truth, prediction, spacing_mm in pairs:
        there, back = brute_force_distances(truth, prediction, spacing_mm)
        hd95 = max(np.percentile(there, 95), np.percentile(back, 95))
        found = metrics.surface_distances(truth, prediction, spacing_mm)
        assert found.hd95_mm == pytest.approx(hd95, abs=1e-4)
        near = (there <= 2).sum() + (back <= 2).sum()
        expected = near / (there.size + back.size)
        assert found.nsd(2.0) == pytest.approx(expected, abs=1e-9)


def test_surface_metrics_do_not_see_empty_surroundings():
    for truth, prediction, spacing_mm in list(random_mask_pairs())[:20]:
        padded = [np.pad(mask, ((3, 1), (0, 5), (2, 2))) for mask in (truth, prediction)]
        found = metrics.surface_distances(*padded, spacing_mm)
        expected = metrics.surface_distances(truth, prediction, spacing_mm)
        assert (found.hd95_mm, found.nsd(2.0)) == (expected.hd95_mm, expected.nsd(2.0))


def test_wrong_arguments_are_refused():
    mask = np.zeros((2, 3, 4), bool)
    with pytest.raises(TypeError, match='float64'):
        metrics.count_confusion(mask, mask.astype(float))
    with pytest.raises(ValueError, match='shapes'):
        metrics.count_confusion(mask, mask[:1])  # would broadcast
    for spacing_mm in [(1, 1), (1, 0, 1), (1, math.nan, 1)]:
        with pytest.raises(ValueError, match='spacing_mm'):
            metrics.surface_distances(mask, mask, spacing_mm)


def test_bootstrap_is_repeatable_and_leaves_out_the_undefined():
    values = np.random.default_rng(0).normal(size=30)
    interval = metrics.bootstrap_interval(values, seed=3)
    assert interval == metrics.bootstrap_interval([*values, math.nan], seed=3)
    assert interval != metrics.bootstrap_interval(values, seed=4)
    # A large sample's interval is the normal one: mean ± 1.96 s/√n.
    half = 1.96 * values.std() / math.sqrt(values.size)
    assert interval == pytest.approx((values.mean() - half, values.mean() + half), abs=0.2 * half)


def test_bootstrap_interval_covers_the_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    intervals = [metrics.bootstrap_interval(rng.normal(size=40), num=400) for _ in range(400)]
    covered = np.mean([low <= 0 <= high for low, high in intervals])
    # The percentile interval at n = 40 covers about 94 %; four standard errors of 400 trials: 5 %.
    assert 0.89 <= covered <= 0.99


def test_bootstrap_draws_whole_subjects():
    # All slices of one subject are 0, all of the other's are 1: a draw of two subjects has mean 0,
    # 0.5 or 1. Treated as 200 separate values, the interval would be 0.5 ± 0.07.
    values, subjects = [0.0] * 100 + [1.0] * 100, ['a'] * 100 + ['b'] * 100
    assert metrics.bootstrap_interval(values, subjects=subjects) == (0, 1)
    low, high = metrics.bootstrap_interval(values)
    assert 0.4 < low < high < 0.6


def test_bootstrap_of_one_subject_is_undefined():
    assert all(map(math.isnan, metrics.bootstrap_interval([0.5, 0.7], subjects=['a', 'a'])))
    assert all(map(math.isnan, metrics.bootstrap_interval([])))


def test_bootstrap_of_runs_is_over_subjects_of_one_run_and_over_both_of_several():
    rng = np.random.default_rng(2)
    one = rng.normal(size=(1, 50))
    assert metrics.bootstrap_runs(np.append(one, [[math.nan]], axis=1)) == pytest.approx(
        metrics.bootstrap_interval(one[0]), abs=0.03
    )
    # Runs 0 and 1 apart, subjects all alike: of two draws both are the first in every fourth.
    apart = np.repeat([[0.0], [1.0]], 50, axis=1)
    assert metrics.bootstrap_runs(apart) == (0, 1)
    # What all share is no difference, however far subjects lie from each other.
    assert metrics.bootstrap_runs(one + 0.25, one) == pytest.approx((0.25, 0.25))
    low, high = metrics.bootstrap_runs(rng.normal(size=(1, 50)) + 0.25, one)
    assert low < 0.25 - 0.2 < 0.25 + 0.2 < high
    assert all(map(math.isnan, metrics.bootstrap_runs(one[:, :1])))
    with pytest.raises(ValueError, match='50 and of 49 subjects'):
        metrics.bootstrap_runs(one, one[:, 1:])
