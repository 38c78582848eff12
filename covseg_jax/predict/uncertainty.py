"""Where the networks of a model disagree, and between which volumes the lesions' may lie.

Networks that differ by their seed, or by their grid, agree where the training decides and differ
where it does not (Lakshminarayanan et al. 2017, arXiv 1612.01474).
"""

import bisect
import dataclasses
import math

import numpy as np

from covseg_jax.imaging.geometry import Geometry, to_study_grid
from covseg_jax.imaging.masks import (
    MaskSettings,
    drop_unsure_lesions,
    find_thresholds,
    mask_on_model_grid,
)

# Of the range of lesion ml: the odds of its two cuts are those of the model's cut divided by it,
# and times it. Chosen for the first model that came with the code, by split conformal prediction
# for 90 % of phantoms of a seed of their own; docs/results.md has the command, what it held
# elsewhere, and what today's model needs.
ODDS_FACTOR = 2**1.5
FACTORS = tuple(2 ** (step / 4) for step in range(41))  # among which one is looked for


def disagreement(networks: np.ndarray) -> np.ndarray:
    """(D, H, W): the standard deviation of the probabilities (N, D, H, W) of N networks around
    their mean, 0 to 0.5; of two networks half of their difference."""
    return networks.std(axis=0)


def shift_cuts(settings: MaskSettings, factor: float) -> MaskSettings:
    """The settings with the odds p / (1 − p) of both thresholds times `factor`."""

    def shift(cut: float) -> float:
        return cut * factor / (1 - cut + cut * factor)

    return dataclasses.replace(
        settings,
        threshold=shift(settings.threshold),
        seed_threshold=shift(settings.seed_threshold),
    )


def lesion_range_ml(
    networks: np.ndarray,
    voxel_ml: float,
    settings: MaskSettings,
    lesion_ml: float,
    factor: float = ODDS_FACTOR,
) -> tuple[float, float]:
    """The lowest and the highest volume of lesions that the networks speak for, ml.

    The lowest is of what all networks mark at a stricter cut, the highest of what any marks at a
    laxer one, both on the model's grid. Ranges of a larger factor hold those of a smaller one,
    so that a factor can be found by which a share of the true volumes lies in them (nested
    conformal prediction, Gupta et al. 2022, doi:10.1016/j.patcog.2021.108496).

    Args:
      networks: (N, D, H, W), each network's lesion probability, 0 outside the lungs.
      voxel_ml: volume of a voxel of this grid.
      settings: the model's cuts.
      lesion_ml: of the study's mask, on its own grid; the range holds it.
      factor: of the odds of the cuts, at least 1.
    """
    settings = find_thresholds(networks.mean(axis=0), settings)
    ends = (
        (networks.min(axis=0), shift_cuts(settings, factor)),
        (networks.max(axis=0), shift_cuts(settings, 1 / factor)),
    )
    low, high = (
        float(np.count_nonzero(mask_on_model_grid(each, voxel_ml, cuts))) * voxel_ml
        for each, cuts in ends
    )
    return min(low, lesion_ml), max(high, lesion_ml)


def least_factor(
    networks: np.ndarray,
    voxel_ml: float,
    settings: MaskSettings,
    lesion_ml: float,
    true_ml: float,
) -> float:
    """The first of FACTORS at which `lesion_range_ml` holds the true volume; infinite where none
    does."""

    def holds(factor: float) -> bool:
        low, high = lesion_range_ml(networks, voxel_ml, settings, lesion_ml, factor)
        return low <= true_ml <= high

    number = bisect.bisect_left(FACTORS, True, key=holds)
    return FACTORS[number] if number < len(FACTORS) else math.inf


def where_networks_differ(
    networks: np.ndarray, geometry: Geometry, settings: MaskSettings
) -> np.ndarray:
    """Boolean, on the study's canonical grid (Z, Y, X): what one network alone would mark as
    lesion and another would not, by the model's cuts."""
    settings = find_thresholds(networks.mean(axis=0), settings)
    marked = [drop_unsure_lesions(each, settings) >= settings.threshold for each in networks]
    differ = np.any(marked, axis=0) & ~np.all(marked, axis=0)
    return to_study_grid(differ, geometry, threshold=0.5)
