"""What a model scores on every study of a set, kept so that no study is done twice.

Masks and probabilities are those that `predict` gives of the scan, on the study's own grid: every
model prepares scans by its own settings, and lesions that its lungs lack count against it.
"""

import functools
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from covseg_jax import written
from covseg_jax.evaluation import lesions, metrics, probabilities
from covseg_jax.imaging.masks import MaskSettings, StudyMask, mask_on_study_grid
from covseg_jax.imaging.study import Study
from covseg_jax.manifest import fingerprint
from covseg_jax.predict.journal import Journal
from covseg_jax.predict.model import RANGE, Model, native_probability, range_cells
from covseg_jax.predict.studies import predict_each
from covseg_jax.predict.uncertainty import least_factor
from covseg_jax.prepare.prepare_studies import CASE_VERSION, PreparedCase
from covseg_jax.prepare.study_files import read_image, read_mask

Row = dict[str, Any]

CUTS = np.arange(0.05, 1, 0.05)  # of probabilities, for curves of Dice
LEAST_SHARE = 0.1  # of a true lesion's voxels: it is found where as many are predicted
NODULE_ML = 1.0  # a true lesion under it is a nodule
DICE_AT = tuple(f'dice_at_{cut:.2f}' for cut in CUTS)
COLUMNS = (
    'study_id', 'category', 'status', 'true_ml', 'marked_ml', 'dice', *DICE_AT,
    'average_precision', 'lesion_f1', 'nodules', 'nodules_found', 'ece', *RANGE, 'range_factor',
)  # fmt: skip


def score_studies(
    model: Model, studies: Sequence[Study], folder: pathlib.Path, num_workers: int, title: str
) -> list[Row]:
    """Scores a model on studies, those with a lesion mask against it. Of the others, healthy scans,
    only what it marks is scored.

    A study that the model refuses, for instance because it finds no lungs, counts as one in which
    it finds nothing, with the fault as its `status`; a healthy one has no score.

    Args:
      model: the network. studies: in the rows' order; any value of their masks above 0 is lesion.
      folder: keeps the scores of each study by each model; a study is done again only where the
        model, the scan or a mask of the set is another.
      num_workers: processes beside this one. title: of the bar.

    Returns:
      A row of COLUMNS a study; a score that is undefined (rules in metrics.py) is NaN, and one that
      a healthy study or a model of one network does not have is not there.

    Raises:
      InputError: a scan or mask cannot be read, or `folder` holds what this program did not write.
    """
    masks = [_describe(study.lesion_mask) for study in studies]
    journal = Journal(folder, 0, fingerprint([model.identity, CASE_VERSION, COLUMNS, masks]))
    written.refuse_foreign(journal.files())
    folder.mkdir(parents=True, exist_ok=True)
    journal.begin()
    rows = journal.read_done(studies)
    to_do = [study for study in studies if study.study_id not in rows]
    by_id = {study.study_id: study for study in studies}
    finish = functools.partial(_finish, journal, model.masks)
    bar = tqdm(total=len(studies), initial=len(rows), desc=title, unit='study', disable=None)
    with bar:
        for row in predict_each(to_do, model, finish, num_workers):
            study_id, status = row['study_id'], row['status']
            rows[study_id] = row if status == 'ok' else _refuse(journal, by_id[study_id], status)
            bar.update()
    return [rows[study.study_id] for study in studies]


def _describe(mask: pathlib.Path | None) -> list | None:
    state = mask and mask.stat()
    return state and [mask.name, state.st_size, state.st_mtime_ns]


def _finish(
    journal: Journal,
    settings: MaskSettings,
    study: Study,
    case: PreparedCase,
    networks: np.ndarray,
    seconds: float,
) -> Row:
    del seconds
    probability, geometry = networks.mean(axis=0), case.geometry
    found = mask_on_study_grid(probability, case.lungs, geometry, settings)
    native = native_probability(case, probability, found)
    row = _score(study, native, found, geometry.study_voxel_ml, 'ok')
    row |= range_cells(networks, case, settings, row['marked_ml'])
    if len(networks) > 1 and study.lesion_mask is not None:
        volumes = row['marked_ml'], row['true_ml']
        row['range_factor'] = least_factor(networks, geometry.voxel_ml, settings, *volumes)
    journal.append(study, row, ())
    return row


def _refuse(journal: Journal, study: Study, status: str) -> Row:
    image = read_image(study)
    nothing = np.zeros(image.array.shape, bool)
    found = StudyMask(nothing, nothing)
    row = _score(study, nothing.astype(np.float32), found, image.voxel_ml, status)
    journal.append(study, row, ())
    return row


def _score(
    study: Study,
    probability: np.ndarray,
    found: StudyMask,
    voxel_ml: float,
    status: str,
) -> Row:
    row = {'study_id': study.study_id, 'category': study.category, 'status': status}
    if study.lesion_mask is not None:
        truth = read_mask(study, 'lesion_mask', read_image(study), labels=None)
        row |= score_arrays(truth, probability, found, voxel_ml)
    else:
        marked = np.count_nonzero(found.mask) * voxel_ml
        row['marked_ml'] = float(marked) if status == 'ok' else math.nan
    return row


def score_arrays(
    truth: np.ndarray, probability: np.ndarray, found: StudyMask, voxel_ml: float
) -> Row:
    """The scores of COLUMNS, from `true_ml` on, of one study; all arrays are (Z, Y, X).

    Dice and average precision are over the whole study, lungs or not, so that models with other
    lungs are compared alike; `ece` is inside the lungs that the model found. `dice_at_…` are of
    what reaches a single cut, whatever the model's own cuts are. Lesions are matched as
    `lesions.match_lesions` does, and found from LEAST_SHARE on.

    Args:
      truth: boolean. probability: in [0, 1], 0 outside the lungs.
      found: the mask that the model cuts, and its lungs.
      voxel_ml: a voxel's volume.
    """
    match = lesions.match_lesions(truth, found.mask)
    nodules = match.true_voxels * voxel_ml < NODULE_ML
    inside = truth[found.lungs], probability[found.lungs]
    return {
        'true_ml': float(np.count_nonzero(truth) * voxel_ml),
        'marked_ml': float(np.count_nonzero(found.mask) * voxel_ml),
        'dice': metrics.count_confusion(truth, found.mask).dice,
        **dict(zip(DICE_AT, _dice_at_cuts(truth, probability), strict=True)),
        'average_precision': probabilities.average_precision(truth, probability),
        'lesion_f1': match.f1_at(LEAST_SHARE),
        'nodules': int(np.count_nonzero(nodules)),
        'nodules_found': int(np.count_nonzero(nodules & match.found(LEAST_SHARE))),
        'ece': probabilities.expected_calibration_error(*inside),
    }


def _dice_at_cuts(truth: np.ndarray, probability: np.ndarray) -> list[float]:
    # Few voxels reach the lowest cut, and no other can count but those of the truth.
    counted = truth | (probability >= CUTS[0])
    truth, probability = truth[counted], probability[counted]
    return [metrics.count_confusion(truth, probability >= cut).dice for cut in CUTS]
