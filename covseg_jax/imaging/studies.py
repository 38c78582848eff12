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

import os
import pathlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence

from covseg_jax.errors import FileFault, InputError
from covseg_jax.imaging import arrays, formats
from covseg_jax.imaging.absent import find_absence
from covseg_jax.imaging.layouts import (
    arrays_studies,
    covid19_20_studies,
    find_registry,
    mosmed_studies,
    nnunet_studies,
    zenodo_studies,
)
from covseg_jax.imaging.plain_folder import plain_studies
from covseg_jax.imaging.study import (
    LESION_MASK,
    LUNG_MASK,
    NOT_IN_NAMES,
    OnStray,
    Study,
    ignore,
    images_in,
    nifti_study,
)


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
    studies = [study for study in found if not NOT_IN_NAMES.search(study.study_id)]
    unusable = [study for study in found if NOT_IN_NAMES.search(study.study_id)]
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
    return (nifti_study(path, path.parent),)


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
    'mosmed': (('masks', f'({LESION_MASK})?$'), ('lung_masks', f'({LUNG_MASK})?$')),
    'zenodo': (('Infection_Mask', '$'), ('Lung_Mask', '$')),
    'nnunet': (('labelsTr', '$'), ('labelsTs', '$')),
    'covid19_20': (('', '_seg$'), ('Train', '_seg$'), ('Validation', '_seg$'), ('Test', '_seg$')),
    'plain': (('', f'({LESION_MASK}|{LUNG_MASK})$'),),
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
        for path in images_in(place):
            name = formats.strip_suffix(path)
            if path not in taken and re.search(ending, name):
                taken.add(path)
                scan = re.sub(ending, '', name)
                fault = (
                    f'a mask without its scan: no study {scan!r} is there, or it has another mask'
                )
                yield FileFault(path, fault, 'put its scan there, or name the mask after its scan')
    for part in _SCAN_PLACES.get(layout, ()):
        for path in sorted(set(images_in(folder / part)) - taken):
            fault = f'its name is that of no scan or mask in the layout {layout}; it is passed over'
            yield FileFault(path, fault, 'rename it as docs/data.md says, or remove it')


# Name -> (whether a folder has it, what finds its studies); 'auto' takes the first that it has.
LAYOUTS = {
    'mosmed': (lambda f: bool(find_registry(f)) or (f / 'studies').is_dir(), mosmed_studies),
    'arrays': (lambda f: (f / arrays.IMAGES).is_file(), arrays_studies),
    'zenodo': (
        lambda f: (f / 'Infection_Mask').is_dir() and (f / 'Lung_Mask').is_dir(),
        zenodo_studies,
    ),
    'nnunet': (
        lambda f: (f / 'imagesTr').is_dir() or (f / 'imagesTs').is_dir(),
        nnunet_studies,
    ),
    'covid19_20': (lambda f: any(covid19_20_studies(f)), covid19_20_studies),
    'plain': (lambda f: True, plain_studies),
}
