"""From lesion probability to mask: thresholds, components, and the study's own grid."""

import dataclasses

import cc3d
import numpy as np
from scipy import ndimage

from covseg_jax.imaging.geometry import Geometry, to_study_grid

# 26-connected components are counted with a margin of one voxel: of an array that is a line, and of
# some that are one voxel thin, cc3d 4.1.1 counts too few labels beforehand, and raises.
_WITHOUT_MARGIN = (slice(1, -1),) * 3


@dataclasses.dataclass(frozen=True)
class MaskSettings:
    """From probability to mask.

    Attributes:
      threshold: the least probability of a lesion's voxels.
      seed_threshold: the least probability that one voxel of a lesion must reach; at `threshold` or
        below it drops no lesion.
      min_component_ml: smaller lesions are dropped.
      share_of_max: if above 0, it replaces both thresholds: a lesion is what *exceeds* this share
        of the study's highest probability on the model's grid; published 0.2 (method.md section 5).
    """

    threshold: float = 0.5
    seed_threshold: float = 0.0
    min_component_ml: float = 0.1
    share_of_max: float = 0.0


@dataclasses.dataclass(frozen=True)
class StudyMask:
    """A study's result on its own grid, canonical (Z, Y, X)."""

    mask: np.ndarray  # bool
    lungs: np.ndarray  # bool


def find_thresholds(probability: np.ndarray, settings: MaskSettings) -> MaskSettings:
    """The settings with share_of_max turned into a threshold for this (D, H, W) probability."""
    if not settings.share_of_max:
        return settings
    share = np.float32(settings.share_of_max * float(probability.max(initial=0)))
    # More than the share, and more than 0: where all is 0 there is no lesion.
    least = max(np.nextafter(share, np.float32(1)), np.finfo(np.float32).tiny)
    return MaskSettings(float(least), min_component_ml=settings.min_component_ml)


def drop_unsure_lesions(probability: np.ndarray, settings: MaskSettings) -> np.ndarray:
    """(D, H, W) lesion probability, set to zero in lesions that the network is nowhere sure of.

    This is hysteresis (Canny 1986, doi:10.1109/TPAMI.1986.4767851) in three dimensions: a
    face-connected component at `threshold` or above counts if one of its voxels, in any slice,
    reaches `seed_threshold`. A lesion thus keeps its faint border and its faint slices, and what
    is faint throughout, as vessels are, is dropped.
    """
    if settings.seed_threshold <= settings.threshold:
        return probability
    labels = cc3d.connected_components(probability >= settings.threshold, connectivity=6)
    unsure = np.ones(int(labels.max()) + 1, bool)
    unsure[labels[probability >= settings.seed_threshold]] = False
    unsure[0] = False
    return np.where(unsure[labels], 0, probability)


def mask_on_model_grid(probability: np.ndarray, voxel_ml: float, settings: MaskSettings):
    settings = find_thresholds(probability, settings)
    sure = drop_unsure_lesions(probability, settings)
    return drop_small_components(sure >= settings.threshold, settings.min_component_ml / voxel_ml)


def mask_on_study_grid(
    probability: np.ndarray, lungs: np.ndarray, geometry: Geometry, settings: MaskSettings
) -> StudyMask:
    """The mask and lungs on the study's own grid, from (D, H, W) lesion probability and lungs."""
    settings = find_thresholds(probability, settings)
    native_lungs = to_study_grid(lungs, geometry, threshold=0.5)
    # The seed threshold was found on the model's grid, and resampling lowers peaks.
    sure = drop_unsure_lesions(probability, settings)
    native = to_study_grid(sure, geometry, deblur=True, threshold=settings.threshold)
    native &= native_lungs
    mask = drop_small_components(native, settings.min_component_ml / geometry.study_voxel_ml)
    return StudyMask(mask, native_lungs)


def drop_small_components(mask: np.ndarray, min_voxels: float) -> np.ndarray:
    """The boolean mask without 26-connected components of fewer than `min_voxels` voxels."""
    if min_voxels <= 1 or not mask.any():
        return mask
    # Labels take 4 bytes a voxel: only of the box that holds the mask.
    box = ndimage.find_objects(mask.view(np.uint8))[0]
    kept = np.zeros_like(mask)
    dust = {'threshold': int(np.ceil(min_voxels)), 'connectivity': 26}
    kept[box] = cc3d.dust(np.pad(mask[box], 1), **dust)[_WITHOUT_MARGIN] > 0
    return kept


def label_lesions(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """The 26-connected components of a boolean (Z, Y, X) mask, numbered from 1, and how many."""
    labels, num = cc3d.connected_components(np.pad(mask, 1), connectivity=26, return_N=True)
    return labels[_WITHOUT_MARGIN], num
