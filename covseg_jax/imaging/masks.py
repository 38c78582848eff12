"""From lesion probability to mask: cuts, components, and the way back to the study's own grid."""

import dataclasses

import cc3d
import numpy as np

from covseg_jax.imaging import geometry as geometries
from covseg_jax.imaging.geometry import Geometry


@dataclasses.dataclass(frozen=True)
class MaskSettings:
    """From probability to mask.

    Attributes:
      threshold: the least probability of a lesion.
      seed_threshold: the least probability that some voxel of a lesion must have; at `threshold` or
        below, every lesion has one.
      min_component_ml: smaller lesions are dropped.
      share_of_max: above 0 it stands in place of both thresholds, and a lesion is what *exceeds*
        this share of the study's highest probability on the model's grid; published 0.2 (METHOD.md
        section 5).
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
    """The settings for one study, (D, H, W) probability: a share of its maximum as a threshold."""
    if not settings.share_of_max:
        return settings
    share = np.float32(settings.share_of_max * float(probability.max(initial=0)))
    # More than the share, not as much: where all is 0 there is no lesion.
    least = max(np.nextafter(share, np.float32(1)), np.finfo(np.float32).tiny)
    return MaskSettings(float(least), min_component_ml=settings.min_component_ml)


def drop_unsure_lesions(probability: np.ndarray, settings: MaskSettings) -> np.ndarray:
    """(D, H, W) lesion probability, zero in lesions that the network is nowhere sure of.

    Hysteresis (Canny 1986, doi:10.1109/TPAMI.1986.4767851) in three dimensions: a lesion is what
    touches through faces at `threshold` or above, and it counts if it reaches `seed_threshold` in
    one of its voxels, in whatever slice. So a lesion keeps its faint border and its faint slices,
    and what is faint throughout, as vessels are, goes.
    """
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
    """Brings (D, H, W) lesion probability and lungs back onto the study's own voxels, cuts, and
    drops small components."""
    settings = find_thresholds(probability, settings)
    native_lungs = geometries.to_study_grid(lungs, geometry) >= 0.5
    # Before resampling, which lowers peaks: there the seed threshold was found.
    sure = drop_unsure_lesions(probability, settings)
    native = geometries.to_study_grid(sure, geometry, order='deblurred') * native_lungs
    mask = drop_small_components(
        native >= settings.threshold, settings.min_component_ml / geometry.study_voxel_ml
    )
    return StudyMask(mask, native_lungs)


def drop_small_components(mask: np.ndarray, min_voxels: float) -> np.ndarray:
    """The boolean mask without 26-connected components of fewer than `min_voxels` voxels."""
    if min_voxels <= 1 or not mask.any():
        return mask
    return cc3d.dust(mask, threshold=int(np.ceil(min_voxels)), connectivity=26) > 0
