"""Studies in -> NIfTI out on the same grid, with lesion ml, lung ml and infection %."""

import contextlib
import csv
import dataclasses
import functools
import pathlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures

import numpy as np
from tqdm import tqdm

from covseg_jax import atomic, hosts, written
from covseg_jax.errors import InputError
from covseg_jax.imaging.masks import MaskSettings, StudyMask, mask_on_study_grid
from covseg_jax.imaging.nifti import write_volume
from covseg_jax.imaging.studies import Study
from covseg_jax.imaging.workers import process_pool
from covseg_jax.manifest import fingerprint
from covseg_jax.predict.journal import Journal
from covseg_jax.predict.model import Measures, Model, measure, native_probability
from covseg_jax.predict.preview import write_preview
from covseg_jax.prepare.lungs import split_lungs
from covseg_jax.prepare.prepare_studies import PreparedCase, PrepareSettings, prepare_volume
from covseg_jax.prepare.study_files import read_image
from covseg_jax.segmentation.volumes import Probability

Row = dict[str, str | float]

_ENDINGS = {
    'mask': 'mask.nii.gz',
    'probability': 'probability.nii.gz',
    'preview': 'preview.png',
}
_MEASURES = ('lesion_ml', 'lung_ml', 'infection_percent')
COLUMNS = (
    'study_id',
    'status',
    *_MEASURES,
    'severity',
    'seconds',
    'mask',
    *(f'{side}_{name}' for side in ('right', 'left') for name in _MEASURES),
    'notes',
)


@dataclasses.dataclass(frozen=True)
class Extras:
    """What is written of a study beside its mask.

    Attributes:
      probability: `<study_id>_probability.nii.gz`, float32.
      preview: `<study_id>_preview.png`, slices with the lesions outlined.
      per_lung: volumes of either lung in results.csv.
    """

    probability: bool = False
    preview: bool = False
    per_lung: bool = False

    def files(self, study_id: str, output: pathlib.Path) -> list[pathlib.Path]:
        """What is written of a study."""
        kinds = ['mask', *(['probability'] * self.probability), *(['preview'] * self.preview)]
        return [_file_of(study_id, kind, output) for kind in kinds]


def _file_of(study_id: str, kind: str, output: pathlib.Path) -> pathlib.Path:
    return output / f'{study_id}_{_ENDINGS[kind]}'


def write_prediction(
    case: PreparedCase,
    probability: np.ndarray,
    settings: MaskSettings,
    output: pathlib.Path,
    wanted: Extras,
    study: Study,
) -> tuple[Row, list[pathlib.Path]]:
    """Brings a case's lesion probability (D, H, W) back onto the study's grid and writes
    `<study_id>_mask.nii.gz` (uint8, the study's shape and affine) and what is wanted beside it.

    Returns:
      A row of results.csv, and the files.
    """
    found = mask_on_study_grid(probability, case.lungs, case.geometry, settings)
    affine = np.asarray(case.geometry.affine)
    measures = measure(found.mask, found.lungs, case.geometry.study_voxel_ml)
    mask, probability_map, preview = (
        _file_of(case.study_id, kind, output) for kind in ('mask', 'probability', 'preview')
    )
    if wanted.probability:
        on_study_grid = native_probability(case, probability, found)
        write_volume(probability_map, on_study_grid, affine, written.new_file)
    if wanted.preview:
        _write_preview(preview, study, case, found, measures)
    write_volume(mask, found.mask, affine, written.new_file)
    row: Row = {'study_id': case.study_id, 'status': 'ok'}
    row |= _cells(measures) | {'severity': measures.severity, 'mask': mask.name}
    if wanted.per_lung:
        sides = split_lungs(found.lungs, case.geometry.spacing_mm)
        for name, lung in zip(('right', 'left'), sides, strict=True):
            of_lung = measure(found.mask, lung, case.geometry.study_voxel_ml)
            row |= {f'{name}_{key}': value for key, value in _cells(of_lung).items()}
    if case.notes:
        row['notes'] = '; '.join(case.notes)
    return row, wanted.files(case.study_id, output)


def _cells(measures: Measures) -> Row:
    return {name: round(getattr(measures, name), 4) for name in _MEASURES}


def _write_preview(
    path: pathlib.Path, study: Study, case: PreparedCase, found: StudyMask, measures: Measures
) -> None:
    write_preview(
        path,
        read_image(study).array,
        found.mask,
        found.lungs,
        case.geometry.spacing_mm,
        f'{case.study_id}: lesion {measures.lesion_ml:.1f} ml, infection '
        f'{measures.infection_percent:.1f} %, {measures.severity}',
        written.new_file,
    )


def predict_studies(
    studies: Sequence[Study],
    model: Model,
    output: pathlib.Path,
    *,
    num_workers: int = 1,
    wanted: Extras = Extras(),
    resume: bool = False,
) -> tuple[list[Row], list[str]]:
    """Segments studies and writes results.csv; a study that cannot be used is named in it and
    passed over. With several hosts, each does its share of them.

    While each device is at one study, other processes prepare the next ones and write those before:
    of each kind at most `num_workers` + 1 are under way, so that memory does not grow with their
    number.

    Args:
      studies: in the order of results.csv.
      model: the network.
      output: gets the masks; it is made where it is not there.
      num_workers: processes beside this one. One study alone is done without them.
      wanted: what is written beside the masks.
      resume: keep the studies that are done, by the same model and from the same files, and whose
        own files are as they were written.

    Returns:
      The rows of results.csv, and the messages of the studies passed over.

    Raises:
      InputError: a process was killed, or something that this program did not write lies in
        `output` where a file would go.
    """
    identity = fingerprint([model.identity, dataclasses.asdict(wanted)])
    journal = Journal(output, hosts.index(), identity)
    results = output / 'results.csv'
    own = hosts.share(studies)
    # Each host looks for what it would write over, and all refuse what one of them found.
    foreign = written.find_foreign([*journal.files(), results])
    found = [foreign or written.find_foreign(wanted.files(s.study_id, output)) for s in own]
    written.refuse_first(hosts.gather([path and str(path) for path in found], len(studies)))
    output.mkdir(parents=True, exist_ok=True)
    atomic.remove_leftovers(output)
    rows: dict[str, Row] = journal.read_done(own) if resume else {}
    to_do = [study for study in own if study.study_id not in rows]
    # Of an earlier run, with another model or of a scan that cannot be used any more.
    old = [results] if resume else [results, *journal.files()]
    hosts.first_alone(functools.partial(written.remove, old), 'old results are gone')
    for study in to_do:
        written.remove(_file_of(study.study_id, kind, output) for kind in _ENDINGS)
    journal.begin()
    finish = functools.partial(
        _finish, settings=model.masks, output=output, wanted=wanted, journal=journal
    )
    with tqdm(total=len(own), initial=len(rows), desc='predict', unit='study', disable=None) as bar:
        for row in _predict_each(to_do, model, finish, num_workers):
            rows[str(row['study_id'])] = row
            bar.update()
    all_rows = hosts.gather([rows[study.study_id] for study in own], len(studies))
    if hosts.is_first():
        _write_results(results, all_rows)
    return all_rows, [str(row['status']) for row in all_rows if row['status'] != 'ok']


def _predict_each(
    to_do: Sequence[Study], model: Model, finish: Callable[..., Row], num_workers: int
) -> Iterator[Row]:
    """The studies' rows, in the order in which they are done. `finish` writes what was found."""
    devices = model.probabilities[: max(1, len(to_do))]
    with (
        process_pool(min(num_workers, len(to_do) - 1), 'predict') as pool,
        _threads(len(devices)) as threads,
    ):
        to_prepare, preparing, running, writing = deque(to_do), deque(), deque(), deque()

        def collect(most_running: int, most_writing: int) -> Iterator[Row]:
            while len(running) > most_running:
                study, job = running.popleft()
                writing.append(pool.submit(finish, study, *job.result()))
            while len(writing) > most_writing:
                yield writing.popleft().result()

        for number, study in enumerate(to_do):
            while to_prepare and len(preparing) <= num_workers:
                preparing.append(pool.submit(_prepare, to_prepare.popleft(), model.preparation))
            try:
                case, seconds = preparing.popleft().result()
            except InputError as error:
                yield {'study_id': study.study_id, 'status': str(error)}
                continue
            device = number % len(devices)
            running.append((study, threads[device].submit(_run, devices[device], case, seconds)))
            yield from collect(len(devices) - 1, num_workers)
        yield from collect(0, 0)


def _prepare(study: Study, settings: PrepareSettings) -> tuple[PreparedCase, float]:
    began = time.monotonic()
    return prepare_volume(study, settings), time.monotonic() - began


def _run(
    predict: Probability, case: PreparedCase, seconds: float
) -> tuple[PreparedCase, np.ndarray, float]:
    began = time.monotonic()
    probability = predict(case.image, case.lungs)
    return case, probability, seconds + time.monotonic() - began


def _finish(
    study: Study,
    case: PreparedCase,
    probability: np.ndarray,
    seconds: float,
    *,
    settings: MaskSettings,
    output: pathlib.Path,
    wanted: Extras,
    journal: Journal,
) -> Row:
    began = time.monotonic()
    row, files = write_prediction(case, probability, settings, output, wanted, study)
    row['seconds'] = round(seconds + time.monotonic() - began, 3)
    journal.append(study, row, files)
    return row


@contextlib.contextmanager
def _threads(number: int) -> Iterator[list[futures.Executor]]:
    """That many threads, each of which does one thing after the other."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(futures.ThreadPoolExecutor(1)) for _ in range(number)]


def _write_results(path: pathlib.Path, rows: Sequence[Row]) -> None:
    with written.new_file(path) as temporary, temporary.open('w', newline='') as file:
        writer = csv.DictWriter(file, COLUMNS, restval='')
        writer.writeheader()
        writer.writerows(rows)
