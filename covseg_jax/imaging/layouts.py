"""Data sets whose files lie in a layout of their own, as `studies` describes each: MosMedData,
Zenodo 3757476, COVID-19-20, nnU-Net's raw data and the published project's arrays."""

import csv
import pathlib
import re
from collections.abc import Iterator

from covseg_jax import written
from covseg_jax.archives import check_unpacked_size
from covseg_jax.errors import FileFault, InputError
from covseg_jax.imaging import arrays, formats
from covseg_jax.imaging.absent import is_dangling
from covseg_jax.imaging.study import (
    LESION_MASK,
    LUNG_MASK,
    OnStray,
    Study,
    find_image,
    ignore,
    images_in,
)

CATEGORIES = ('CT-0', 'CT-1', 'CT-2', 'CT-3', 'CT-4')
REGISTRIES = ('dataset_registry.xlsx', 'dataset_registry.csv')
MOSMED = 'MosMedData'
_MOST_REGISTRY_BYTES = 64 * 2**20  # of an unpacked workbook; a row takes about 200


def find_registry(folder: pathlib.Path) -> pathlib.Path | None:
    """The table of studies that MosMedData comes with, where the folder has it."""
    return next((folder / name for name in REGISTRIES if (folder / name).is_file()), None)


def mosmed_studies(folder: pathlib.Path, _: OnStray = ignore) -> Iterator[Study]:
    """Those of its registry; without one, those of its folders."""

    def find_mask(kind: str, study_id: str, ending: str) -> pathlib.Path | None:
        return find_image(folder / kind / f'{study_id}{ending}')

    registry = find_registry(folder)
    if registry is None:  # the user's own scans lie so, too
        data_set = folder.resolve().name
        for category in CATEGORIES:
            for image in images_in(folder / 'studies' / category):
                study_id = formats.strip_suffix(image)
                mask = find_mask('masks', study_id, LESION_MASK)
                lungs = find_mask('lung_masks', study_id, LUNG_MASK)
                yield Study(study_id, image, mask, lungs, category, data_set)
        return
    for row in _read_registry(registry):
        image = _resolve(folder, row['study_file'], registry)
        mask = _resolve(folder, row['mask_file'], registry) if row.get('mask_file') else None
        study_id = row.get('study_id') or formats.strip_suffix(image)
        lungs = find_mask('lung_masks', study_id, LUNG_MASK)
        category = row.get('category') or None
        if category not in (None, *CATEGORIES):
            raise InputError(
                f'{registry.name}: category {category!r} of {study_id}; one of '
                f'{", ".join(CATEGORIES)} is expected'
            )
        yield Study(study_id, image, mask, lungs, category, MOSMED)


def _read_registry(registry: pathlib.Path) -> list[dict[str, str]]:
    if registry.suffix == '.csv':
        # utf-8-sig drops the byte-order mark that some CSV files begin with.
        try:
            with registry.open(encoding='utf-8-sig', newline='') as file:
                rows = list(csv.reader(file))
        except (UnicodeError, csv.Error, OSError) as error:
            raise InputError(f'{registry}: not a CSV file in UTF-8; save it as one') from error
    else:
        import openpyxl  # here: it takes a while, and other layouts have no workbook

        try:
            check_unpacked_size(registry, _MOST_REGISTRY_BYTES)
            book = openpyxl.load_workbook(registry, read_only=True, data_only=True)
            rows = list(book.worksheets[0].iter_rows(values_only=True))
            book.close()
        except FileFault:
            raise
        except Exception as error:  # openpyxl raises many kinds on a damaged workbook
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
    if (path.is_file() or is_dangling(path)) and not is_output:
        return path
    # A Kaggle copy holds .nii where the registry says .nii.gz.
    other = find_image(path.with_name(formats.strip_suffix(path)))
    if is_output and other is None:
        raise InputError(
            f'{path}: {registry.name} names it, but this program wrote it; move it elsewhere, and '
            "put the data set's own file there"
        )
    return other or path


# The data set's page says that the ten cases from Radiopaedia were windowed to [-1250, 250] HU and
# stored as 0 to 255 (doi:10.5281/zenodo.3757476).
_ZENODO_WINDOW = (0.0, 255.0, -1250.0, 250.0)


def zenodo_studies(folder: pathlib.Path, _: OnStray = ignore) -> Iterator[Study]:
    """Ten of the twenty are windowed."""
    images = folder / 'COVID-19-CT-Seg_20cases'
    for image in images_in(images if images.is_dir() else folder):
        name = formats.strip_suffix(image)
        mask, lungs = (find_image(folder / part / name) for part in ('Infection_Mask', 'Lung_Mask'))
        window = _ZENODO_WINDOW if name.startswith('radiopaedia') else None
        yield Study(name, image, mask, lungs, None, 'Zenodo 3757476', window=window)


def covid19_20_studies(folder: pathlib.Path, _: OnStray = ignore) -> Iterator[Study]:
    """By the names of its files."""
    for part in ('', 'Train', 'Validation', 'Test'):
        for image in images_in(folder / part):
            name = formats.strip_suffix(image)
            if re.fullmatch(r'volume-covid19-.*_ct', name):
                study_id = name.removesuffix('_ct')
                mask = find_image(image.with_name(f'{study_id}_seg'))
                yield Study(study_id, image, mask, None, None, 'COVID-19-20')


def nnunet_studies(folder: pathlib.Path, _: OnStray = ignore) -> Iterator[Study]:
    """Cases of one channel."""
    for part in ('Tr', 'Ts'):
        for image in images_in(folder / f'images{part}'):
            name = formats.strip_suffix(image)
            # _0000 is the first channel of a case, and CT has no other.
            if name.endswith('_0000'):
                study_id = name.removesuffix('_0000')
                mask = find_image(folder / f'labels{part}' / study_id)
                yield Study(study_id, image, mask, None, None, folder.resolve().name)


def arrays_studies(folder: pathlib.Path, _: OnStray = ignore) -> Iterator[Study]:
    """One a row of the published project's arrays."""
    image, lungs, lesion = (folder / n for n in (arrays.IMAGES, arrays.LUNGS, arrays.LESIONS))
    paths = [image, lungs, *([lesion] if lesion.is_file() else [])]
    images, *masks = map(arrays.open_array, paths)
    for path, mask in zip(paths[1:], masks, strict=True):
        if mask.shape != images.shape:
            raise FileFault(
                path,
                f'shape {mask.shape}, but {image.name} has {images.shape}',
                'give the arrays of one data set',
            )
    for index in range(len(images)):
        # A study that nobody marked is all 0 there: it has no mask, rather than no lesion.
        is_marked = any(mask[index].any() for mask in masks[1:])
        yield Study(
            study_id=f'case_{index:04d}',
            image=image,
            lesion_mask=lesion if is_marked else None,
            lung_mask=lungs,
            category=None,
            data_set=folder.resolve().name,
            index=index,
            window=(0.0, 1.0, *arrays.WINDOW_HU),
        )
