"""Find and describe the studies in a data set folder.

Two layouts. MosMedData COVID19_1110: `dataset_registry.xlsx` (or .csv), or only its folders
`studies/CT-*/` and `masks/`. Else a plain folder of NIfTI files. Beside an image `NAME.nii.gz`
of a plain folder, `NAME_mask.nii.gz` is its lesion mask and `NAME_lungs.nii.gz` its lung mask;
in the MosMed layout lung masks are `lung_masks/study_NNNN_lungs.nii.gz`.
"""

import csv
import os
import pathlib
import re
import zipfile
from collections import Counter
from dataclasses import dataclass

import openpyxl
from openpyxl.utils.exceptions import InvalidFileException

from covseg_jax.errors import InputError
from covseg_jax.imaging import nifti

CATEGORIES = ('CT-0', 'CT-1', 'CT-2', 'CT-3', 'CT-4')
REGISTRIES = ('dataset_registry.xlsx', 'dataset_registry.csv')
MOSMED = 'MosMedData'
_LESION_MASK, _LUNG_MASK = '_mask', '_lungs'


@dataclass(frozen=True)
class Study:
    """One CT study and what is known of it.

    Attributes:
        study_id: unique in its data set, usable as a folder's name.
        image: the NIfTI file.
        lesion_mask: the human (or phantom) mask, for evaluation only, or None.
        lung_mask: lungs drawn or computed elsewhere, or None.
        category: 'CT-0' (healthy) to 'CT-4', or None where nobody says.
        data_set: 'MosMedData' or the folder's name.
    """

    study_id: str
    image: pathlib.Path
    lesion_mask: pathlib.Path | None
    lung_mask: pathlib.Path | None
    category: str | None
    data_set: str


def find_studies(folder: str | os.PathLike) -> tuple[Study, ...]:
    """All studies of a data set folder, sorted by study id.

    Args:
        folder: MosMedData's root or a plain folder of .nii and .nii.gz files (not searched
            deeper).

    Raises:
        InputError: the folder is missing or holds no study, its registry cannot be understood,
            names files that are not there or lie outside the folder, or two studies share an id.
    """
    folder = pathlib.Path(folder)
    if not folder.exists():
        raise InputError(f'{folder}: no such folder; check the path')
    if not folder.is_dir():
        raise InputError(f'{folder}: not a folder; name the folder that holds the studies')
    registries = [folder / name for name in REGISTRIES if (folder / name).is_file()]
    if registries:
        studies = _registered_studies(folder, registries[0])
    elif (folder / 'studies').is_dir():
        studies = _mosmed_studies(folder)
    else:
        studies = _plain_studies(folder)
    if not studies:
        raise InputError(
            f'{folder}: no studies; it should hold .nii or .nii.gz files, '
            'or dataset_registry.xlsx and studies/'
        )
    repeated = [name for name, number in Counter(s.study_id for s in studies).items() if number > 1]
    if repeated:
        raise InputError(f'{folder}: study {min(repeated)} is there twice; remove one of the two')
    return tuple(sorted(studies, key=lambda study: study.study_id))


def find_inputs(path: str | os.PathLike) -> tuple[Study, ...]:
    """The studies to predict: one NIfTI file, or all of a folder as `find_studies` sees it.

    Raises:
        InputError: the path is missing, or neither a NIfTI file nor a folder with studies.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        return find_studies(path)
    if not nifti.is_nifti(path):
        raise InputError(f'{path}: not a .nii or .nii.gz file; convert it to NIfTI')
    return (_plain_study(path, path.parent),)


def _registered_studies(folder: pathlib.Path, registry: pathlib.Path) -> list[Study]:
    studies, missing = [], []
    for row in _read_registry(registry):
        image = _resolve(folder, row['study_file'], registry)
        mask = _resolve(folder, row['mask_file'], registry) if row.get('mask_file') else None
        missing += [path for path in (image, mask) if path is not None and not path.is_file()]
        study_id = row.get('study_id') or nifti.strip_suffix(image)
        if not re.fullmatch(r'\w[\w. +-]*', study_id):
            raise InputError(f'{registry.name}: study id {study_id!r} cannot name a folder')
        category = row.get('category') or None
        if category not in (None, *CATEGORIES):
            raise InputError(
                f'{registry.name}: category {category!r} of {study_id}; one of '
                f'{", ".join(CATEGORIES)} is expected'
            )
        lungs = _existing(folder / 'lung_masks' / f'{study_id}{_LUNG_MASK}')
        studies.append(Study(study_id, image, mask, lungs, category, MOSMED))
    if missing:
        raise InputError(
            f'{missing[0]}: named in {registry.name} but not there ({len(missing)} such files in '
            'all); finish the download or remove the rows'
        )
    return studies


def _read_registry(registry: pathlib.Path) -> list[dict[str, str]]:
    if registry.suffix == '.csv':
        # utf-8-sig drops the byte-order mark that a CSV form of the registry carries.
        with registry.open(encoding='utf-8-sig', newline='') as file:
            rows = list(csv.reader(file))
    else:
        try:
            book = openpyxl.load_workbook(registry, read_only=True, data_only=True)
            rows = list(book.worksheets[0].iter_rows(values_only=True))
            book.close()
        except (InvalidFileException, zipfile.BadZipFile, KeyError, OSError) as error:
            raise InputError(f'{registry}: not a readable workbook; download it again') from error
    cells = [['' if cell is None else str(cell).strip() for cell in row] for row in rows]
    columns = [name.lower() for name in cells[0]] if cells else []
    columns = ['study_id' if name == 'id' else name for name in columns]
    if 'study_file' not in columns:
        raise InputError(
            f'{registry}: no column study_file (columns: {", ".join(columns) or "none"}); '
            'study_id, category, study_file and mask_file are expected'
        )
    named = [dict(zip(columns, row, strict=False)) for row in cells[1:] if any(row)]
    return [row for row in named if row.get('study_file')]


def _resolve(folder: pathlib.Path, written: str, registry: pathlib.Path) -> pathlib.Path:
    # MosMed writes '/studies/CT-0/study_0001.nii.gz' for a path inside the data set.
    parts = [part for part in written.replace('\\', '/').split('/') if part not in ('', '.')]
    if '..' in parts or any(':' in part for part in parts):
        raise InputError(f'{registry.name}: path {written} leaves the data set; correct the row')
    path = folder.joinpath(*parts)
    if path.is_file():
        return path
    # A Kaggle copy holds .nii where the registry says .nii.gz.
    return _existing(path.with_name(nifti.strip_suffix(path))) or path


def _mosmed_studies(folder: pathlib.Path) -> list[Study]:
    studies = []
    for image in sorted((folder / 'studies').glob('CT-*/*')):
        category = image.parent.name
        if nifti.is_nifti(image) and image.is_file() and category in CATEGORIES:
            study_id = nifti.strip_suffix(image)
            mask = _existing(folder / 'masks' / f'{study_id}{_LESION_MASK}')
            lungs = _existing(folder / 'lung_masks' / f'{study_id}{_LUNG_MASK}')
            studies.append(Study(study_id, image, mask, lungs, category, MOSMED))
    return studies


def _plain_studies(folder: pathlib.Path) -> list[Study]:
    images = [
        path
        for path in sorted(folder.iterdir())
        if nifti.is_nifti(path)
        and path.is_file()
        and not path.name.startswith('.')
        and not nifti.strip_suffix(path).endswith((_LESION_MASK, _LUNG_MASK))
    ]
    return [_plain_study(image, folder) for image in images]


def _plain_study(image: pathlib.Path, folder: pathlib.Path) -> Study:
    study_id = nifti.strip_suffix(image)
    return Study(
        study_id=study_id,
        image=image,
        lesion_mask=_existing(image.with_name(study_id + _LESION_MASK)),
        lung_mask=_existing(image.with_name(study_id + _LUNG_MASK)),
        category=None,
        data_set=folder.resolve().name,
    )


def _existing(stem: pathlib.Path) -> pathlib.Path | None:
    candidates = [stem.with_name(stem.name + suffix) for suffix in ('.nii.gz', '.nii')]
    return next((path for path in candidates if path.is_file()), None)
