"""The studies in a data set folder.

Its layout is named, or found by its files:
  mosmed   MosMedData COVID19_1110: `dataset_registry.xlsx` (or .csv), or only its folders
           `studies/CT-*/` and `masks/`; lung masks `lung_masks/study_NNNN_lungs.nii.gz`. Other
           data sets with such a registry too.
  zenodo   Zenodo 3757476: `COVID-19-CT-Seg_20cases/`, `Infection_Mask/`, `Lung_Mask/`.
  covid19_20  the COVID-19-20 challenge: `volume-covid19-A-NNNN_ct.nii.gz`, `..._seg.nii.gz`.
  nnunet   nnU-Net's raw data: `imagesTr/CASE_0000.nii.gz`, `labelsTr/CASE.nii.gz`, `imagesTs/`.
  arrays   `LungImages.npy`, `LungMask.npy`, `InfectionMasks.npy` of the published project.
  plain    NIfTI files, and DICOM series in it or in folders of any depth; where there is neither,
           NIfTI files in folders of any depth. Beside an image
           `NAME.nii.gz`, `NAME_mask.nii.gz` is its lesion mask and `NAME_lungs.nii.gz` its lung
           mask. A series in `PATIENT/STUDY/SERIES` is the study `PATIENT_STUDY_SERIES`, and one of
           several in a folder has its number too: `FOLDER_series3`.

What this program wrote (written.py) is never taken for a scan or a human mask, wherever it lies.
What is no study, such as a mask without its scan, is told to `on_stray`, and never passed over in
silence.
"""

import csv
import dataclasses
import os
import pathlib
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from covseg_jax import written
from covseg_jax.archives import check_unpacked_size
from covseg_jax.errors import FileFault, InputError
from covseg_jax.imaging import arrays, dicom_files, formats
from covseg_jax.imaging.absent import find_absence, is_dangling

CATEGORIES = ('CT-0', 'CT-1', 'CT-2', 'CT-3', 'CT-4')
REGISTRIES = ('dataset_registry.xlsx', 'dataset_registry.csv')
MOSMED = 'MosMedData'
_LESION_MASK, _LUNG_MASK = '_mask', '_lungs'
_MOST_REGISTRY_BYTES = 64 * 2**20  # of an unpacked workbook; a row takes about 200
# A study's id names files and folders, on every system.
_NOT_IN_NAMES = re.compile(r'[\x00-\x1f\x7f/\\:*?"<>|]|^\.+|^$')
_LONGEST_ID = 200  # bytes: a file's name has 255, and endings such as _probability.nii.gz follow
OnStray = Callable[[FileFault], None]


@dataclass(frozen=True)
class Study:
    """One CT study and what is known of it.

    Attributes:
        study_id: unique in its data set, usable as a folder's name.
        image: the NIfTI file, the folder of the DICOM series, or the .npy file.
        lesion_mask: the human (or phantom) mask, or None.
        lung_mask: lungs drawn or computed elsewhere, or None.
        category: 'CT-0' (healthy) to 'CT-4', or None if unknown.
        data_set: 'MosMedData' where its registry is there, else the folder's name.
        index: the study's place in its .npy files; None for all others.
        window: (least stored value, greatest, HU of the first, HU of the second) where the data
            set is known to hold windowed images instead of HU.
        files: of a DICOM series that is one of several in its folder, its files; None of others.
    """

    study_id: str
    image: pathlib.Path
    lesion_mask: pathlib.Path | None
    lung_mask: pathlib.Path | None
    category: str | None
    data_set: str
    index: int | None = None
    window: tuple[float, float, float, float] | None = None
    files: tuple[pathlib.Path, ...] | None = None


def ignore(_: FileFault) -> None:
    """For `on_stray` where somebody else has been told."""


def find_studies(
    folder: str | os.PathLike, layout: str = 'auto', on_stray: OnStray = ignore
) -> tuple[Study, ...]:
    """All studies of a data set folder, sorted by study id. No image is opened: that a file of the
    registry is missing shows when it is read.

    Args:
        folder: the data set's root.
        layout: one of LAYOUTS, or 'auto': the first of them whose files are there.
        on_stray: gets what looks like input and is no study, or no study's: a mask without its
            scan, a link that leads nowhere, a study whose name cannot be used.

    Raises:
        InputError: the folder is missing or holds no study of the layout, its registry cannot be
            understood or names files outside the folder, or two studies share an id.
    """
    if layout not in ('auto', *LAYOUTS):
        raise InputError(f'data.layout {layout!r}: one of auto, {", ".join(LAYOUTS)} is expected')
    folder = pathlib.Path(folder)
    if not folder.exists():
        raise InputError(f'{folder}: no such file or folder; check the path')
    if not folder.is_dir():
        raise InputError(f'{folder}: not a folder; name the folder that holds the studies')
    if layout == 'auto':
        layout = next(name for name, (is_there, _) in LAYOUTS.items() if is_there(folder))
    strays: list[FileFault] = []
    found = list(LAYOUTS[layout][1](folder, strays.append))
    strays += _find_lone_masks(folder, layout, found)
    if not found:
        raise InputError(_describe_no_studies(folder, strays))
    studies = [study for study in found if not _NOT_IN_NAMES.search(study.study_id)]
    unusable = [study for study in found if _NOT_IN_NAMES.search(study.study_id)]
    if not studies:
        name = min(study.study_id for study in unusable)
        raise InputError(
            f'{folder}: study id {name!r} cannot name a folder; rename its file or folder'
        )
    for study in unusable:
        fault = f'study id {study.study_id!r} cannot name a folder, so it is passed over'
        strays.append(FileFault(study.image, fault, 'rename its file or folder'))
    for stray in strays:
        on_stray(stray)
    repeated = [name for name, number in Counter(s.study_id for s in studies).items() if number > 1]
    if repeated:
        raise InputError(f'{folder}: study {min(repeated)} occurs twice; remove one of the two')
    return tuple(sorted(studies, key=lambda study: study.study_id))


def find_inputs(
    path: str | os.PathLike, layout: str = 'auto', on_stray: OnStray = ignore
) -> tuple[Study, ...]:
    """The studies to predict or verify: one NIfTI file, one DICOM series, or all of a folder as
    `find_studies` sees it.

    Raises:
        InputError: the path is missing, or neither a NIfTI file nor a folder with studies.
    """
    path = pathlib.Path(path)
    absence = find_absence(path)
    if absence is not None:
        raise absence
    if not path.is_file():
        return find_studies(path, layout, on_stray)
    if not formats.is_nifti(path):
        raise InputError(
            f'{path}: not a .nii or .nii.gz file; convert it to NIfTI, or name the folder of a '
            'DICOM series'
        )
    return (_nifti_study(path, path.parent),)


def _describe_no_studies(folder: pathlib.Path, strays: Sequence[FileFault]) -> str:
    """Why a folder without studies has none, and what to do."""
    if strays:
        more = f', and {len(strays) - 1} more such' if len(strays) > 1 else ''
        return f'{folder}: no studies; {strays[0]}{more}'
    return (
        f'{folder}: no studies; it should hold .nii or .nii.gz files, DICOM series in folders, '
        f'or a data set in one of the layouts {", ".join(LAYOUTS)}; what this program wrote '
        'does not count'
    )


# Where a layout keeps masks, and what their scans are called.
_MASK_PLACES = {
    'mosmed': (('masks', f'({_LESION_MASK})?$'), ('lung_masks', f'({_LUNG_MASK})?$')),
    'zenodo': (('Infection_Mask', '$'), ('Lung_Mask', '$')),
    'nnunet': (('labelsTr', '$'), ('labelsTs', '$')),
    'covid19_20': (('', '_seg$'), ('Train', '_seg$'), ('Validation', '_seg$'), ('Test', '_seg$')),
    'plain': (('', f'({_LESION_MASK}|{_LUNG_MASK})$'),),
    'arrays': (),
}
_SCAN_PLACES = {
    'nnunet': ('imagesTr', 'imagesTs'),
    'covid19_20': ('', 'Train', 'Validation', 'Test'),
}


def _find_lone_masks(
    folder: pathlib.Path, layout: str, found: Sequence[Study]
) -> Iterator[FileFault]:
    """Masks of no study, and files that the layout has no name for: left unsaid, a scan would be
    trained on as if nobody had marked it."""
    taken = {path for study in found for path in (study.image, study.lesion_mask, study.lung_mask)}
    places = [(folder / part, ending) for part, ending in _MASK_PLACES[layout]]
    if layout == 'plain':  # beside scans in its folders, too
        root = pathlib.Path(os.path.abspath(folder))
        parents = {study.image.parent for study in found if root in study.image.parent.parents}
        places += [(parent, places[0][1]) for parent in sorted(parents)]
    for place, ending in places:
        for path in _images(place):
            name = formats.strip_suffix(path)
            if path not in taken and re.search(ending, name):
                taken.add(path)
                scan = re.sub(ending, '', name)
                fault = (
                    f'a mask without its scan: no study {scan!r} is there, or it has another mask'
                )
                yield FileFault(path, fault, 'put its scan there, or name the mask after its scan')
    for part in _SCAN_PLACES.get(layout, ()):
        for path in sorted(set(_images(folder / part)) - taken):
            fault = f'its name is that of no scan or mask in the layout {layout}; it is passed over'
            yield FileFault(path, fault, 'rename it as docs/data.md says, or remove it')


def _find_registry(folder: pathlib.Path) -> pathlib.Path | None:
    return next((folder / name for name in REGISTRIES if (folder / name).is_file()), None)


def _mosmed_studies(folder: pathlib.Path, _: OnStray = ignore) -> Iterator[Study]:
    def find_mask(kind: str, study_id: str, ending: str) -> pathlib.Path | None:
        return _existing(folder / kind / f'{study_id}{ending}')

    registry = _find_registry(folder)
    if registry is None:  # the user's own scans lie so, too
        data_set = folder.resolve().name
        for category in CATEGORIES:
            for image in _images(folder / 'studies' / category):
                study_id = formats.strip_suffix(image)
                mask = find_mask('masks', study_id, _LESION_MASK)
                lungs = find_mask('lung_masks', study_id, _LUNG_MASK)
                yield Study(study_id, image, mask, lungs, category, data_set)
        return
    for row in _read_registry(registry):
        image = _resolve(folder, row['study_file'], registry)
        mask = _resolve(folder, row['mask_file'], registry) if row.get('mask_file') else None
        study_id = row.get('study_id') or formats.strip_suffix(image)
        lungs = find_mask('lung_masks', study_id, _LUNG_MASK)
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
    other = _existing(path.with_name(formats.strip_suffix(path)))
    if is_output and other is None:
        raise InputError(
            f'{path}: {registry.name} names it, but this program wrote it; move it elsewhere, and '
            "put the data set's own file there"
        )
    return other or path


# The data set's page says that the ten cases from Radiopaedia were windowed to [-1250, 250] HU and
# stored as 0 to 255 (doi:10.5281/zenodo.3757476).
_ZENODO_WINDOW = (0.0, 255.0, -1250.0, 250.0)


def _zenodo_studies(folder: pathlib.Path, _: OnStray = ignore) -> Iterator[Study]:
    images = folder / 'COVID-19-CT-Seg_20cases'
    for image in _images(images if images.is_dir() else folder):
        name = formats.strip_suffix(image)
        mask, lungs = (_existing(folder / part / name) for part in ('Infection_Mask', 'Lung_Mask'))
        window = _ZENODO_WINDOW if name.startswith('radiopaedia') else None
        yield Study(name, image, mask, lungs, None, 'Zenodo 3757476', window=window)


def _covid19_20_studies(folder: pathlib.Path, _: OnStray = ignore) -> Iterator[Study]:
    for part in ('', 'Train', 'Validation', 'Test'):
        for image in _images(folder / part):
            name = formats.strip_suffix(image)
            if re.fullmatch(r'volume-covid19-.*_ct', name):
                study_id = name.removesuffix('_ct')
                mask = _existing(image.with_name(f'{study_id}_seg'))
                yield Study(study_id, image, mask, None, None, 'COVID-19-20')


def _nnunet_studies(folder: pathlib.Path, _: OnStray = ignore) -> Iterator[Study]:
    for part in ('Tr', 'Ts'):
        for image in _images(folder / f'images{part}'):
            name = formats.strip_suffix(image)
            # _0000 is the first channel of a case, and CT has no other.
            if name.endswith('_0000'):
                study_id = name.removesuffix('_0000')
                mask = _existing(folder / f'labels{part}' / study_id)
                yield Study(study_id, image, mask, None, None, folder.resolve().name)


def _arrays_studies(folder: pathlib.Path, _: OnStray = ignore) -> Iterator[Study]:
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


def _plain_studies(folder: pathlib.Path, on_stray: OnStray) -> list[Study]:
    found = _find_plain(folder, on_stray)
    numbers = Counter((study.study_id, _own_name(study)) for study in found)
    ids = Counter(study_id for study_id, _ in numbers)
    # Names that differ only in what cannot stand in an id: the checksum tells them apart.
    return [
        dataclasses.replace(study, study_id=f'{study.study_id}_{_checksum(_own_name(study))}')
        if ids[study.study_id] > 1
        else study
        for study in found
    ]


def _own_name(study: Study) -> str:
    """What a study is called, however its id had to be made."""
    if study.files or not formats.is_nifti(study.image):
        return f'{study.image}/{study.files}'
    return formats.strip_suffix(study.image)


def _checksum(text: str) -> str:
    return f'{zlib.crc32(os.fsencode(text)):08x}'


def _find_plain(folder: pathlib.Path, on_stray: OnStray) -> list[Study]:
    # Not resolved: a link's own name is the study's. '..' names none.
    root = pathlib.Path(os.path.abspath(folder))
    studies, deeper = [_nifti_study(image, folder) for image in _scans(folder)], []
    for place in _walk(root, on_stray):
        if is_dangling(place):
            study_id = _make_id(place.relative_to(root).parts)
            studies.append(Study(study_id, place, None, None, None, root.resolve().name))
            continue
        try:
            series, strays = dicom_files.find_series(place)
        except FileFault as error:
            series, strays = [], [error]
        for stray in strays:
            on_stray(stray)
        studies += [_dicom_study(root, place, each) for each in series]
        if place != root:
            deeper += [_nifti_study(image, root) for image in _scans(place)]
    if not studies:
        return deeper
    for folder in sorted({study.image.parent for study in deeper}):
        on_stray(
            FileFault(
                folder,
                'its NIfTI files are left out, for folders of them are looked into only where '
                'there is nothing else',
                'give this folder as one of its own',
            )
        )
    return studies


def _scans(folder: pathlib.Path) -> list[pathlib.Path]:
    """NIfTI files that are not named as masks."""
    masks = (_LESION_MASK, _LUNG_MASK)
    return [path for path in _images(folder) if not formats.strip_suffix(path).endswith(masks)]


def _walk(
    folder: pathlib.Path, on_stray: OnStray, above: frozenset[str] = frozenset()
) -> Iterator[pathlib.Path]:
    """The folder and all folders in it, by name, and links without a suffix that lead nowhere.
    Links are followed, but not back up."""
    yield folder
    above |= {os.path.realpath(folder)}
    try:
        inside = sorted(path for path in folder.iterdir() if not path.name.startswith('.'))
    except OSError as error:
        on_stray(FileFault(folder, f'cannot be listed ({error.strerror})', 'allow it to be read'))
        return
    is_series = None
    for path in inside:
        if path.is_dir() and os.path.realpath(path) not in above:
            yield from _walk(path, on_stray, above)
        elif is_dangling(path) and not formats.is_nifti(path):
            if is_series is None:
                is_series = dicom_files.looks_like_series(folder)
            if not is_series and not path.suffix:
                yield path
            elif not is_series:
                on_stray(find_absence(path))


def _nifti_study(image: pathlib.Path, root: pathlib.Path) -> Study:
    name = formats.strip_suffix(image)
    mask, lungs = (_existing(image.with_name(name + end)) for end in (_LESION_MASK, _LUNG_MASK))
    study_id = _make_id([*image.parent.relative_to(root).parts, name])
    return Study(study_id, image, mask, lungs, None, root.resolve().name)


def _dicom_study(root: pathlib.Path, folder: pathlib.Path, series: dicom_files.Series) -> Study:
    """Its masks lie beside its folder, or in the root under the study's own name."""
    label = f'_{series.name}' if series.name else ''
    parts = folder.relative_to(root).parts or (folder.name,)
    study_id = _make_id([*parts[:-1], parts[-1] + label])
    places = (folder.with_name(folder.name + label), root / study_id)
    mask, lungs = (
        next(filter(None, (_existing(place.with_name(place.name + end)) for place in places)), None)
        for end in (_LESION_MASK, _LUNG_MASK)
    )
    data_set = (root if folder != root else root.parent).resolve().name
    return Study(study_id, folder, mask, lungs, None, data_set, files=series.files)


def _make_id(parts: Sequence[str]) -> str:
    """A study's id from the names that lead to it, without what cannot stand in a file's name."""
    name = _NOT_IN_NAMES.sub('_', '_'.join(parts))
    if len(os.fsencode(name)) > _LONGEST_ID:
        # The end tells series apart, the checksum what was cut off.
        name = f'{_checksum(name)}_{name[-_LONGEST_ID // 4 :]}'
    return name


def _images(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(filter(_is_image, folder.iterdir())) if folder.is_dir() else []


def _is_image(path: pathlib.Path) -> bool:
    is_hidden = path.name.startswith('.')  # macOS leaves ._study_0001.nii.gz
    # A dangling link is one whose content is not there: reading it says so.
    is_there = path.is_file() or is_dangling(path)
    is_scan = formats.is_nifti(path) and is_there and not is_hidden
    return is_scan and not written.is_output(path)


def _existing(stem: pathlib.Path) -> pathlib.Path | None:
    candidates = [stem.with_name(stem.name + suffix) for suffix in formats.NIFTI_SUFFIXES]
    return next(filter(_is_image, candidates), None)


# Name -> (whether a folder has it, what finds its studies); 'auto' takes the first that it has.
LAYOUTS = {
    'mosmed': (lambda f: bool(_find_registry(f)) or (f / 'studies').is_dir(), _mosmed_studies),
    'arrays': (lambda f: (f / arrays.IMAGES).is_file(), _arrays_studies),
    'zenodo': (
        lambda f: (f / 'Infection_Mask').is_dir() and (f / 'Lung_Mask').is_dir(),
        _zenodo_studies,
    ),
    'nnunet': (
        lambda f: (f / 'imagesTr').is_dir() or (f / 'imagesTs').is_dir(),
        _nnunet_studies,
    ),
    'covid19_20': (lambda f: any(_covid19_20_studies(f)), _covid19_20_studies),
    'plain': (lambda f: True, _plain_studies),
}
