"""From studies to prepared cases: in memory for one study, on disk for a data set.

On disk they are made in parallel. A case's folder that exists is complete, and it is kept as long
as its settings and the files it was made from are the same.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
import shutil
import zlib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import tqdm

from covseg_jax import atomic
from covseg_jax.errors import FileFault, InputError, one_line
from covseg_jax.imaging import formats
from covseg_jax.imaging.geometry import Geometry, Shape, fit_geometry, to_model_grid
from covseg_jax.imaging.study import Study
from covseg_jax.imaging.workers import map_in_processes
from covseg_jax.prepare import lung_network, study_files
from covseg_jax.prepare.lung_report import describe_lungs

GEOMETRY_FILE = 'geometry.json'
_CASE_FILES = {'image.npy', 'lungs.npy', 'lesion.npy', GEOMETRY_FILE}
# Raised when the same files and settings give another result, so that old cases are made anew.
CASE_VERSION = 7


@dataclass(frozen=True)
class PrepareSettings:
    """How a study becomes a case.

    Attributes:
        grid: (D, H, W) of the model.
        window_hu: mapped to 0 and 1; what lies beyond is clipped.
        margin_mm: kept around the lungs.
        lungs_source: 'threshold' (lungs.find_lungs), 'network' (the same, with what a network
            finds where lungs are dense), 'file' (the study's lung mask) or 'lungmask' (that
            package, where it is installed).
        lesion_labels: the values of a lesion mask that are lesion; all others must be 0.
        lung_network: the network's file; '' is the one that comes with the code.

    Raises:
        InputError: a value that cannot be used.
    """

    grid: Shape
    window_hu: tuple[float, float]
    margin_mm: float
    lungs_source: str
    lesion_labels: tuple[int, ...]
    lung_network: str

    def __post_init__(self):
        # Settings from JSON or a config arrive as lists.
        object.__setattr__(self, 'grid', tuple(int(length) for length in self.grid))
        object.__setattr__(self, 'window_hu', tuple(float(edge) for edge in self.window_hu))
        object.__setattr__(self, 'lesion_labels', tuple(int(v) for v in self.lesion_labels))
        if len(self.grid) != 3 or min(self.grid) < 1:
            raise InputError(f'grid {self.grid}: three positive lengths are expected')
        if len(self.window_hu) != 2 or not self.window_hu[0] < self.window_hu[1]:
            raise InputError(f'window_hu {self.window_hu}: (low, high) is expected')
        if not self.margin_mm >= 0:
            raise InputError(f'margin_mm {self.margin_mm}: 0 or more is expected')
        if self.lungs_source not in study_files.LUNGS_SOURCES:
            raise InputError(
                f'lungs_source {self.lungs_source!r}: one of {study_files.LUNGS_SOURCES}'
            )
        if not self.lesion_labels or 0 in self.lesion_labels:
            raise InputError(
                f'lesion_labels {self.lesion_labels}: values other than 0 are expected'
            )

    def without_pixels(self) -> 'PrepareSettings':
        """What decides beside the size of pixels, and beside where the lung network's file lies: of
        the grid its slices, and their shape."""
        depth, *sides = self.grid
        shape = (depth, *(side // math.gcd(*sides) for side in sides))
        return dataclasses.replace(self, lung_network='', grid=shape)


@dataclass(frozen=True)
class PreparedCase:
    """One study on the model's grid.

    Attributes:
        study_id: as in Study.
        image: float16 (D, H, W) in [0, 1], 0 outside the lungs.
        lungs: uint8 (D, H, W), 0 or 1.
        lesion: uint8 (D, H, W), 0 or 1, or None without a mask.
        geometry: the way back to the study's grid.
        crc32: of the image's file, as formats.source_crc32.
        voxel_crc32: of its voxels, as study_files.voxel_crc32.
        lung_ml: volume of the lungs on the study's own grid.
        right_lung_ml, left_lung_ml: of either lung.
        notes: what a rule decided about the image's files, and what is doubtful about its lungs.
    """

    study_id: str
    image: np.ndarray
    lungs: np.ndarray
    lesion: np.ndarray | None
    geometry: Geometry
    crc32: int
    voxel_crc32: int
    lung_ml: float
    right_lung_ml: float
    left_lung_ml: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class PrepareReport:
    """What `prepare_studies` did.

    Attributes:
        made, kept: study ids.
        bad: study id -> why it was set aside.
        notes: study id -> what a rule decided, of the cases made.
    """

    made: list[str]
    kept: list[str]
    bad: dict[str, str]
    notes: dict[str, tuple[str, ...]]


def lung_network_crc32(settings: PrepareSettings) -> int | None:
    """CRC-32 of the network that finds lungs, or None where none does.

    Raises:
        InputError: its file cannot be read.
    """
    if settings.lungs_source != 'network':
        return None
    path = settings.lung_network or lung_network.SHIPPED
    try:
        return zlib.crc32(pathlib.Path(path).read_bytes())
    except OSError as error:
        raise InputError(f'prepare.lung_network: {one_line(error)}') from error


def prepare_volume(study: Study, settings: PrepareSettings) -> PreparedCase:
    """Reads a study, finds its lungs and resamples it onto the model's grid.

    Raises:
        FileFault: a file is missing, damaged or not what it should be, there are no lungs, or a
            mask does not fit its image.
    """
    volume = study_files.read_image(study)
    lungs = study_files.find_study_lungs(
        study, volume, settings.lungs_source, settings.lung_network
    )
    geometry = fit_geometry(
        lungs, volume.as_stored.shape, volume.affine, settings.grid, settings.margin_mm
    )
    report = describe_lungs(lungs, volume.array, volume.spacing_mm, volume.voxel_ml)
    low, high = settings.window_hu
    # The window first, so that bright bone and metal do not outweigh their neighbours.
    resampled = to_model_grid(volume.array, geometry, weights=lungs, clip=(low, high))
    model_lungs = to_model_grid(lungs, geometry) >= 0.5
    image = np.clip((resampled - low) / (high - low), 0.0, 1.0) * model_lungs
    lesion = None
    if study.lesion_mask is not None:
        mask = study_files.read_mask(study, 'lesion_mask', volume, settings.lesion_labels)
        lesion = (to_model_grid(mask, geometry) >= 0.5).astype(np.uint8)
    return PreparedCase(
        study_id=study.study_id,
        image=image.astype(np.float16),
        lungs=model_lungs.astype(np.uint8),
        lesion=lesion,
        geometry=geometry,
        crc32=volume.crc32,
        voxel_crc32=study_files.voxel_crc32(volume),
        lung_ml=report.right_ml + report.left_ml,
        right_lung_ml=report.right_ml,
        left_lung_ml=report.left_ml,
        notes=(*volume.notes, *report.notes),
    )


def prepare_studies(
    studies: Sequence[Study],
    folder: str | os.PathLike,
    settings: PrepareSettings,
    *,
    num_workers: int,
    on_bad_study: str = 'skip',
) -> PrepareReport:
    """Writes a folder `<folder>/<study_id>/` for every study.

    It holds image.npy, lungs.npy, lesion.npy (where there is a mask) and geometry.json. A case
    made with the same settings from the same files is kept. On Ctrl-C the studies under way are
    finished or left out whole, and no process stays behind. After a kill at any moment the next
    call makes what is missing. Of studies with the same image one is kept and the others are bad,
    because they could end up on both sides of a split.

    Args:
        studies: from studies.find_studies.
        folder: made if it is missing.
        settings: how.
        num_workers: processes; 0 or 1 works in this one.
        on_bad_study: 'skip' goes on and reports it, 'stop' stops at the first.

    Raises:
        InputError: on_bad_study is 'stop' and a study is bad, a worker was killed, the disk is too
            small, or a folder with a study's name holds something else than its prepared case.
        ValueError: another on_bad_study.
    """
    if on_bad_study not in ('skip', 'stop'):
        raise ValueError(f"on_bad_study {on_bad_study!r}: 'skip' or 'stop'")
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    atomic.remove_leftovers(folder)
    _refuse_other_folders(studies, folder)
    _check_space(studies, folder, settings)
    prepare = functools.partial(_prepare_case, folder=folder, settings=settings)
    outcomes: dict[str, _Outcome] = {}
    with tqdm.tqdm(total=len(studies), desc='prepare', unit='study', disable=None) as bar:
        for outcome in map_in_processes(prepare, studies, num_workers, 'prepare'):
            bar.update()
            if outcome.fault and on_bad_study == 'stop':
                raise InputError(outcome.fault)
            outcomes[outcome.study_id] = outcome
    voxels = {name: each.voxel_crc32 for name, each in outcomes.items() if not each.fault}
    for first, other in find_copies(studies, voxels):
        # The checksum has 32 bits: among thousands of studies two may share it by chance.
        if np.array_equal(*(np.load(folder / s.study_id / 'image.npy') for s in (first, other))):
            shutil.rmtree(folder / other.study_id)
            outcomes[other.study_id] = _Outcome(other.study_id, fault=str(copy_fault(first, other)))
    done = {name: outcome for name, outcome in sorted(outcomes.items()) if not outcome.fault}
    bad = {name: outcome.fault for name, outcome in sorted(outcomes.items()) if outcome.fault}
    if bad and on_bad_study == 'stop':
        raise InputError(next(iter(bad.values())))
    return PrepareReport(
        made=[name for name, outcome in done.items() if outcome.made],
        kept=[name for name, outcome in done.items() if not outcome.made],
        bad=bad,
        notes={name: outcome.notes for name, outcome in done.items() if outcome.notes},
    )


def read_geometry_file(case_folder: str | os.PathLike) -> dict:
    """The content of a case's geometry.json: plain JSON values.

    Keys: geometry (for Geometry.from_json), study_id, category, data_set, settings,
    source_crc32, voxel_crc32, lung_ml, right_lung_ml, left_lung_ml, image, lesion_mask (paths as
    given), sources (CRC-32 of every file the case was made from), notes and version.

    Raises:
        InputError: there is none, or it is not JSON.
    """
    path = pathlib.Path(case_folder) / GEOMETRY_FILE
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except FileNotFoundError as error:
        raise InputError(f'{path}: no such file; run --stages=prepare') from error
    except ValueError as error:
        raise InputError(f'{path}: not JSON; remove its folder and prepare again') from error


def find_copies(
    studies: Sequence[Study], voxels: Mapping[str, Hashable]
) -> Iterator[tuple[Study, Study]]:
    """Pairs of studies with the same voxels: the one to keep, with a lesion mask if any has one,
    and another. `voxels` has what identifies them, by study id, of the studies to compare."""
    kept: dict[Hashable, Study] = {}
    for study in sorted(studies, key=lambda s: (s.lesion_mask is None, s.study_id)):
        if study.study_id in voxels:
            first = kept.setdefault(voxels[study.study_id], study)
            if first is not study:
                yield first, study


def copy_fault(first: Study, other: Study) -> FileFault:
    """What is wrong with a study whose image another one has too."""
    fault = f'the same image as study {first.study_id}'
    return FileFault(other.image, fault, 'remove one of the two')


@dataclass(frozen=True)
class _Outcome:
    study_id: str
    made: bool = False
    fault: str = ''
    voxel_crc32: int | None = None
    notes: tuple[str, ...] = ()


def _refuse_other_folders(studies: Sequence[Study], folder: pathlib.Path) -> None:
    # A case replaces the folder of its name, which may hold somebody's own files, such as DICOM.
    for study in studies:
        case_folder = folder / study.study_id
        if not case_folder.is_dir() or case_folder.is_symlink():
            names = {case_folder.name} if os.path.lexists(case_folder) else set()
        else:
            names = {path.name for path in case_folder.iterdir()}
        if names and (GEOMETRY_FILE not in names or not names <= _CASE_FILES):
            raise InputError(
                f'{case_folder}: is in the way: it is not a case that was prepared; name another '
                'folder in data.prepared, or move it elsewhere'
            )


def _check_space(studies: Sequence[Study], folder: pathlib.Path, settings: PrepareSettings) -> None:
    missing = sum(not (folder / study.study_id / GEOMETRY_FILE).exists() for study in studies)
    # float16 image, uint8 lungs and lesion; and the rest of a folder.
    wanted = missing * (math.prod(settings.grid) * 4 + 16_384)
    free = shutil.disk_usage(folder).free
    if wanted > free:
        raise InputError(
            f'{folder}: {missing} cases need {wanted / 1e9:.1f} GB, and the disk has '
            f'{free / 1e9:.1f} GB left; make room or set data.prepared to a folder elsewhere'
        )


def _prepare_case(study: Study, folder: pathlib.Path, settings: PrepareSettings) -> _Outcome:
    case_folder = folder / study.study_id
    try:
        identity = _identify(study, settings)
        try:
            written = read_geometry_file(case_folder)
        except InputError:  # never made, or spoilt since
            written = {}
        if {name: written.get(name) for name in identity} == identity:
            return _Outcome(study.study_id, voxel_crc32=written['voxel_crc32'])
        case = prepare_volume(study, settings)
        _write_case(case, case_folder, study, identity)
    except InputError as error:
        # A case made before the study was spoilt must not be trained on.
        shutil.rmtree(case_folder, ignore_errors=True)
        return _Outcome(study.study_id, fault=str(error))
    return _Outcome(study.study_id, made=True, voxel_crc32=case.voxel_crc32, notes=case.notes)


def _identify(study: Study, settings: PrepareSettings) -> dict:
    """The part of geometry.json by which a case is kept; each source is a CRC-32, or None."""
    paths = {'image': study.image, 'lesion_mask': study.lesion_mask}
    if study_files.uses_lung_mask(study, settings.lungs_source):
        paths['lung_mask'] = study.lung_mask
    identity = {
        'version': CASE_VERSION,
        'study_id': study.study_id,
        'category': study.category,
        'data_set': study.data_set,
        'settings': dataclasses.asdict(settings) | {'lung_network': lung_network_crc32(settings)},
        'sources': {
            name: None if path is None else formats.source_crc32(path, study.index, study.files)
            for name, path in paths.items()
        },
    }
    return json.loads(json.dumps(identity))  # so that tuples are lists, as in the file


def _write_case(
    case: PreparedCase, case_folder: pathlib.Path, study: Study, identity: dict
) -> None:
    description = {
        'geometry': case.geometry.to_json(),
        'source_crc32': case.crc32,
        'voxel_crc32': case.voxel_crc32,
        'lung_ml': case.lung_ml,
        'right_lung_ml': case.right_lung_ml,
        'left_lung_ml': case.left_lung_ml,
        'notes': case.notes,
        'image': str(study.image),
        'lesion_mask': None if study.lesion_mask is None else str(study.lesion_mask),
        **identity,
    }
    with atomic.new_folder(case_folder) as temporary:
        for name in ('image', 'lungs', 'lesion'):
            if getattr(case, name) is not None:
                np.save(temporary / f'{name}.npy', getattr(case, name))
        text = json.dumps(description, indent=1)
        (temporary / GEOMETRY_FILE).write_text(text, encoding='utf-8')
