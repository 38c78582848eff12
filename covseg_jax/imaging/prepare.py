"""Studies -> prepared cases: in memory for one study, on disk for a data set.

On disk in parallel and resumable: a case folder that exists is complete, and is kept as long as
its settings and the files it was made from are the same.
"""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import pathlib
import signal
from collections.abc import Iterator, Sequence
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np
import tqdm

from covseg_jax import atomic
from covseg_jax.errors import InputError
from covseg_jax.imaging import geometry as geometry_lib
from covseg_jax.imaging import lungs as lungs_lib
from covseg_jax.imaging import nifti
from covseg_jax.imaging.studies import Study

LUNGS_SOURCES = ('threshold', 'file', 'lungmask')
GEOMETRY_FILE = 'geometry.json'
# Raised when the same files and settings would give another result: old cases are made anew.
_VERSION = 1
_THREAD_VARIABLES = ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS')


@dataclass(frozen=True)
class PrepareSettings:
    """How a study becomes a case.

    Attributes:
        grid: (D, H, W) of the model.
        window_hu: mapped to 0 and 1; what lies beyond is clipped.
        margin_mm: kept around the lungs.
        lungs_source: 'threshold' (lungs.find_lungs), 'file' (the study's lung mask) or
            'lungmask' (that package, where it is installed).

    Raises:
        InputError: a value that cannot be used.
    """

    grid: tuple[int, int, int] = (32, 128, 128)
    window_hu: tuple[float, float] = (-1000.0, 400.0)
    margin_mm: float = 4.0
    lungs_source: str = 'threshold'

    def __post_init__(self):
        # Settings from JSON or a config arrive as lists.
        object.__setattr__(self, 'grid', tuple(int(length) for length in self.grid))
        object.__setattr__(self, 'window_hu', tuple(float(edge) for edge in self.window_hu))
        if len(self.grid) != 3 or min(self.grid) < 1:
            raise InputError(f'grid {self.grid}: three positive lengths are expected')
        if len(self.window_hu) != 2 or not self.window_hu[0] < self.window_hu[1]:
            raise InputError(f'window_hu {self.window_hu}: (low, high) is expected')
        if not self.margin_mm >= 0:
            raise InputError(f'margin_mm {self.margin_mm}: 0 or more is expected')
        if self.lungs_source not in LUNGS_SOURCES:
            raise InputError(f'lungs_source {self.lungs_source!r}: one of {LUNGS_SOURCES}')


@dataclass(frozen=True)
class PreparedCase:
    """One study on the model's grid.

    Attributes:
        study_id: as in Study.
        image: float16 (D, H, W) in [0, 1], 0 outside the lungs.
        lungs: uint8 (D, H, W), 0 or 1.
        lesion: uint8 (D, H, W), 0 or 1, or None without a mask.
        geometry: the way back to the study's grid.
        crc32: of the image file, as nifti.source_crc32.
        category: as in Study.
        data_set: as in Study.
        lung_ml: volume of the lungs on the study's own grid, ml.
    """

    study_id: str
    image: np.ndarray
    lungs: np.ndarray
    lesion: np.ndarray | None
    geometry: geometry_lib.Geometry
    crc32: int
    category: str | None
    data_set: str
    lung_ml: float


@dataclass(frozen=True)
class PrepareReport:
    """What `prepare_studies` did: study ids made and kept, and why the bad ones are bad."""

    made: list[str]
    kept: list[str]
    bad: dict[str, str]


def prepare_volume(study: Study, settings: PrepareSettings) -> PreparedCase:
    """Reads a study, finds its lungs and resamples it onto the model's grid.

    Raises:
        InputError: a file is missing, damaged or not what it should be, there are no lungs, or
            a mask does not fit its image. The message names the file.
    """
    volume = nifti.read_volume(study.image)
    image_hu = geometry_lib.to_canonical(volume.data, volume.affine)
    lungs = _find_lungs(study, volume, image_hu, settings)
    geometry = geometry_lib.fit_geometry(
        lungs, volume.data.shape, volume.affine, settings.grid, settings.margin_mm
    )
    low, high = settings.window_hu
    # The window first, so that bright bone and metal cannot outweigh their neighbours.
    resampled = geometry_lib.to_model_grid(np.clip(image_hu, low, high), geometry, weights=lungs)
    model_lungs = geometry_lib.to_model_grid(lungs, geometry) >= 0.5
    image = np.clip((resampled - low) / (high - low), 0.0, 1.0) * model_lungs
    lesion = None
    if study.lesion_mask is not None:
        mask = _read_mask(study.lesion_mask, volume, labels=(0, 1))
        lesion = (geometry_lib.to_model_grid(mask, geometry) >= 0.5).astype(np.uint8)
    return PreparedCase(
        study_id=study.study_id,
        image=image.astype(np.float16),
        lungs=model_lungs.astype(np.uint8),
        lesion=lesion,
        geometry=geometry,
        crc32=volume.crc32,
        category=study.category,
        data_set=study.data_set,
        lung_ml=float(lungs.sum()) * volume.voxel_ml,
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
    finished or left out whole, and no process stays behind.

    Args:
        studies: from studies.find_studies.
        folder: made if it is missing.
        settings: how.
        num_workers: processes; 0 or 1 works in this one.
        on_bad_study: 'skip' goes on and reports it, 'stop' stops at the first.

    Raises:
        InputError: on_bad_study is 'stop' and a study is bad, or a worker was killed.
        ValueError: another on_bad_study.
    """
    if on_bad_study not in ('skip', 'stop'):
        raise ValueError(f"on_bad_study {on_bad_study!r}: 'skip' or 'stop'")
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    made, kept, bad = [], [], {}
    with tqdm.tqdm(total=len(studies), desc='prepare', unit='study', disable=None) as bar:
        for study_id, outcome, message in _run(studies, folder, settings, num_workers):
            bar.update()
            if outcome == 'bad' and on_bad_study == 'stop':
                raise InputError(message)
            if outcome == 'bad':
                bad[study_id] = message
            else:
                (made if outcome == 'made' else kept).append(study_id)
    return PrepareReport(sorted(made), sorted(kept), dict(sorted(bad.items())))


def read_geometry_file(case_folder: str | os.PathLike) -> dict:
    """The content of a case's geometry.json: plain JSON values.

    Keys: geometry (for Geometry.from_json), study_id, category, data_set, settings,
    source_crc32, lung_ml, image, lesion_mask (paths as given), sources (CRC-32 of every file the
    case was made from) and version.

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


Outcome = tuple[str, str, str]  # study id; 'made', 'kept' or 'bad'; message


def _run(
    studies: Sequence[Study], folder: pathlib.Path, settings: PrepareSettings, num_workers: int
) -> Iterator[Outcome]:
    if num_workers <= 1:
        for study in studies:
            yield _prepare_case(study, folder, settings)
        return
    context = multiprocessing.get_context('spawn')
    with _single_threaded_children():
        pool = futures.ProcessPoolExecutor(num_workers, context, initializer=_ignore_interrupt)
        try:
            jobs = [pool.submit(_prepare_case, study, folder, settings) for study in studies]
            for job in futures.as_completed(jobs):
                yield job.result()
        except BrokenProcessPool as error:
            raise InputError(
                'prepare: a worker process was killed, most likely for memory; '
                'use fewer workers and run again'
            ) from error
        finally:
            # Also on Ctrl-C: what runs is finished, what waits is dropped.
            pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _single_threaded_children() -> Iterator[None]:
    # BLAS reads these when a process starts: N workers with N threads each would stand in each
    # other's way.
    before = {name: os.environ.get(name) for name in _THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(_THREAD_VARIABLES, '1'))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _ignore_interrupt() -> None:
    # Ctrl-C reaches every process of the terminal; the parent decides what happens.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _prepare_case(study: Study, folder: pathlib.Path, settings: PrepareSettings) -> Outcome:
    try:
        case_folder = folder / study.study_id
        sources = _source_checksums(study, settings)
        if _is_current(case_folder, study, settings, sources):
            return study.study_id, 'kept', ''
        case = prepare_volume(study, settings)
        _write_case(case, case_folder, study, settings, sources)
    except InputError as error:
        return study.study_id, 'bad', str(error)
    return study.study_id, 'made', ''


def _source_checksums(study: Study, settings: PrepareSettings) -> dict[str, int | None]:
    paths = {'image': study.image, 'lesion_mask': study.lesion_mask}
    if settings.lungs_source == 'file':
        paths['lung_mask'] = study.lung_mask
    return {
        name: None if path is None else nifti.source_crc32(path) for name, path in paths.items()
    }


def _is_current(
    case_folder: pathlib.Path,
    study: Study,
    settings: PrepareSettings,
    sources: dict[str, int | None],
) -> bool:
    try:
        written = read_geometry_file(case_folder)
    except InputError:  # never made, or spoilt since
        return False
    wanted = _identity(study, settings, sources)
    return {name: written.get(name) for name in wanted} == wanted


def _identity(study: Study, settings: PrepareSettings, sources: dict[str, int | None]) -> dict:
    # What a kept case must agree with; through JSON, so that tuples compare as lists.
    identity = {
        'version': _VERSION,
        'study_id': study.study_id,
        'category': study.category,
        'data_set': study.data_set,
        'settings': dataclasses.asdict(settings),
        'sources': sources,
    }
    return json.loads(json.dumps(identity))


def _write_case(
    case: PreparedCase,
    case_folder: pathlib.Path,
    study: Study,
    settings: PrepareSettings,
    sources: dict[str, int | None],
) -> None:
    description = {
        'geometry': case.geometry.to_json(),
        'source_crc32': case.crc32,
        'lung_ml': case.lung_ml,
        'image': str(study.image),
        'lesion_mask': None if study.lesion_mask is None else str(study.lesion_mask),
        **_identity(study, settings, sources),
    }
    with atomic.new_folder(case_folder) as temporary:
        np.save(temporary / 'image.npy', case.image)
        np.save(temporary / 'lungs.npy', case.lungs)
        if case.lesion is not None:
            np.save(temporary / 'lesion.npy', case.lesion)
        text = json.dumps(description, indent=1)
        (temporary / GEOMETRY_FILE).write_text(text, encoding='utf-8')


def _find_lungs(
    study: Study, volume: nifti.Volume, image_hu: np.ndarray, settings: PrepareSettings
) -> np.ndarray:
    if settings.lungs_source == 'file':
        if study.lung_mask is None:
            raise InputError(
                f'{study.image.name}: has no lung mask file; add '
                f'{study.study_id}_lungs.nii.gz or set lungs_source=threshold'
            )
        lungs = _read_mask(study.lung_mask, volume, labels=None)
        if not lungs.any():
            raise InputError(f'{study.lung_mask.name}: the lung mask is empty; draw it again')
        return lungs
    try:
        if settings.lungs_source == 'lungmask':
            return lungs_lib.find_lungs_by_lungmask(image_hu)
        spacing_mm = geometry_lib.canonical_spacing(volume.affine)
        return lungs_lib.find_lungs(image_hu, spacing_mm)
    except ValueError as error:
        raise InputError(
            f'{study.image.name}: {error}; give a chest CT in HU, or a lung mask with '
            'lungs_source=file'
        ) from error
    except ModuleNotFoundError as error:
        raise InputError(
            'lungs_source=lungmask: the package is not installed; pip install lungmask, or use '
            'lungs_source=threshold'
        ) from error


def _read_mask(
    path: pathlib.Path, volume: nifti.Volume, labels: tuple[int, ...] | None
) -> np.ndarray:
    """A mask that must lie on its image's grid: bool (Z, Y, X) canonical, any label above 0."""
    mask = nifti.read_volume(path)
    if mask.data.shape != volume.data.shape:
        raise InputError(
            f'{path.name}: shape {mask.data.shape}, but its image has {volume.data.shape}; '
            'give the mask of this image'
        )
    if not np.allclose(mask.affine, volume.affine, rtol=0, atol=1e-3):
        raise InputError(
            f'{path.name}: its affine is not that of its image; give the mask on the image grid'
        )
    if labels is not None:
        found = np.unique(mask.data)
        if not np.isin(found, labels).all():
            text = ', '.join(f'{label:g}' for label in found[:6])
            raise InputError(f'{path.name}: labels {text}; only 0 and 1 are a lesion mask')
    return geometry_lib.to_canonical(mask.data, mask.affine) > 0
