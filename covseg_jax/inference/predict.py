"""NIfTI in -> NIfTI out on the same grid, with lesion ml, lung ml and infection %."""

import csv
import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Sequence

import cc3d
import numpy as np
from tqdm import tqdm

from covseg_jax import atomic
from covseg_jax.data.cases import Case
from covseg_jax.data.opacities import PaintedScan
from covseg_jax.errors import InputError
from covseg_jax.imaging import geometry as geometries
from covseg_jax.imaging.geometry import Geometry
from covseg_jax.imaging.nifti import write_volume
from covseg_jax.imaging.prepare import PrepareSettings, prepare_volume
from covseg_jax.imaging.studies import Study
from covseg_jax.inference.synthesize import drop_small_components

Probability = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (image, lungs) -> lesion probability

COLUMNS = ('study_id', 'status', 'lesion_ml', 'lung_ml', 'infection_percent', 'mask')


@dataclasses.dataclass(frozen=True)
class MaskSettings:
    """From probability to mask.

    Attributes:
      threshold: the least probability of a lesion.
      seed_threshold: the least probability that some voxel of a lesion must have; at `threshold` or
        below, every lesion has one.
      min_component_ml: smaller lesions are dropped.
    """

    threshold: float = 0.5
    seed_threshold: float = 0.0
    min_component_ml: float = 0.1


@dataclasses.dataclass(frozen=True)
class StudyMask:
    """A study's result on its own grid, canonical (Z, Y, X)."""

    mask: np.ndarray  # bool
    lungs: np.ndarray  # bool


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


def _mask_on_model_grid(probability: np.ndarray, voxel_ml: float, settings: MaskSettings):
    sure = drop_unsure_lesions(probability, settings)
    return drop_small_components(sure >= settings.threshold, settings.min_component_ml / voxel_ml)


def mask_on_study_grid(
    probability: np.ndarray, lungs: np.ndarray, geometry: Geometry, settings: MaskSettings
) -> StudyMask:
    """Brings (D, H, W) lesion probability and lungs back onto the study's own voxels, cuts, and
    drops small components."""
    native_lungs = geometries.to_study_grid(lungs, geometry) >= 0.5
    # Before resampling, which lowers peaks: there the seed threshold was found.
    sure = drop_unsure_lesions(probability, settings)
    native = geometries.to_study_grid(sure, geometry, order='deblurred') * native_lungs
    mask = drop_small_components(
        native >= settings.threshold, settings.min_component_ml / geometry.study_voxel_ml
    )
    return StudyMask(mask, native_lungs)


def predict_study(
    study: Study,
    probability: Probability,
    preparation: PrepareSettings,
    settings: MaskSettings,
    output: pathlib.Path,
    *,
    write_probability: bool = False,
) -> dict[str, str | float]:
    """Reads, prepares and segments one study; writes `<study_id>_mask.nii.gz` (uint8, the study's
    shape and affine) and, if asked, `<study_id>_probability.nii.gz` (float32).

    Returns:
      A row of results.csv.

    Raises:
      InputError: the study cannot be used; nothing is written.
    """
    case = prepare_volume(study, preparation)
    probabilities = probability(case.image, case.lungs)
    found = mask_on_study_grid(probabilities, case.lungs, case.geometry, settings)
    affine = np.asarray(case.geometry.affine)
    path = output / f'{study.study_id}_mask.nii.gz'
    if write_probability:
        native = geometries.to_study_grid(probabilities, case.geometry) * found.lungs
        write_volume(
            output / f'{study.study_id}_probability.nii.gz',
            geometries.from_canonical(native.astype(np.float32), affine),
            affine,
        )
    write_volume(path, geometries.from_canonical(found.mask.astype(np.uint8), affine), affine)
    lesion_ml = float(found.mask.sum()) * case.geometry.study_voxel_ml
    lung_ml = float(found.lungs.sum()) * case.geometry.study_voxel_ml
    return {
        'study_id': study.study_id,
        'status': 'ok',
        'lesion_ml': lesion_ml,
        'lung_ml': lung_ml,
        'infection_percent': 100 * lesion_ml / lung_ml,
        'mask': path.name,
    }


def predict_studies(
    studies: Sequence[Study],
    probability: Probability,
    preparation: PrepareSettings,
    settings: MaskSettings,
    output: pathlib.Path,
    *,
    write_probability: bool = False,
) -> tuple[list[dict], list[str]]:
    """Segments studies one by one and writes results.csv; a study that cannot be used is named in
    it and passed over.

    Returns:
      The rows of results.csv, and the messages of the studies passed over.
    """
    rows, faults = [], []
    for study in tqdm(studies, desc='predict', unit='study', disable=None):
        try:
            row = predict_study(
                study, probability, preparation, settings, output,
                write_probability=write_probability,
            )  # fmt: skip
        except InputError as error:
            faults.append(str(error))
            row = {'study_id': study.study_id, 'status': str(error)}
        rows.append(row)
    with atomic.new_file(output / 'results.csv') as temporary, temporary.open('w', newline='') as f:
        writer = csv.DictWriter(f, COLUMNS, restval='')
        writer.writeheader()
        writer.writerows(rows)
    return rows, faults


# Not lower and no higher: painted opacities can be cut at 0.3 and be asked for a 0.96 somewhere;
# lesions unlike them then run into the vessels beside them, or are never sure enough.
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
SEED_THRESHOLDS = (0.6, 0.7, 0.8, 0.9)


def calibrate_mask(
    probability: Probability,
    painted: Iterable[PaintedScan],
    healthy: Sequence[Case],
    *,
    max_healthy_ml: float,
    min_component_ml: float,
    thresholds: Sequence[float] = THRESHOLDS,
    seed_thresholds: Sequence[float] = SEED_THRESHOLDS,
) -> tuple[MaskSettings, float]:
    """The cuts that an operator should use, found without any human mask: of those that mark at
    most `max_healthy_ml` in a held-out healthy scan on average, the ones with the best mean Dice on
    healthy scans with painted opacities. Where none marks so little, the highest.

    Args:
      probability: the network.
      painted: held-out healthy scans with painted opacities.
      healthy: held-out healthy cases.
      max_healthy_ml: the most that is allowed.
      min_component_ml: smaller components do not count.
      thresholds: to choose from, ascending.
      seed_thresholds: to choose from, ascending; each is tried with the thresholds up to it, and
        each threshold also alone.

    Returns:
      The cuts, and the mean false positives in healthy scans at them, in ml (NaN without such
      scans).
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
            marked = _mask_on_model_grid(found, scan.voxel_ml, settings)
            overlap = (scan.mask & marked).sum()
            dice[number] += 2 * overlap / max(scan.mask.sum() + marked.sum(), 1)
    false_ml = np.zeros((len(healthy), len(candidates)))
    for row, case in enumerate(healthy):
        found = probability(np.asarray(case.image()), np.asarray(case.lungs()))
        voxel_ml = case.geometry.voxel_ml
        for number, settings in enumerate(candidates):
            marked = _mask_on_model_grid(found, voxel_ml, settings)
            false_ml[row, number] = marked.sum() * voxel_ml
    mean_ml = false_ml.mean(axis=0) if len(healthy) else np.full(len(candidates), np.nan)
    allowed = np.flatnonzero(~(mean_ml > max_healthy_ml))
    best = int(allowed[np.argmax(dice[allowed])]) if allowed.size else len(candidates) - 1
    return candidates[best], float(mean_ml[best])
