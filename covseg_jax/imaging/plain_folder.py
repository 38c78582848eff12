"""A folder of scans in no layout: NIfTI files and DICOM series, in folders of any depth."""

import dataclasses
import os
import pathlib
from collections import Counter
from collections.abc import Iterator

from covseg_jax.errors import FileFault
from covseg_jax.imaging import dicom_files, formats
from covseg_jax.imaging.absent import find_absence, is_dangling
from covseg_jax.imaging.study import (
    LESION_MASK,
    LUNG_MASK,
    OnStray,
    Study,
    checksum,
    find_image,
    images_in,
    make_id,
    nifti_study,
)


def plain_studies(folder: pathlib.Path, on_stray: OnStray) -> list[Study]:
    """All of a folder and of the folders in it, with ids that tell them apart."""
    found = _find_plain(folder, on_stray)
    numbers = Counter((study.study_id, _own_name(study)) for study in found)
    ids = Counter(study_id for study_id, _ in numbers)
    # Names that differ only in what cannot stand in an id: the checksum tells them apart.
    return [
        dataclasses.replace(study, study_id=f'{study.study_id}_{checksum(_own_name(study))}')
        if ids[study.study_id] > 1
        else study
        for study in found
    ]


def _own_name(study: Study) -> str:
    """What a study is called, however its id had to be made."""
    if study.files or not formats.is_nifti(study.image):
        return f'{study.image}/{study.files}'
    return formats.strip_suffix(study.image)


def _find_plain(folder: pathlib.Path, on_stray: OnStray) -> list[Study]:
    # Not resolved: a link's own name is the study's. '..' names none.
    root = pathlib.Path(os.path.abspath(folder))
    studies, deeper = [nifti_study(image, folder) for image in _scans(folder)], []
    for place in _walk(root, on_stray):
        if is_dangling(place):
            study_id = make_id(place.relative_to(root).parts)
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
            deeper += [nifti_study(image, root) for image in _scans(place)]
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
    masks = (LESION_MASK, LUNG_MASK)
    return [path for path in images_in(folder) if not formats.strip_suffix(path).endswith(masks)]


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


def _dicom_study(root: pathlib.Path, folder: pathlib.Path, series: dicom_files.Series) -> Study:
    """Its masks lie beside its folder, or in the root under the study's own name."""
    label = f'_{series.name}' if series.name else ''
    parts = folder.relative_to(root).parts or (folder.name,)
    study_id = make_id([*parts[:-1], parts[-1] + label])
    places = (folder.with_name(folder.name + label), root / study_id)
    mask, lungs = (
        next(
            filter(None, (find_image(place.with_name(place.name + end)) for place in places)), None
        )
        for end in (LESION_MASK, LUNG_MASK)
    )
    data_set = (root if folder != root else root.parent).resolve().name
    return Study(study_id, folder, mask, lungs, None, data_set, files=series.files)
