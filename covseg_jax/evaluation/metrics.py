"""Overlap and surface metrics of binary masks. NumPy in, floats out; NaN means "undefined".

The empty rule, once for the whole project:
- truth and prediction both empty: Dice, IoU and NSD are undefined (such cases are counted and
  listed apart, and are in no mean);
- truth empty, prediction not: Dice, IoU, precision and NSD are 0;
- prediction empty, truth not: Dice, IoU, sensitivity and NSD are 0, precision is undefined;
- sensitivity is undefined where truth is empty, specificity where nothing is negative, and HD95
  where either mask is empty.
"""

import dataclasses
import math
from collections.abc import Sequence

import edt
import numpy as np

# edt works in float32: a distance that equals the tolerance must not fall outside by rounding.
_RELATIVE_ROUNDING = 1e-5


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


@dataclasses.dataclass(frozen=True)
class Confusion:
    """Voxel counts of a prediction against a truth."""

    tp: int
    fp: int
    fn: int
    tn: int

    @property
    def dice(self) -> float:
        """2 TP / (2 TP + FP + FN) (Dice 1945)."""
        return _ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn)

    @property
    def iou(self) -> float:
        """TP / (TP + FP + FN) (Jaccard 1912)."""
        return _ratio(self.tp, self.tp + self.fp + self.fn)

    @property
    def sensitivity(self) -> float:
        return _ratio(self.tp, self.tp + self.fn)

    @property
    def specificity(self) -> float:
        return _ratio(self.tn, self.tn + self.fp)

    @property
    def precision(self) -> float:
        return _ratio(self.tp, self.tp + self.fp)


def _check_masks(*masks: np.ndarray) -> None:
    for mask in masks:
        if mask.dtype != np.bool_:
            raise TypeError(f'a mask is boolean, not {mask.dtype}')
        if mask.shape != masks[0].shape:
            raise ValueError(f'masks of different shapes: {masks[0].shape} and {mask.shape}')


def count_confusion(
    truth: np.ndarray, prediction: np.ndarray, within: np.ndarray | None = None
) -> Confusion:
    """Counts the voxels of two boolean masks of one shape: all, or those in the mask `within`.

    Raises:
      TypeError: a mask is not boolean. ValueError: the shapes differ.
    """
    total = truth.size
    if within is None:
        _check_masks(truth, prediction)
    else:
        _check_masks(truth, prediction, within)
        truth, prediction = truth & within, prediction & within
        total = np.count_nonzero(within)
    tp = int(np.count_nonzero(truth & prediction))
    fp = int(np.count_nonzero(prediction)) - tp
    fn = int(np.count_nonzero(truth)) - tp
    return Confusion(tp=tp, fp=fp, fn=fn, tn=int(total) - tp - fp - fn)


@dataclasses.dataclass(frozen=True)
class SurfaceDistances:
    """Distances in mm from each surface voxel of the truth to the nearest one of the prediction,
    (T,), and the other way, (P,). They are infinite where the other mask is empty."""

    from_truth_mm: np.ndarray
    from_prediction_mm: np.ndarray

    @property
    def hd95_mm(self) -> float:
        """95 % Hausdorff distance: the larger of the two directed 95th percentiles, interpolated
        linearly; NaN if either mask is empty. MONAI does the same; medpy takes one percentile of
        both directions together."""
        if not (self.from_truth_mm.size and self.from_prediction_mm.size):
            return math.nan
        both = (self.from_truth_mm, self.from_prediction_mm)
        return max(float(np.percentile(distances, 95)) for distances in both)

    def nsd(self, tolerance_mm: float) -> float:
        """Normalized surface Dice in [0, 1] (Nikolov et al. 2018, arXiv 1809.04430, on voxel
        surfaces): the share of all surface voxels that lie within the tolerance, it included, of
        the other's surface. NaN if both masks are empty, 0 if one is."""
        limit = tolerance_mm * (1 + _RELATIVE_ROUNDING)
        both = np.concatenate([self.from_truth_mm, self.from_prediction_mm])
        return _ratio(int(np.count_nonzero(both <= limit)), both.size)


def crop_to_union(*masks: np.ndarray) -> list[np.ndarray]:
    """Views of boolean masks of one shape, cropped to the box that holds them all; of no voxel
    where all are empty. No surface, so no distance, and no lesion lies outside it."""
    union = np.logical_or.reduce(masks)
    box = []
    for axis in range(union.ndim):
        others = tuple(other for other in range(union.ndim) if other != axis)
        filled = np.flatnonzero(union.any(axis=others))
        box.append(slice(filled[0], filled[-1] + 1) if filled.size else slice(0, 0))
    return [mask[tuple(box)] for mask in masks]


def _surface(mask: np.ndarray) -> np.ndarray:
    """Voxels of the mask with a face neighbour outside it; beyond the array is outside."""
    padded = np.pad(mask, 1)
    inside = (slice(1, -1),) * mask.ndim
    interior = mask.copy()
    for axis in range(mask.ndim):
        for neighbour in (slice(None, -2), slice(2, None)):
            interior &= padded[(*inside[:axis], neighbour, *inside[axis + 1 :])]
    return mask & ~interior


def _distances_to(surface: np.ndarray, from_: np.ndarray, spacing_mm) -> np.ndarray:
    if not surface.any():
        return np.full(np.count_nonzero(from_), np.inf, np.float32)
    # As bytes: of booleans edt takes 1.5 times as long, for the same figures.
    away = (~surface).view(np.uint8)
    squared = edt.edtsq(away, anisotropy=tuple(spacing_mm), black_border=False, parallel=1)
    return np.sqrt(squared[from_])


def surface_distances(
    truth: np.ndarray, prediction: np.ndarray, spacing_mm: Sequence[float]
) -> SurfaceDistances:
    """Distances between the surfaces of two (Z, Y, X) boolean masks; spacing is along z, y, x.

    A surface voxel is a voxel of the mask with at least one of its six face neighbours outside the
    mask; the border of the array counts as outside. Distances run between voxel centres. This is
    MONAI's definition (`get_mask_edges`); DeepMind's surface-distance weighs surface elements by
    their area instead and so gives other values.

    Raises:
      TypeError: a mask is not boolean. ValueError: the shapes differ, are not 3D, or the spacing is
      not three positive numbers.
    """
    _check_masks(truth, prediction)
    spacing_mm = [float(step) for step in spacing_mm]
    if truth.ndim != 3:
        raise ValueError(f'surface metrics are for (Z, Y, X) masks, not shape {truth.shape}')
    if len(spacing_mm) != 3 or not all(0 < step < math.inf for step in spacing_mm):
        raise ValueError(f'spacing_mm is three positive numbers (z, y, x), not {spacing_mm}')
    truth, prediction = (_surface(mask) for mask in crop_to_union(truth, prediction))
    return SurfaceDistances(
        from_truth_mm=_distances_to(prediction, truth, spacing_mm),
        from_prediction_mm=_distances_to(truth, prediction, spacing_mm),
    )


def bootstrap_interval(
    values: Sequence[float],
    *,
    subjects: Sequence[str] | None = None,
    seed: int = 0,
    num: int = 2000,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over subjects (Efron and Tibshirani 1993, ch. 13).

    Args:
      values: (N,) one figure a case or a slice; undefined (NaN) ones are left out.
      subjects: (N,) whose value it is. Subjects are drawn with replacement, each with all of its
        values, because slices of one subject resemble each other. None: one value a subject.
      seed, num: of the random draws. level: the interval's coverage, in (0, 1).

    Returns:
      (low, high); (NaN, NaN) with fewer than two subjects, who cannot show how subjects vary.

    Raises:
      ValueError: values and subjects differ in length.
    """
    values = np.asarray(values, np.float64)
    subjects = np.arange(values.size) if subjects is None else np.asarray(subjects)
    if values.shape != subjects.shape:
        raise ValueError(f'{values.size} values of {subjects.size} subjects')
    defined = ~np.isnan(values)
    names, subject_of = np.unique(subjects[defined], return_inverse=True)
    if names.size < 2:
        return math.nan, math.nan
    sums = np.bincount(subject_of, weights=values[defined])
    counts = np.bincount(subject_of)
    drawn = np.random.default_rng(seed).integers(names.size, size=(num, names.size))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap_runs(
    runs: np.ndarray,
    against: np.ndarray | None = None,
    *,
    seed: int = 0,
    num: int = 2000,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean over runs of one recipe and subjects, both drawn with
    replacement, independently of each other (the pigeonhole bootstrap, Owen 2007,
    doi:10.1214/07-AOAS122). Of one run it is an interval over subjects alone.

    Args:
      runs: (R, N) one figure a run and subject; undefined (NaN) ones are left out.
      against: (Q, N) of other runs and the same subjects: the interval is of the mean of `runs`
        minus theirs. A subject is drawn for both, so that they are paired.
      seed, num, level: as of `bootstrap_interval`.

    Returns:
      (low, high); (NaN, NaN) with fewer than two subjects.

    Raises:
      ValueError: the two are not of as many subjects.
    """
    groups = [np.asarray(runs, np.float64)]
    if against is not None:
        groups.append(np.asarray(against, np.float64))
    if groups[0].shape[1] != groups[-1].shape[1]:
        raise ValueError(f'runs of {groups[0].shape[1]} and of {groups[-1].shape[1]} subjects')
    known = np.logical_and.reduce([~np.isnan(group).all(axis=0) for group in groups])
    rng, num_subjects = np.random.default_rng(seed), int(known.sum())
    if num_subjects < 2:
        return math.nan, math.nan
    of_subjects = _draw_counts(rng, num, num_subjects)
    means = []
    for group in groups:
        values, of_runs = group[:, known], _draw_counts(rng, num, len(group))
        defined = ~np.isnan(values)
        sums = ((of_runs @ np.where(defined, values, 0)) * of_subjects).sum(axis=1)
        means.append(sums / ((of_runs @ defined) * of_subjects).sum(axis=1))
    drawn = means[0] - means[1] if len(means) > 1 else means[0]
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _draw_counts(rng: np.random.Generator, num: int, size: int) -> np.ndarray:
    """(num, size): how often each of `size` is drawn when as many are, with replacement."""
    return rng.multinomial(size, np.full(size, 1 / size), size=num)
