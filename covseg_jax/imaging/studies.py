"""Find and describe the studies in a data set folder.

Layouts, found by their files or named:
  mosmed   MosMedData COVID19_1110: `dataset_registry.xlsx` (or .csv), or only its folders
           `studies/CT-*/` and `masks/`; lung masks `lung_masks/study_NNNN_lungs.nii.gz`. Any data
           set with a registry of these columns.
  zenodo   Zenodo 3757476: `COVID-19-CT-Seg_20cases/`, `Infection_Mask/`, `Lung_Mask/`.
  covid19_20  the COVID-19-20 challenge: `volume-covid19-A-NNNN_ct.nii.gz`, `..._seg.nii.gz`.
  nnunet   nnU-Net's raw data: `imagesTr/CASE_0000.nii.gz`, `labelsTr/CASE.nii.gz`, `imagesTs/`.
  arrays   `LungImages.npy`, `LungMask.npy`, `InfectionMasks.npy` of the published project.
  plain    NIfTI files, and folders with one DICOM series each. Beside an image `NAME.nii.gz`,
           `NAME_mask.nii.gz` is its lesion mask and `NAME_lungs.nii.gz` its lung mask.

What this program wrote (written.py) is in none of them, wherever it lies: a prediction beside the
scans is no scan, and one among human masks is no human mask.
"""

import csv
import os
import pathlib
import re
from collections import Counter
from dataclasses import dataclass

import openpyxl

from covseg_jax import written
from covseg_jax.archives import check_unpacked_size
from covseg_jax.errors import FileFault, InputError
from covseg_jax.imaging import arrays, dicom, nifti

CATEGORIES = ('CT-0', 'CT-1', 'CT-2', 'CT-3', 'CT-4')
REGISTRIES = ('dataset_registry.xlsx', 'dataset_registry.csv')
MOSMED = 'MosMedData'
_LESION_MASK, _LUNG_MASK = '_mask', '_lungs'
_MOST_REGISTRY_BYTES = 64 * 2**20  # of a workbook, unpacked: a row takes about 200
_STUDY_ID = re.compile(r'\w[\w. +-]*')


@dataclass(frozen=True)
class Study:
    """One CT study and what is known of it.

    Attributes:
        study_id: unique in its data set, usable as a folder's name.
        image: the NIfTI file, the folder of the DICOM series, or the .npy file.
        lesion_mask: the human (or phantom) mask, or None; for evaluation, and for training
            where train.targets says so.
        lung_mask: lungs drawn or computed elsewhere, or None.
        category: 'CT-0' (healthy) to 'CT-4', or None where nobody says.
        data_set: 'MosMedData' or the folder's name.
        index: the study's place in its .npy files; None for all others.
        window: (least stored value, greatest, HU of the first, HU of the second) where the data
            set is known to hold windowed images instead of HU.
    """

    study_id: str
    image: pathlib.Path
    lesion_mask: pathlib.Path | None
    lung_mask: pathlib.Path | None
    category: str | None
    data_set: str
    index: int | None = None
    window: tuple[float, float, float, float] | None = None


def find_studies(folder: str | os.PathLike, layout: str = 'auto') -> tuple[Study, ...]:
    """All studies of a data set folder, sorted by study id. No image is opened: a file that a
    registry names and that is not there is found when it is read.

    Args:
        folder: the data set's root.
        layout: one of LAYOUTS, or 'auto': the first of them whose files are there.

    Raises:
        InputError: the folder is missing or holds no study of the layout, its registry cannot be
            understood or names files outside the folder, or two studies share an id.
    """
    if layout not in ('auto', *LAYOUTS):
        raise InputError(f'data.layout {layout!r}: one of auto, {", ".join(LAYOUTS)} is expected')
    folder = pathlib.Path(folder)
    if not folder.exists():
        raise InputError(f'{folder}: no such folder; check the path')
    if not folder.is_dir():
        raise InputError(f'{folder}: not a folder; name the folder that holds the studies')
    if layout == 'auto':
        layout = next(name for name, (is_there, _) in LAYOUTS.items() if is_there(folder))
    studies = LAYOUTS[layout][1](folder)
    if not studies:
        raise InputError(
            f'{folder}: no studies; it should hold .nii or .nii.gz files, DICOM series in folders, '
            f'or a data set in one of the layouts {", ".join(LAYOUTS)}; what this program wrote '
            'does not count'
        )
    unusable = [s.study_id for s in studies if not _STUDY_ID.fullmatch(s.study_id)]
    if unusable:
        raise InputError(
            f'{folder}: study id {min(unusable)!r} cannot name a folder; rename its file or folder'
        )
    repeated = [name for name, number in Counter(s.study_id for s in studies).items() if number > 1]
    if repeated:
        raise InputError(f'{folder}: study {min(repeated)} occurs twice; remove one of the two')
    return tuple(sorted(studies, key=lambda study: study.study_id))


def find_inputs(path: str | os.PathLike, layout: str = 'auto') -> tuple[Study, ...]:
    """The studies to predict or verify: one NIfTI file, one DICOM series, or all of a folder as
    `find_studies` sees it.

    Raises:
        InputError: the path is missing, or neither a NIfTI file nor a folder with studies.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        return find_studies(path, layout)
    if not nifti.is_nifti(path):
        raise InputError(
            f'{path}: not a .nii or .nii.gz file; convert it to NIfTI, or name the folder of a '
            'DICOM series'
        )
    return (_plain_study(path, path.parent),)


def _find_registry(folder: pathlib.Path) -> pathlib.Path | None:
    return next((folder / name for name in REGISTRIES if (folder / name).is_file()), None)


def _is_mosmed(folder: pathlib.Path) -> bool:
    return _find_registry(folder) is not None or (folder / 'studies').is_dir()


def _mosmed_studies(folder: pathlib.Path) -> list[Study]:
    registry = _find_registry(folder)
    return _foldered_studies(folder) if registry is None else _registered_studies(folder, registry)


def _registered_studies(folder: pathlib.Path, registry: pathlib.Path) -> list[Study]:
    studies = []
    for row in _read_registry(registry):
        image = _resolve(folder, row['study_file'], registry)
        mask = _resolve(folder, row['mask_file'], registry) if row.get('mask_file') else None
        study_id = row.get('study_id') or nifti.strip_suffix(image)
        category = row.get('category') or None
        if category not in (None, *CATEGORIES):
            raise InputError(
                f'{registry.name}: category {category!r} of {study_id}; one of '
                f'{", ".join(CATEGORIES)} is expected'
            )
        lungs = _existing(folder / 'lung_masks' / f'{study_id}{_LUNG_MASK}')
        studies.append(Study(study_id, image, mask, lungs, category, MOSMED))
    return studies


def _read_registry(registry: pathlib.Path) -> list[dict[str, str]]:
    if registry.suffix == '.csv':
        # utf-8-sig drops the byte-order mark that a CSV form of the registry carries.
        try:
            with registry.open(encoding='utf-8-sig', newline='') as file:
                rows = list(csv.reader(file))
        except (UnicodeError, csv.Error, OSError) as error:
            raise InputError(f'{registry}: not a CSV file in UTF-8; save it as one') from error
    else:
        try:
            check_unpacked_size(registry, _MOST_REGISTRY_BYTES)
            book = openpyxl.load_workbook(registry, read_only=True, data_only=True)
            rows = list(book.worksheets[0].iter_rows(values_only=True))
            book.close()
        except FileFault:
            raise
        except Exception as error:  # a damaged workbook breaks openpyxl wherever it is damaged
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


def _resolve(folder: pathlib.Path, name: str, registry: pathlib.Path) -> pathlib.Path:
    # MosMed writes '/studies/CT-0/study_0001.nii.gz' for a path inside the data set.
    parts = [part for part in name.replace('\\', '/').split('/') if part not in ('', '.')]
    if '..' in parts or any(':' in part or '\0' in part or len(part) > 200 for part in parts):
        raise InputError(f'{registry.name}: path {name} leaves the data set; correct the row')
    path = folder.joinpath(*parts)
    is_output = written.is_output(path)
    if path.is_file() and not is_output:
        return path
    # A Kaggle copy holds .nii where the registry says .nii.gz.
    other = _existing(path.with_name(nifti.strip_suffix(path)))
    if is_output and other is None:
        raise InputError(
            f'{path}: {registry.name} names it, but this program wrote it; move it elsewhere, and '
            "put the data set's own file there"
        )
    return other or path


def _foldered_studies(folder: pathlib.Path) -> list[Study]:
    studies = []
    for image in sorted((folder / 'studies').glob('CT-*/*')):
        category = image.parent.name
        if category in CATEGORIES and _is_image(image):
            study_id = nifti.strip_suffix(image)
            mask = _existing(folder / 'masks' / f'{study_id}{_LESION_MASK}')
            lungs = _existing(folder / 'lung_masks' / f'{study_id}{_LUNG_MASK}')
            studies.append(Study(study_id, image, mask, lungs, category, MOSMED))
    return studies


_ZENODO_IMAGES = 'COVID-19-CT-Seg_20cases'
# Its page says of the ten cases from Radiopaedia: windowed to [-1250, 250] HU and stored as 0 to
# 255 (doi:10.5281/zenodo.3757476).
_ZENODO_WINDOWED = 'radiopaedia'
_ZENODO_WINDOW = (0.0, 255.0, -1250.0, 250.0)


def _is_zenodo(folder: pathlib.Path) -> bool:
    return (folder / 'Infection_Mask').is_dir() and (folder / 'Lung_Mask').is_dir()


def _zenodo_studies(folder: pathlib.Path) -> list[Study]:
    images = folder / _ZENODO_IMAGES
    studies = []
    for image in _images(images if images.is_dir() else folder):
        name = nifti.strip_suffix(image)
        windowed = name.startswith(_ZENODO_WINDOWED)
        studies.append(
            Study(
                study_id=name,
                image=image,
                lesion_mask=_existing(folder / 'Infection_Mask' / name),
                lung_mask=_existing(folder / 'Lung_Mask' / name),
                category=None,
                data_set='Zenodo 3757476',
                window=_ZENODO_WINDOW if windowed else None,
            )
        )
    return studies


def _covid19_20_images(folder: pathlib.Path) -> list[pathlib.Path]:
    folders = [folder, *(folder / name for name in ('Train', 'Validation', 'Test'))]
    return [
        image
        for place in folders
        if place.is_dir()
        for image in _images(place)
        if re.fullmatch(r'volume-covid19-.*_ct', nifti.strip_suffix(image))
    ]


def _covid19_20_studies(folder: pathlib.Path) -> list[Study]:
    studies = []
    for image in _covid19_20_images(folder):
        study_id = nifti.strip_suffix(image).removesuffix('_ct')
        mask = _existing(image.with_name(study_id + '_seg'))
        studies.append(Study(study_id, image, mask, None, None, 'COVID-19-20'))
    return studies


def _is_nnunet(folder: pathlib.Path) -> bool:
    return (folder / 'imagesTr').is_dir() or (folder / 'imagesTs').is_dir()


def _nnunet_studies(folder: pathlib.Path) -> list[Study]:
    studies = []
    for part in ('Tr', 'Ts'):
        if not (folder / f'images{part}').is_dir():
            continue
        for image in _images(folder / f'images{part}'):
            name = nifti.strip_suffix(image)
            # _0000 is the first channel of a case, and CT has no other.
            if name.endswith('_0000'):
                study_id = name.removesuffix('_0000')
                mask = _existing(folder / f'labels{part}' / study_id)
                studies.append(Study(study_id, image, mask, None, None, folder.resolve().name))
    return studies


def _is_arrays(folder: pathlib.Path) -> bool:
    return (folder / arrays.IMAGES).is_file()


def _arrays_studies(folder: pathlib.Path) -> list[Study]:
    paths = [folder / name for name in (arrays.IMAGES, arrays.LUNGS, arrays.LESIONS)]
    images, *masks = (arrays.open_array(p) if p.is_file() or i < 2 else None
                      for i, p in enumerate(paths))  # fmt: skip
    for path, mask in zip(paths[1:], masks, strict=True):
        if mask is not None and mask.shape != images.shape:
            raise FileFault(
                path,
                f'shape {mask.shape}, but {arrays.IMAGES} has {images.shape}',
                'give the arrays of one data set',
            )
    # A study that nobody marked is all 0 there: it has no mask, rather than no lesion.
    marked = [masks[1] is not None and bool(masks[1][i].any()) for i in range(len(images))]
    return [
        Study(
            study_id=f'case_{index:04d}',
            image=paths[0],
            lesion_mask=paths[2] if marked[index] else None,
            lung_mask=paths[1],
            category=None,
            data_set=folder.resolve().name,
            index=index,
            window=(0.0, 1.0, *arrays.WINDOW_HU),
        )
        for index in range(len(images))
    ]


def _images(folder: pathlib.Path) -> list[pathlib.Path]:
    return [path for path in sorted(folder.iterdir()) if _is_image(path)]


def _is_image(path: pathlib.Path) -> bool:
    hidden = path.name.startswith('.')  # macOS leaves ._study_0001.nii.gz
    is_there = nifti.is_nifti(path) and path.is_file() and not hidden
    return is_there and not written.is_output(path)


def _plain_studies(folder: pathlib.Path) -> list[Study]:
    masks = (_LESION_MASK, _LUNG_MASK)
    images = [path for path in _images(folder) if not nifti.strip_suffix(path).endswith(masks)]
    series = [
        path
        for path in sorted(folder.iterdir())
        if path.is_dir() and not path.name.startswith('.') and dicom.is_series(path)
    ]
    if dicom.is_series(folder):
        series.append(folder)
    return [*(_plain_study(image, folder) for image in images), *map(_series_study, series)]


def _series_study(series: pathlib.Path) -> Study:
    series = series.resolve()  # '..' names no study
    return Study(
        study_id=series.name,
        image=series,
        lesion_mask=_existing(series.with_name(series.name + _LESION_MASK)),
        lung_mask=_existing(series.with_name(series.name + _LUNG_MASK)),
        category=None,
        data_set=series.parent.name,
    )


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
    return next((p for p in candidates if p.is_file() and not written.is_output(p)), None)


LAYOUTS = {
    'mosmed': (_is_mosmed, _mosmed_studies),
    'arrays': (_is_arrays, _arrays_studies),
    'zenodo': (_is_zenodo, _zenodo_studies),
    'nnunet': (_is_nnunet, _nnunet_studies),
    'covid19_20': (lambda folder: bool(_covid19_20_images(folder)), _covid19_20_studies),
    'plain': (lambda folder: True, _plain_studies),
}
