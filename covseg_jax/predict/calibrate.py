"""The cuts that an operator should use, found without any human mask."""

from collections.abc import Iterable, Sequence

import numpy as np
from scipy import stats

from covseg_jax.data.opacities import PaintedScan
from covseg_jax.imaging.masks import MaskSettings, mask_on_model_grid
from covseg_jax.prepare.cases import Case
from covseg_jax.segmentation.volumes import Probability

# Not lower and not higher: painted opacities can be cut at 0.3 and be asked for a 0.96 somewhere;
# lesions unlike them then run into the vessels beside them, or are never sure enough. From 0.5 on
# three networks marked too little of phantoms' lesions and of real ones; at 0.3 real lesions gain,
# and phantoms' lose. Where one healthy scan was held out, 0.9 somewhere came out, and of labelled
# slices whole lesions were lost (Dice 0.713 -> 0.684; with 0.7 somewhere 0.707). Chosen on the
# phantoms of phantom.seed 0, their evaluation subjects included, and on labelled slices: what is
# reported of phantoms is measured on those of another seed, as launch/ablation.sh and
# launch/measure.sh do.
THRESHOLDS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SEED_THRESHOLDS = (0.6, 0.7)


def calibrate_mask(
    probability: Probability,
    painted: Iterable[PaintedScan],
    healthy: Sequence[Case],
    *,
    max_healthy_ml: float,
    min_component_ml: float,
    thresholds: Sequence[float] = THRESHOLDS,
    seed_thresholds: Sequence[float] = SEED_THRESHOLDS,
) -> tuple[MaskSettings, float | None]:
    """The cuts that an operator should use: of those that are not refused, the ones with the best
    mean Dice on healthy scans with painted opacities. Where all are refused, the highest.

    A cut is refused where held-out healthy scans show that it marks more than `max_healthy_ml` in
    one on average: where the lower end of a one-sided 95 % interval of the mean, mean - t standard
    errors, is above it (Student 1908, doi:10.1093/biomet/6.1.1), or a third of the mean is. With 40
    scans that end is about a quarter below the mean; with five it may be below 0. The third is
    that end for one scan of an exponential distribution, whose spread is its mean, as it is about
    here; so the 95 % are nominal.

    The cuts to choose from are ascending. Each seed threshold is tried with the thresholds up to
    it, and each threshold also alone.

    Returns:
      The cuts, and the mean false positives in healthy scans at them, in ml. Without such scans
      none is refused, and there is no mean: None.
    """
    candidates = [
        MaskSettings(threshold, seed, min_component_ml)
        for threshold in thresholds
        for seed in (threshold, *(s for s in seed_thresholds if s > threshold))
    ]
    dice = np.zeros(len(candidates))
    for scan in painted:
        found = probability(scan.image, scan.lungs)
        for number, settings in enumerate(candidates):
            marked = mask_on_model_grid(found, scan.voxel_ml, settings)
            overlap = (scan.mask & marked).sum()
            dice[number] += 2 * overlap / max(scan.mask.sum() + marked.sum(), 1)
    if not len(healthy):
        return candidates[int(np.argmax(dice))], None
    healthy_ml = _mark_healthy(probability, healthy, candidates)
    allowed = np.flatnonzero(~_are_refused(candidates, healthy_ml, max_healthy_ml))
    best = int(allowed[np.argmax(dice[allowed])]) if allowed.size else len(candidates) - 1
    return candidates[best], float(healthy_ml[:, best].mean())


def _are_refused(
    candidates: Sequence[MaskSettings], healthy_ml: np.ndarray, max_healthy_ml: float
) -> np.ndarray:
    """Which cuts (scans, candidates) of ml show to mark more than the limit: themselves, or by a
    higher cut, whose masks lie within theirs."""
    shown = _lower_bound(healthy_ml) > max_healthy_ml
    cuts = np.array([(each.threshold, each.seed_threshold) for each in candidates])
    holds = (cuts[:, None] <= cuts).all(axis=-1)  # [a, b]: the masks of b lie within those of a
    return (holds & shown).any(axis=1)


def _lower_bound(values: np.ndarray) -> np.ndarray:
    """The lower end of a one-sided 95 % interval of the mean over the first axis, and no less than
    that of one exponential value which is this mean."""
    number, mean = len(values), values.mean(axis=0)
    of_one = mean / -np.log(0.05)
    if number == 1:
        return of_one
    error = values.std(axis=0, ddof=1) / np.sqrt(number)
    return np.maximum(of_one, mean - stats.t.ppf(0.95, number - 1) * error)


def marked_ml(
    probability: Probability, healthy: Sequence[Case], settings: MaskSettings
) -> float | None:
    """What the settings mark in a held-out healthy scan on average, in ml; None without such scans.
    For cuts that are given and not found, as `calibrate_mask` finds them."""
    return float(_mark_healthy(probability, healthy, [settings]).mean()) if healthy else None


def _mark_healthy(
    probability: Probability, healthy: Sequence[Case], candidates: Sequence[MaskSettings]
) -> np.ndarray:
    """(cases, candidates): what each of the cuts marks in each healthy case, in ml."""
    marked = []
    for case in healthy:
        found = probability(np.asarray(case.image()), np.asarray(case.lungs()))
        voxel_ml = case.geometry.voxel_ml
        masks = (mask_on_model_grid(found, voxel_ml, settings) for settings in candidates)
        marked.append([mask.sum() * voxel_ml for mask in masks])
    return np.array(marked)
