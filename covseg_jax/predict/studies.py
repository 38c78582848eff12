"""Studies in -> NIfTI out on the same grid, with lesion ml, lung ml and infection %."""

import csv
import dataclasses
import functools
import json
import pathlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from contextlib import ExitStack
from typing import Any

import numpy as np
from tqdm import tqdm

from covseg_jax import atomic, hosts, written
from covseg_jax.errors import FileFault, InputError
from covseg_jax.imaging.geometry import from_canonical
from covseg_jax.imaging.masks import MaskSettings, StudyMask, mask_on_study_grid
from covseg_jax.imaging.nifti import write_volume
from covseg_jax.imaging.study import Study
from covseg_jax.imaging.workers import process_pool
from covseg_jax.manifest import fingerprint
from covseg_jax.predict import dicom_seg, uncertainty, viewer
from covseg_jax.predict.journal import Journal
from covseg_jax.predict.model import (
    RANGE,
    Measures,
    Model,
    measure,
    native_probability,
    range_cells,
    run_networks,
)
from covseg_jax.predict.preview import (
    DISAGREEMENT_COLOUR,
    LUNGS_COLOUR,
    PREDICTION_COLOUR,
    write_preview,
)
from covseg_jax.predict.record import describe_run, write_record
from covseg_jax.prepare.lung_report import measure_lungs
from covseg_jax.prepare.prepare_studies import PreparedCase, PrepareSettings, prepare_volume
from covseg_jax.prepare.study_files import read_image
from covseg_jax.prepare.two_lungs import split_lungs
from covseg_jax.segmentation.volumes import Probability

Row = dict[str, str | float]

_ENDINGS = {
    'mask': 'mask.nii.gz', 'probability': 'probability.nii.gz', 'preview': 'preview.png',
    'disagreement': 'disagreement.nii.gz',
    'record': 'results.json', 'view': 'view.json', 'dicom_seg': 'seg.dcm',
}  # fmt: skip
REPORT, METHODS = 'report.html', 'methods.txt'
_MEASURES = ('lesion_ml', 'lung_ml', 'infection_percent')
COLUMNS = (
    'study_id', 'status', *_MEASURES, 'severity', 'seconds', 'mask',
    *(f'{side}_{name}' for side in ('right', 'left') for name in _MEASURES), *RANGE, 'notes',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Extras:
    """What is written of a study beside its mask."""

    probability: bool = False  # `<study_id>_probability.nii.gz`, float32
    preview: bool = False  # `<study_id>_preview.png`, slices with the lesions outlined
    per_lung: bool = False  # lesions of either lung, in results.csv
    report: bool = False  # `report.html` of all studies, lesions of either lung, `methods.txt`
    dicom_seg: bool = False  # `<study_id>_seg.dcm`, of a DICOM series
    disagreement: bool = False  # `<study_id>_disagreement.nii.gz`, of several networks

    def files(self, study_id: str, output: pathlib.Path) -> list[pathlib.Path]:
        """What is written of a study."""
        asked = {
            'probability': self.probability, 'preview': self.preview, 'view': self.report,
            'dicom_seg': self.dicom_seg, 'disagreement': self.disagreement,
        }  # fmt: skip
        return [_file_of(study_id, kind, output) for kind in _ENDINGS if asked.get(kind, True)]


def _file_of(study_id: str, kind: str, output: pathlib.Path) -> pathlib.Path:
    # Of a view nobody has any use but the report that it goes into.
    hidden = '.' if kind == 'view' else ''
    return output / f'{hidden}{study_id}_{_ENDINGS[kind]}'


def write_prediction(
    case: PreparedCase,
    networks: np.ndarray,
    settings: MaskSettings,
    output: pathlib.Path,
    wanted: Extras,
    study: Study,
    model_identity: str,
    limits: viewer.Limits = viewer.FEW,
) -> Row:
    """Brings the mean of the networks' lesion probabilities of a case (N, D, H, W) back onto the
    study's grid and writes `<study_id>_mask.nii.gz` (uint8, the study's shape and affine) and what
    is wanted beside it. Returns a row of results.csv. `limits` are those of the report's pictures.

    Raises:
      FileFault: no DICOM Segmentation can be made of the study, where one is wanted.
    """
    probability = networks.mean(axis=0)
    found = mask_on_study_grid(probability, case.lungs, case.geometry, settings)
    affine = np.asarray(case.geometry.affine)
    measures = measure(found.mask, found.lungs, case.geometry.study_voxel_ml)
    place = {kind: _file_of(case.study_id, kind, output) for kind in _ENDINGS}
    if wanted.dicom_seg:  # first: what forbids it leaves nothing of the study
        masks = (from_canonical(each, affine) for each in (found.mask, found.lungs))
        dicom_seg.write_dicom_seg(place['dicom_seg'], study, *masks, model_identity)
    maps = {'probability': probability} if wanted.probability else {}
    if wanted.disagreement and len(networks) > 1:
        maps['disagreement'] = uncertainty.disagreement(networks)
    for kind, values in maps.items():
        on_study_grid = native_probability(case, values, found)
        write_volume(place[kind], on_study_grid, affine, written.new_file)
    image_hu = read_image(study).array if wanted.preview or wanted.report else None
    if wanted.preview:
        title = (
            f'{case.study_id}: lesion {measures.lesion_ml:.1f} ml, infection '
            f'{measures.infection_percent:.1f} %, {measures.severity}'
        )
        write_preview(
            place['preview'], image_hu, found.mask, found.lungs, case.geometry.spacing_mm, title
        )
    if wanted.report:
        view = _draw_view(case, image_hu, found, networks, settings, limits)
        written.write_text(place['view'], json.dumps(view))
    write_volume(place['mask'], found.mask, affine, written.new_file)
    row: Row = {'study_id': case.study_id, 'status': 'ok'}
    row |= _cells(measures) | {'severity': measures.severity, 'mask': place['mask'].name}
    row |= _cells_of_sides(case, found, with_lesions=wanted.per_lung or wanted.report)
    ends = range_cells(networks, case, settings, measures.lesion_ml)
    row |= {name: round(ml, 4) for name, ml in ends.items()}
    if case.notes:
        row['notes'] = '; '.join(case.notes)
    return row


def _cells_of_sides(case: PreparedCase, found: StudyMask, *, with_lesions: bool) -> Row:
    if not with_lesions:
        right_ml, left_ml = measure_lungs(
            found.lungs, case.geometry.spacing_mm, case.geometry.study_voxel_ml
        )
        return {'right_lung_ml': round(right_ml, 4), 'left_lung_ml': round(left_ml, 4)}
    row: Row = {}
    sides = split_lungs(found.lungs, case.geometry.spacing_mm)
    for name, lung in zip(('right', 'left'), sides, strict=True):
        of_lung = measure(found.mask, lung, case.geometry.study_voxel_ml)
        row |= {f'{name}_{key}': value for key, value in _cells(of_lung).items()}
    return row


def _draw_view(
    case: PreparedCase,
    image_hu: np.ndarray,
    found: StudyMask,
    networks: np.ndarray,
    settings: MaskSettings,
    limits: viewer.Limits,
) -> dict[str, Any]:
    # Of the lungs the outline alone, and below that of the lesions.
    layers = {
        'lungs': viewer.Layer(found.lungs, LUNGS_COLOUR, fill=0),
        'lesions': viewer.Layer(found.mask, PREDICTION_COLOUR, fill=40),
    }
    if len(networks) > 1:
        differ = uncertainty.where_networks_differ(networks, case.geometry, settings)
        layers['disagreement'] = viewer.Layer(differ & found.lungs, DISAGREEMENT_COLOUR, fill=110)
    return viewer.draw_views(
        case.study_id, image_hu, found.lungs, layers, case.geometry.spacing_mm, limits,
        most_of=('lesions', 'lungs'),
    )  # fmt: skip


def _cells(measures: Measures) -> Row:
    return {name: round(getattr(measures, name), 4) for name in _MEASURES}


def predict_studies(
    studies: Sequence[Study],
    model: Model,
    output: pathlib.Path,
    *,
    num_workers: int = 1,
    wanted: Extras = Extras(),
    resume: bool = False,
) -> tuple[list[Row], list[str]]:
    """Segments studies and writes results.csv and, where wanted, a report; a study that cannot be
    used is named in them and passed over. Each of several hosts does its share of them.

    While each device is at one study, other processes prepare the next ones and write those before:
    of each kind at most `num_workers` + 1 are under way, so that memory does not grow with their
    number.

    Args:
      studies: in the order of results.csv.
      model: the network.
      output: gets the masks; it is made where it is not there.
      num_workers: processes beside this one. One study alone is done without them.
      wanted: what is written beside the masks.
      resume: keep studies that the same model has done from the same files, and whose masks are as
        they were written.

    Returns:
      The rows of results.csv, and the messages of the studies passed over.

    Raises:
      InputError: a process was killed, or something that this program did not write lies in
        `output` where a file would go.
    """
    if model.num_networks == 1:  # it agrees with itself
        wanted = dataclasses.replace(wanted, disagreement=False)
    identity = fingerprint([model.identity, dataclasses.asdict(wanted)])
    journal, run = Journal(output, hosts.index(), identity), describe_run(model)
    results, *pages = (output / name for name in ('results.csv', REPORT, METHODS))
    files = [wanted.files(study.study_id, output) for study in studies]
    of_all = [*journal.files(), results, *(pages if wanted.report else [])]
    hosts.check_shared(written.refuse_foreign, [of_all, *files])
    output.mkdir(parents=True, exist_ok=True)
    atomic.remove_leftovers(output)
    own = hosts.share(studies)
    rows: dict[str, Row] = journal.read_done(own) if resume else {}
    to_do = [study for study in own if study.study_id not in rows]
    # Of an earlier run, with another model or of a scan that cannot be used any more.
    old = [results, *pages] if resume else [results, *pages, *journal.files()]
    hosts.first_alone(functools.partial(written.remove, old), 'old results are gone')
    for study in to_do:
        written.remove(_file_of(study.study_id, kind, output) for kind in _ENDINGS)
    journal.begin()
    to_write = _ToWrite(
        journal, model.masks, model.identity, wanted, run, viewer.limits_of(len(studies))
    )
    finish = functools.partial(_finish, to_write)
    check = dicom_seg.read_slices if wanted.dicom_seg else None
    with tqdm(total=len(own), initial=len(rows), desc='predict', unit='study', disable=None) as bar:
        for row in predict_each(to_do, model, finish, num_workers, check):
            rows[str(row['study_id'])] = row
            bar.update()
    all_rows = hosts.gather([rows[study.study_id] for study in own], len(studies))
    if hosts.is_first():
        _write_table(results, all_rows)
        if wanted.report:
            _write_pages(output, all_rows)
    return all_rows, [str(row['status']) for row in all_rows if row['status'] != 'ok']


def predict_each(
    to_do: Sequence[Study],
    model: Model,
    finish: Callable[..., Row],
    num_workers: int,
    check: Callable[[Study], object] | None = None,
) -> Iterator[Row]:
    """The studies' rows, in the order in which they are done.

    `finish` takes a study, its case, the lesion probabilities (N, D, H, W) of the model's networks
    and the seconds so far, and gives the row. `check` raises a FileFault of a study that is not to
    be begun. Both run in other processes: they can be pickled. Of a study that cannot be used the
    row is its id and, as `status`, the fault.
    """
    devices = model.probabilities[: max(1, len(to_do))]
    with process_pool(min(num_workers, len(to_do) - 1), 'predict') as pool, ExitStack() as stack:
        # Each thread does one thing after the other.
        threads = [stack.enter_context(futures.ThreadPoolExecutor(1)) for _ in devices]
        to_prepare, preparing, running, writing = deque(to_do), deque(), deque(), deque()

        def collect(most_running: int, most_writing: int) -> Iterator[Row]:
            while len(running) > most_running:
                study, job = running.popleft()
                writing.append(pool.submit(finish, study, *job.result()))
            while len(writing) > most_writing:
                yield writing.popleft().result()

        for number, study in enumerate(to_do):
            while to_prepare and len(preparing) <= num_workers:
                study_ahead = to_prepare.popleft()
                preparing.append(pool.submit(_prepare, study_ahead, model.preparation, check))
            try:
                case, seconds = preparing.popleft().result()
            except InputError as error:
                yield {'study_id': study.study_id, 'status': str(error)}
                continue
            device = number % len(devices)
            running.append((study, threads[device].submit(_run, devices[device], case, seconds)))
            yield from collect(len(devices) - 1, num_workers)
        yield from collect(0, 0)


def _prepare(
    study: Study, settings: PrepareSettings, check: Callable[[Study], object] | None
) -> tuple[PreparedCase, float]:
    began = time.monotonic()
    if check:
        check(study)
    return prepare_volume(study, settings), time.monotonic() - began


def _run(
    predict: Probability, case: PreparedCase, seconds: float
) -> tuple[PreparedCase, np.ndarray, float]:
    began = time.monotonic()
    networks = run_networks(predict, case.image, case.lungs)
    return case, networks, seconds + time.monotonic() - began


@dataclasses.dataclass(frozen=True)
class _ToWrite:
    """What is written of each study, and where."""

    journal: Journal
    masks: MaskSettings
    model_identity: str
    wanted: Extras
    run: Mapping[str, Any]  # from `describe_run`
    limits: viewer.Limits


def _finish(
    what: _ToWrite, study: Study, case: PreparedCase, networks: np.ndarray, seconds: float
) -> Row:
    began, folder = time.monotonic(), what.journal.folder
    try:
        row = write_prediction(
            case, networks, what.masks, folder, what.wanted, study, what.model_identity,
            what.limits,
        )  # fmt: skip
    except FileFault as fault:
        return {'study_id': study.study_id, 'status': str(fault)}
    row['seconds'] = round(seconds + time.monotonic() - began, 3)
    write_record(_file_of(study.study_id, 'record', folder), study, case, row, what.run)
    what.journal.append(study, row, what.wanted.files(study.study_id, folder))
    return row


def _write_table(path: pathlib.Path, rows: Sequence[Row]) -> None:
    with written.new_file(path) as temporary, temporary.open('w', newline='') as file:
        writer = csv.DictWriter(file, COLUMNS, restval='')
        writer.writeheader()
        writer.writerows(rows)


def _write_pages(output: pathlib.Path, rows: Sequence[Row]) -> None:
    # Here and not above: processes that write masks do without its template engine.
    from covseg_jax.predict.methods import describe_methods
    from covseg_jax.predict.report import render_report

    def read(study_id: str, kind: str) -> dict[str, Any]:
        return json.loads(_file_of(study_id, kind, output).read_text(encoding='utf-8'))

    done = [str(row['study_id']) for row in rows if row['status'] == 'ok']
    records = [read(study_id, 'record') for study_id in done]
    set_aside = {str(row['study_id']): str(row['status']) for row in rows if row['status'] != 'ok'}
    methods = describe_methods(records, len(set_aside))
    page = render_report(records, set_aside, methods, lambda study_id: read(study_id, 'view'))
    written.write_text(output / REPORT, page)
    paragraph, references = methods
    written.write_text(output / METHODS, f'{paragraph}\n\n{references}')
