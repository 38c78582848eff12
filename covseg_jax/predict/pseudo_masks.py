"""Pseudo-masks as NIfTI on each study's own grid, and the training set with them as nnU-Net reads
it: for whoever wants to train something else on them."""

import functools
import json
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence

import nibabel
import numpy as np
from tqdm import tqdm

from covseg_jax import atomic, hosts, written
from covseg_jax.errors import FileFault, InputError
from covseg_jax.imaging.geometry import Geometry, to_study_grid
from covseg_jax.imaging.masks import MaskSettings, mask_on_study_grid
from covseg_jax.imaging.nifti import read_volume, write_volume
from covseg_jax.imaging.study import Study
from covseg_jax.imaging.volume import AFFINE_TOLERANCE, Volume
from covseg_jax.prepare import study_files
from covseg_jax.prepare.cases import Case, Splits

_DESCRIPTION = (
    'Chest CT in HU: {} studies of COVID-19 with pseudo-masks as labels, and {} healthy studies '
    'with empty labels. Not among them: studies kept for evaluation against human masks, and '
    'healthy studies held out for calibration.'
)
_PSEUDO_MASK = '{}_{}.nii.gz'  # study id, mask or probability
_NAME = 'CovidPseudoMasks'
_DATA_SET = f'Dataset501_{_NAME}'
_IMAGE, _LABEL, _DESCRIBED = 'imagesTr/{}_0000.nii.gz', 'labelsTr/{}.nii.gz', 'dataset.json'
_NOTE = (
    'The labels are pseudo-masks and no human masks; what is measured against them says nothing '
    'about human masks.'
)


def write_pseudo_masks(
    cases: Sequence[Case],
    read_pseudo_mask: Callable[[Case], np.ndarray],
    folder: pathlib.Path,
    settings: MaskSettings,
) -> None:
    """Brings pseudo-masks onto the studies' own grids: `<study_id>_mask.nii.gz` (uint8, 0 or 1) and
    `<study_id>_probability.nii.gz` (float32 in [0, 1], 0 outside the lungs), each with its study's
    shape and affine. A file that is there and the same is kept. Each of several hosts writes its
    share. `refuse_foreign_files` is to be called before.

    The mask is not the probability cut: it comes from a sharper resampling, and without small
    components. `read_pseudo_mask` takes a case and gives its (D, H, W) pseudo-mask in [0, 1].

    Raises:
      InputError: from `read_pseudo_mask`, where a case has none; another file, which this program
        did not write, is in the way.
    """
    atomic.remove_leftovers(folder)
    for case in tqdm(hosts.share(cases), desc='pseudo_masks', unit='study', disable=None):
        pseudo_mask = np.asarray(read_pseudo_mask(case), np.float32)
        found = mask_on_study_grid(pseudo_mask, np.asarray(case.lungs()), case.geometry, settings)
        probability = to_study_grid(pseudo_mask, case.geometry) * found.lungs
        for kind, array in (('mask', found.mask.astype(np.uint8)), ('probability', probability)):
            path = folder / _PSEUDO_MASK.format(case.study_id, kind)
            _write_where_new(path, array, case.geometry, folder)
    hosts.wait_for_all('pseudo-masks are written')


def write_nnunet_data_set(
    splits: Splits, studies: Mapping[str, Study], masks: pathlib.Path, folder: pathlib.Path
) -> pathlib.Path:
    """Writes what the networks learn from in nnU-Net v2's raw layout: the COVID studies of training
    and validation with their pseudo-masks, and the healthy ones of training with empty labels;
    dataset.json last. What is there and whole is kept. Each of several hosts writes its share.
    `refuse_foreign_files` is to be called before.

    An image is a copy of its source's file where other readers find the same in it as `read_image`
    does; else it is written anew, in HU.

    Args:
      splits: who serves what; `evaluation` and `healthy_calibration` are left out.
      studies: by study id.
      masks: the folder of `write_pseudo_masks`.
      folder: gets the data set's folder, with imagesTr/, labelsTr/ and dataset.json.

    Returns:
      The data set's folder.

    Raises:
      InputError: a study or its pseudo-mask is missing, an image cannot be read or is not the one
        that was prepared, the folder holds a case that is not of this training set, or another
        file, which this program did not write, is in the way.
    """
    covid = splits.train + splits.validation
    cases = covid + splits.healthy_train
    data_set = folder / _DATA_SET
    atomic.remove_leftovers(data_set)
    _refuse_other_cases(data_set, cases)
    # Not by category: a healthy study of a subject who fell ill has a pseudo-mask too.
    marked = {case.study_id for case in covid}
    for case in tqdm(hosts.share(cases), desc='nnunet', unit='study', disable=None):
        if case.study_id not in studies:
            raise InputError(f'{case.study_id}: no such study in the data set; prepare it again')
        path = data_set / _IMAGE.format(case.study_id)
        _write_image(path, case, studies[case.study_id], data_set)
        label = np.zeros(case.geometry.canonical_shape, np.uint8)
        if case.study_id in marked:
            label = read_volume(masks / f'{case.study_id}_mask.nii.gz').array
        path = data_set / _LABEL.format(case.study_id)
        _write_where_new(path, label, case.geometry, data_set)
    hosts.wait_for_all('images and labels are written')
    if hosts.is_first():
        _write_description(data_set / _DESCRIBED, len(covid), len(splits.healthy_train))
    return data_set


def refuse_foreign_files(
    cases: Sequence[Case], masks: pathlib.Path, splits: Splits, folder: pathlib.Path
) -> None:
    """To be called before any work: whether `write_pseudo_masks(cases, ..., masks, ...)` and
    `write_nnunet_data_set(splits, ..., folder, ...)` may write all that they would.

    Raises:
      InputError: something that this program did not write is in the way, or the data set holds a
        case that is not of this training set.
    """
    learned = splits.train + splits.validation + splits.healthy_train
    data_set = folder / _DATA_SET
    _refuse_other_cases(data_set, learned)
    kinds = ('mask', 'probability')
    files = [
        *(masks / _PSEUDO_MASK.format(case.study_id, kind) for case in cases for kind in kinds),
        *(data_set / form.format(c.study_id) for c in learned for form in (_IMAGE, _LABEL)),
        data_set / _DESCRIBED,
    ]
    hosts.check_shared(lambda path: written.refuse_foreign([path]), files)


def _write_description(path: pathlib.Path, num_covid: int, num_healthy: int) -> None:
    content = {
        'name': _NAME,
        'description': _DESCRIPTION.format(num_covid, num_healthy),
        'note': _NOTE,
        'channel_names': {'0': 'CT'},
        'labels': {'background': 0, 'lesion': 1},
        'numTraining': num_covid + num_healthy,
        'file_ending': '.nii.gz',
    }
    text = json.dumps(content, indent=2)
    if not path.exists() or path.read_text(encoding='utf-8') != text:
        written.write_text(path, text)


def _write_image(path: pathlib.Path, case: Case, study: Study, record: pathlib.Path) -> None:
    voxel_crc32 = case.description['voxel_crc32']
    there = _read_on_grid(path, case.geometry)
    if there is not None and study_files.voxel_crc32(there) == voxel_crc32:
        return
    volume = study_files.read_image(study)
    is_same_grid = np.allclose(volume.affine, case.geometry.affine, rtol=0, atol=AFFINE_TOLERANCE)
    if study_files.voxel_crc32(volume) != voxel_crc32 or not is_same_grid:
        raise FileFault(study.image, 'is not the image that was prepared', 'prepare it again')
    new_file = functools.partial(written.new_file, folder=record, is_scan=True)
    if _reads_alike(study, volume):
        with new_file(path) as temporary:
            shutil.copyfile(study.image, temporary)
    else:
        write_volume(path, volume.array, volume.affine, new_file)


def _reads_alike(study: Study, volume: Volume) -> bool:
    """Whether another reader finds the same HU on the same grid in the study's file."""
    if not study.image.name.lower().endswith('.nii.gz') or study.window is not None:
        return False
    # A note tells of header fields that disagree, and readers differ in which they believe; a
    # fourth axis of length 1 is an axis to nnU-Net.
    return not volume.notes and nibabel.load(study.image).shape == volume.as_stored.shape


def _read_on_grid(path: pathlib.Path, geometry: Geometry) -> Volume | None:
    """The volume of a file that is there, whole and on the study's grid."""
    try:
        volume = read_volume(path)
    except FileFault:
        return None
    is_near = np.allclose(volume.affine, geometry.affine, rtol=0, atol=AFFINE_TOLERANCE)
    return volume if volume.as_stored.shape == geometry.source_shape and is_near else None


def _write_where_new(
    path: pathlib.Path, array: np.ndarray, geometry: Geometry, record: pathlib.Path
) -> None:
    # Compared voxel by voxel: pseudo-masks may have been made anew since.
    there = _read_on_grid(path, geometry)
    if there is None or not np.array_equal(there.array, array):
        new_file = functools.partial(written.new_file, folder=record)
        write_volume(path, array, np.asarray(geometry.affine), new_file)


def _refuse_other_cases(data_set: pathlib.Path, cases: Sequence[Case]) -> None:
    """nnU-Net trains on whatever file it finds, such as a study that is kept for evaluation now."""
    for part, ending in (('imagesTr', '_0000.nii.gz'), ('labelsTr', '.nii.gz')):
        known = {case.study_id + ending for case in cases}
        for path in sorted((data_set / part).glob('*.nii.gz')):
            if path.name not in known and not path.name.startswith('.tmp-'):
                raise InputError(
                    f'{path}: not a case of this training set; remove {data_set} or give another '
                    '--output'
                )
