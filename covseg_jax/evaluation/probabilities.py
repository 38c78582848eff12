"""How far a map of probabilities can be taken at its word. NaN means "undefined"."""

import math

import numpy as np

NUM_BINS = 15


def brier_score(truth: np.ndarray, probability: np.ndarray) -> float:
    """Mean of (probability − truth)², 0 best (Brier 1950). Arrays of one shape, truth boolean and
    probability in [0, 1]. NaN of none."""
    if not truth.size:
        return math.nan
    return float(np.mean(np.square(probability.astype(np.float64) - truth)))


def expected_calibration_error(truth: np.ndarray, probability: np.ndarray) -> float:
    """Mean distance between predicted probability and observed share of lesion, over `NUM_BINS`
    bins of equal width, weighted by their voxels (Guo et al. 2017, for the class lesion). NaN of
    none."""
    if not truth.size:
        return math.nan
    counts, sums, hits = calibration_curve(truth, probability)
    return float(np.abs(sums - hits).sum() / counts.sum())


def calibration_curve(
    truth: np.ndarray, probability: np.ndarray, num_bins: int = NUM_BINS
) -> np.ndarray:
    """(3, num_bins) voxels, sums of their probabilities, and lesion voxels, of bins of equal width.
    Those of several cases add up."""
    probability = probability.astype(np.float64).ravel()
    bins = np.minimum((probability * num_bins).astype(np.int64), num_bins - 1)
    counts = np.bincount(bins, minlength=num_bins)
    sums = np.bincount(bins, weights=probability, minlength=num_bins)
    hits = np.bincount(bins, weights=truth.ravel().astype(np.float64), minlength=num_bins)
    return np.stack([counts, sums, hits])


def average_precision(truth: np.ndarray, probability: np.ndarray) -> float:
    """Σ (Rₙ − Rₙ₋₁) Pₙ over falling thresholds, voxels of one probability together (as
    scikit-learn's average_precision_score). NaN where there is no lesion."""
    positives = int(np.count_nonzero(truth))
    if not positives:
        return math.nan
    order = np.argsort(-probability, axis=None, kind='stable')
    ranked = probability.ravel()[order]
    last = np.flatnonzero(np.append(np.diff(ranked) != 0, True))  # of each probability
    hits = np.cumsum(truth.ravel()[order])[last]
    recall = np.concatenate([[0.0], hits / positives])
    return float(np.sum(np.diff(recall) * hits / (last + 1)))
