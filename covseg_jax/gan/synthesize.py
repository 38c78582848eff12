"""GAN -> pseudo-masks: scan minus healthy version, inside the lungs, thresholded on healthy scans.

score = smooth(relu(scan − healthy)) inside the slightly eroded lungs; the threshold is a percentile
of the score in held-out *healthy* lungs; the pseudo-mask is score / (2 · threshold) clipped to
[0, 1], so that 0.5 is the threshold; components of the binary mask under a least volume are zeroed.
Published is none of this: the pseudo-mask is the raw signed difference of the two volumes, each
scaled to [0, 1] by its own extremes (method.md section 2).
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from scipy import ndimage
from tqdm import tqdm

from covseg_jax import atomic, hosts
from covseg_jax.errors import InputError
from covseg_jax.imaging.masks import MaskSettings, drop_small_components, mask_on_model_grid
from covseg_jax.prepare.cases import Case


@dataclasses.dataclass(frozen=True)
class PseudoMaskSettings:
    """Where pseudo-masks come from, and how a difference becomes one.

    Attributes:
      source: 'gan', the difference of scan and healthy version; or 'model', a trained network's
        predictions (predict/self_training.py), which only min_component_ml is used for.
      difference: 'opacity', relu(scan − healthy) inside the lungs; or 'published', the signed
        difference of the two volumes after each is scaled to [0, 1] by its own extremes, anywhere
        and as it is: smoothing_mm and erosion_mm are not used.
      share_of_max: 0, or above 0 no threshold is found and the pseudo-mask is the difference
        itself, in [-1, 1]; where a mask is wanted, it is what exceeds this share of the study's
        maximum.
      smoothing_mm: standard deviation of the in-plane Gaussian.
      erosion_mm: how far from the lungs' edge, in plane, a score counts.
      percentile: of the score in healthy lungs, in (0, 100): the threshold.
      min_component_ml: smaller components are dropped, of a difference itself from its mask alone.
      num_noise: how many noise inputs the healthy version is averaged over.
    """

    source: str
    difference: str
    share_of_max: float
    smoothing_mm: float
    erosion_mm: float
    percentile: float
    min_component_ml: float
    num_noise: int

    def __post_init__(self):
        if self.source not in ('gan', 'model'):
            raise InputError(f"synthesize.source={self.source!r} is not one of 'gan', 'model'")
        if self.difference not in ('opacity', 'published'):
            raise InputError(
                f"synthesize.difference={self.difference!r} is not one of 'opacity', 'published'"
            )

    def masks(self) -> MaskSettings:
        """How a pseudo-mask is cut: `soft_mask` puts the threshold at 0.5."""
        return MaskSettings(
            0.5, min_component_ml=self.min_component_ml, share_of_max=self.share_of_max
        )


def score_difference(
    image: np.ndarray,
    healthy: np.ndarray,
    lungs: np.ndarray,
    spacing_mm: tuple[float, float, float],
    settings: PseudoMaskSettings,
) -> np.ndarray:
    """(D, H, W) float32 score of a scan against its healthy version; 0 outside the eroded lungs,
    but for the published difference."""
    if settings.difference == 'published':
        return _spread(image) - _spread(healthy)
    difference = np.maximum(image.astype(np.float32) - healthy, 0) * (lungs > 0)
    _, dy, dx = spacing_mm
    sigma = (0.0, settings.smoothing_mm / dy, settings.smoothing_mm / dx)
    smooth = ndimage.gaussian_filter(difference, sigma, mode='constant')
    # Normalised, so that the lungs' edge is not darkened by the zeros beyond it.
    weight = ndimage.gaussian_filter((lungs > 0).astype(np.float32), sigma, mode='constant')
    score = np.divide(smooth, weight, out=np.zeros_like(smooth), where=weight > 1e-3)
    return score * _eroded(lungs > 0, settings.erosion_mm / dy)


def _spread(volume: np.ndarray) -> np.ndarray:
    low, high = float(volume.min()), float(volume.max())
    return (volume.astype(np.float32) - low) / max(high - low, 1e-6)


def _eroded(lungs: np.ndarray, radius: float) -> np.ndarray:
    if radius < 0.5:
        return lungs
    return np.stack([ndimage.distance_transform_edt(one) > radius for one in lungs])


def soft_mask(
    score: np.ndarray, threshold: float, voxel_ml: float, settings: PseudoMaskSettings
) -> np.ndarray:
    """Score -> (D, H, W) float16 pseudo-mask in [0, 1], 0.5 at the threshold."""
    soft = np.clip(score / (2 * threshold), 0, 1)
    binary = soft >= 0.5
    kept = drop_small_components(binary, settings.min_component_ml / voxel_ml)
    soft = np.where(binary & ~kept, 0, soft)
    # Stored as float16, in which no value under 0.5 may round up to it.
    return np.where(soft >= 0.5, soft, np.minimum(soft, 0.4995)).astype(np.float16)


NewFile = Callable[[pathlib.Path], AbstractContextManager[pathlib.Path]]


def synthesize(
    heal: Callable[[np.ndarray, str], np.ndarray],
    calibration: Sequence[Case],
    covid: Sequence[Case],
    folder: pathlib.Path,
    settings: PseudoMaskSettings,
    new_file: NewFile = atomic.new_file,
) -> dict:
    """Writes a pseudo-mask for each COVID case, and summary.json last.

    Args:
      heal: ((D, H, W) float32 scan, study id) -> healthy version; the id chooses its noise.
      calibration: held-out healthy cases.
      covid: the cases to mark.
      folder: gets `<study_id>.npy`, float16 (D, H, W) in [0, 1], or a signed difference as it is.
      new_file: how a file is made; `written.new_file` in a folder that a person named.

    Returns:
      What summary.json holds: the threshold (None where masks are cut at a share of the maximum,
      which stands beside it then), healthy false positives and each study's infection %.

    Raises:
      InputError: no calibration case, or the generator changes nothing.
    """
    if not calibration:
        raise InputError('no healthy scan is held out; raise data.calibration_fraction')
    scores = [
        _score_case(case, heal, settings)
        for case in tqdm(calibration, desc='calibrate', disable=None)
    ]
    threshold = None if settings.share_of_max else _find_threshold(scores, settings)
    false_positive_ml = {}
    for case, (score, lungs) in zip(calibration, scores, strict=True):
        voxel_ml = case.geometry.voxel_ml
        _, marked = _mark(score, lungs, threshold, voxel_ml, settings)
        false_positive_ml[case.study_id] = float(marked * voxel_ml)

    def mark(case: Case) -> tuple[np.ndarray, int]:
        score, lungs = _score_case(case, heal, settings)
        return _mark(score, lungs, threshold, case.geometry.voxel_ml, settings)

    facts = {'threshold': threshold, 'percentile': settings.percentile}
    if threshold is None:
        facts['share_of_max'] = settings.share_of_max
    return write_pseudo_masks(mark, covid, folder, facts, false_positive_ml, new_file)


def write_pseudo_masks(
    mark: Callable[[Case], tuple[np.ndarray, int]],
    covid: Sequence[Case],
    folder: pathlib.Path,
    facts: Mapping[str, Any],
    false_positive_ml: Mapping[str, float],
    new_file: NewFile = atomic.new_file,
) -> dict:
    """Writes a pseudo-mask for each COVID case, and summary.json last; returns what that holds.

    Args:
      mark: case -> its (D, H, W) float16 pseudo-mask, and how many voxels of the lungs it marks.
      covid, folder, new_file: as in `synthesize`.
      facts: what the summary begins with.
      false_positive_ml: what is marked in held-out healthy cases, by study id.
    """
    infection = []
    for case in tqdm(hosts.share(covid), desc='synthesize', unit='study', disable=None):
        mask, marked = mark(case)
        with new_file(folder / f'{case.study_id}.npy') as temporary:
            np.save(temporary, mask)
        infection.append(float(100 * marked / max((np.asarray(case.lungs()) > 0).sum(), 1)))
    studies = [case.study_id for case in covid]
    summary = {
        **facts,
        'healthy_false_positive_ml': {
            'mean': float(np.mean(list(false_positive_ml.values()))),
            'studies': dict(false_positive_ml),
        },
        'infection_percent': dict(zip(studies, hosts.gather(infection, len(covid)), strict=True)),
    }
    if hosts.is_first():
        with new_file(folder / 'summary.json') as temporary:
            temporary.write_text(json.dumps(summary, indent=2), encoding='utf-8')
    return summary


def _score_case(
    case: Case, heal: Callable[[np.ndarray, str], np.ndarray], settings: PseudoMaskSettings
) -> tuple[np.ndarray, np.ndarray]:
    """(D, H, W) each: the case's score, and its lungs."""
    image, lungs = np.asarray(case.image(), np.float32), np.asarray(case.lungs())
    healthy = heal(image, case.study_id)
    spacing_mm = case.geometry.model_spacing_mm
    return score_difference(image, healthy, lungs, spacing_mm, settings), lungs


def _mark(
    score: np.ndarray,
    lungs: np.ndarray,
    threshold: float | None,
    voxel_ml: float,
    settings: PseudoMaskSettings,
) -> tuple[np.ndarray, int]:
    """The pseudo-mask of a score, and how many voxels of the lungs it marks."""
    if threshold is None:
        mask = score.astype(np.float16)
    else:
        mask = soft_mask(score, threshold, voxel_ml, settings)
    marked = mask_on_model_grid(mask.astype(np.float32), voxel_ml, settings.masks())
    return mask, int((marked & (lungs > 0)).sum())


def _find_threshold(
    scores: Sequence[tuple[np.ndarray, np.ndarray]], settings: PseudoMaskSettings
) -> float:
    """The percentile of the score in healthy lungs."""
    in_lungs = np.concatenate([score[lungs > 0] for score, lungs in scores])
    threshold = float(np.percentile(in_lungs, settings.percentile))
    if threshold <= 0:
        raise InputError(
            'the generator changes nothing in healthy scans, so no threshold can be found; '
            'train the GAN longer (gan.num_steps)'
        )
    return threshold


def empty_lungs(scan: np.ndarray, study_id: str) -> np.ndarray:
    """The healthy version of the baseline without a GAN: air, so that the score is the density."""
    return np.zeros(scan.shape, np.float32)


def read_pseudo_mask(folder: pathlib.Path, study_id: str) -> np.ndarray:
    """(D, H, W) float16 in [0, 1], or a signed difference in [-1, 1]; memory-mapped.

    Raises:
      InputError: the study has none.
    """
    path = folder / f'{study_id}.npy'
    if not path.exists():
        raise InputError(f'{path}: no such pseudo-mask; run --stages=synthesize first')
    return np.load(path, mmap_mode='r')
