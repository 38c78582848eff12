"""Scores a folder of masks, whatever made them, against a folder of true ones."""

import pathlib
import re
from collections.abc import Sequence, Set

import numpy as np
from tqdm import tqdm

from covseg_jax import hosts, written
from covseg_jax.errors import FileFault, InputError
from covseg_jax.evaluation import scores
from covseg_jax.evaluation.metric_table import CaseArrays
from covseg_jax.imaging import formats, nifti
from covseg_jax.imaging.volume import Volume
from covseg_jax.prepare.cases import name_subject
from covseg_jax.prepare.study_files import ROUNDED_LABEL

FILES = ('cases.csv', 'slices.csv', 'summary.json')
# study_0001_mask.nii.gz, study_0001_0000.nii.gz and study_0001.nii.gz are one study.
_ENDINGS = re.compile(r'(_mask|_seg)$')
_CHANNEL = '_0000'  # of nnU-Net's names; case_0000 may be a study's own
_HIGHEST_LABEL = 255
_NO_MASK = re.compile(r'_(probability|disagreement|lungs)$')


def pair_masks(
    predictions: pathlib.Path, references: pathlib.Path
) -> tuple[list[tuple[str, pathlib.Path, pathlib.Path]], list[str]]:
    """(study id, predicted mask, true mask) of each study that is in both folders, by id, and the
    ids that are in one folder alone. A mask that this program wrote is never a true mask.

    Raises:
      InputError: a folder is not there, has two masks of one study, or they share none.
    """
    predicted = _masks_by_study(predictions, are_true=False)
    true = _masks_by_study(references, are_true=True)
    both = predicted.keys() & true.keys()
    predicted, true = (_without_channel(each, both) for each in (predicted, true))
    shared = sorted(predicted.keys() & true.keys())
    if not shared:
        raise InputError(
            f'{predictions} and {references} have no study in common; files are paired by name: '
            'study_0001_mask.nii.gz, study_0001_0000.nii.gz and study_0001.nii.gz are one study; '
            'a mask that this program wrote is never a true mask'
        )
    alone = sorted(predicted.keys() ^ true.keys())
    return [(name, predicted[name], true[name]) for name in shared], alone


def _masks_by_study(folder: pathlib.Path, *, are_true: bool) -> dict[str, pathlib.Path]:
    if not folder.is_dir():
        raise InputError(f'{folder}: no such folder of NIfTI masks')
    found: dict[str, pathlib.Path] = {}
    for path in sorted(filter(formats.is_nifti, folder.iterdir())):
        name = formats.strip_suffix(path)
        if _NO_MASK.search(name) or (are_true and written.is_output(path)):
            continue
        study_id = _ENDINGS.sub('', name)
        if study_id in found:
            raise InputError(
                f'{folder}: {found[study_id].name} and {path.name} are both masks of '
                f'{study_id}; leave one'
            )
        found[study_id] = path
    return found


def _without_channel(masks: dict[str, pathlib.Path], paired: Set[str]) -> dict[str, pathlib.Path]:
    """With the names that are not paired as they are without nnU-Net's channel, unless another
    mask has that name."""
    return {
        name
        if name in paired or name.removesuffix(_CHANNEL) in masks
        else name.removesuffix(_CHANNEL): path
        for name, path in masks.items()
    }


def score_folder(
    pairs: Sequence[tuple[str, pathlib.Path, pathlib.Path]],
    folder: pathlib.Path,
    subject_pattern: str = '(.*)',
) -> dict:
    """Scores the pairs in the protocols that need no probabilities, and writes FILES into `folder`.

    Any label above 0 is lesion. Lungs are those of `<study id>_lungs.nii.gz` beside the true mask;
    where there are none, what refers to them is undefined. `subject_pattern` is as
    `cases.name_subject` takes it.

    Returns:
      The content of summary.json.

    Raises:
      FileFault: a file cannot be read or is no mask, or the two of a study lie on different grids.
      InputError: `folder` holds one of FILES that this program did not write, or the pattern names
        no subject in a study's id.
    """
    subjects = {study_id: name_subject(study_id, subject_pattern) for study_id, _, _ in pairs}
    case_rows, slice_rows = [], []
    progress = tqdm(pairs, desc='evaluate', unit='study', disable=None)
    for study_id, predicted_path, true_path in progress:
        truth = _read_mask(true_path)
        prediction = _read_on_grid(predicted_path, truth, true_path)
        lungs = np.zeros(truth.array.shape, bool)
        lungs_path = true_path.with_name(f'{study_id}_lungs.nii.gz')
        if lungs_path.exists():
            lungs = _read_on_grid(lungs_path, truth, true_path).array > ROUNDED_LABEL
        arrays = CaseArrays(
            study_id=study_id,
            category=None,
            truth=truth.array > ROUNDED_LABEL,
            prediction=prediction.array > ROUNDED_LABEL,
            lungs=lungs,
            spacing_mm=truth.spacing_mm,
            voxel_ml=truth.voxel_ml,
            subject=subjects[study_id],
        )
        row, rows = scores.score_case(arrays)
        case_rows.append(row)
        slice_rows += rows
    summary = scores.make_summary(case_rows, slice_rows)
    if hosts.is_first():
        with written.new_files(folder) as temporary:
            scores.write_tables(temporary, case_rows, slice_rows)
            scores.write_summary(temporary, summary)
    return summary


def _read_mask(path: pathlib.Path) -> Volume:
    volume = nifti.read_volume(path)
    low, high = float(volume.array.min()), float(volume.array.max())
    if low < -ROUNDED_LABEL or high > _HIGHEST_LABEL:
        raise FileFault(
            path,
            f'holds values from {low:.3g} to {high:.3g}: a scan, not a mask of labels',
            'give masks, in a folder of their own',
        )
    return volume


def _read_on_grid(path: pathlib.Path, other: Volume, other_path: pathlib.Path) -> Volume:
    volume = _read_mask(path)
    if not volume.lies_on_grid_of(other):
        shape, other_shape = volume.as_stored.shape, other.as_stored.shape
        apart = f'{shape} voxels and {other_shape}'
        if shape == other_shape:
            apart = f'voxels lie up to {volume.distance_mm(other):.3g} mm apart'
        raise FileFault(
            path,
            f'lies on another grid than {other_path.name} ({apart})',
            "write the mask on the study's own grid",
        )
    return volume
