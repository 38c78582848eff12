"""Pseudo-masks that trained networks predict, in place of the GAN's: a training that goes on from
one of them learns from their predictions on scans without masks (self-training)."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from covseg_jax.errors import InputError
from covseg_jax.gan.synthesize import NewFile, write_pseudo_masks
from covseg_jax.imaging.masks import MaskSettings, mask_on_model_grid
from covseg_jax.prepare.cases import Case
from covseg_jax.segmentation.volumes import Probability


def predict_pseudo_masks(
    probability: Probability,
    masks: MaskSettings,
    calibration: Sequence[Case],
    covid: Sequence[Case],
    folder: pathlib.Path,
    min_component_ml: float,
    facts: Mapping[str, Any],
    new_file: NewFile,
) -> dict:
    """Writes the model's prediction of each COVID case as its pseudo-mask, and summary.json last;
    returns what that holds.

    Args:
      probability: the model's, of an image and its lungs; masks: its thresholds.
      calibration: held-out healthy cases; what is marked in them is counted.
      covid, folder, new_file: as in `gan.synthesize.synthesize`.
      min_component_ml: smaller lesions are dropped.
      facts: what else the summary says.

    Raises:
      InputError: no calibration case.
    """
    if not calibration:
        raise InputError('no healthy scan is held out; raise data.calibration_fraction')
    least = max(min_component_ml, masks.min_component_ml)
    cuts = MaskSettings(masks.threshold, masks.seed_threshold, least)

    def mark(case: Case) -> tuple[np.ndarray, int]:
        image, lungs = np.asarray(case.image()), np.asarray(case.lungs())
        soft = soften(probability(image, lungs), case.geometry.voxel_ml, cuts)
        return soft, int(np.count_nonzero(soft >= 0.5))

    in_healthy = {
        case.study_id: float(mark(case)[1] * case.geometry.voxel_ml) for case in calibration
    }
    facts = {'threshold': cuts.threshold, 'seed_threshold': cuts.seed_threshold, **facts}
    return write_pseudo_masks(mark, covid, folder, facts, in_healthy, new_file)


def soften(probability: np.ndarray, voxel_ml: float, cuts: MaskSettings) -> np.ndarray:
    """(D, H, W) lesion probability -> float16 pseudo-mask in [0, 1], as `gan.synthesize` has them:
    0.5 at the threshold, linear on both sides of it, 0 in lesions that the cuts drop."""
    soft = np.interp(probability, (0, cuts.threshold, 1), (0, 0.5, 1))
    kept = mask_on_model_grid(probability, voxel_ml, cuts)
    soft = np.where((probability >= cuts.threshold) & ~kept, 0, soft)
    # Rounding to float16 moves nothing over the threshold, in either direction.
    return np.where(kept, np.maximum(soft, 0.5), np.minimum(soft, 0.4995)).astype(np.float16)
