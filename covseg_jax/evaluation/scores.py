"""Scores of studies in three protocols, their tables and their summary.

The protocols (METHOD.md section 5), always named beside a number:
- `volume`: the whole study on its native grid, thresholded prediction. One row a study.
- `slice_infection_over_1pct`: the original paper's, on the model grid. One row a slice.
- `slice_all`: each native axial slice with true lesion, thresholded prediction. One row a slice.

`cases.csv` and `slices.csv` hold every row at full precision: `summarise(*read_tables(folder))`
gives the summary's figures again, bit for bit.
"""

import csv
import dataclasses
import io
import json
import math
import pathlib
from collections.abc import Iterable

import numpy as np

from covseg_jax import atomic
from covseg_jax.errors import InputError
from covseg_jax.evaluation import lesions, metrics, probabilities

PROTOCOLS = ('volume', 'slice_infection_over_1pct', 'slice_all')
SUMMARY_METRICS = (
    'dice',
    'sensitivity',
    'specificity_lung',
    'specificity_image',
    'hd95_mm',
    'nsd',
    'iou',
    'precision',
    'lesion_f1',
    'volume_error_ml',
    'volume_error_percent',
    'average_precision',
    'ece',
    'brier',
)
# Strata of studies by the infection of their lungs, and of true lesions by their size: (name, from,
# below).
INFECTION_STRATA = (
    ('under_1_percent', 0.0, 1.0),
    ('1_to_5_percent', 1.0, 5.0),
    ('5_to_25_percent', 5.0, 25.0),
    ('over_25_percent', 25.0, math.inf),
)
LESION_STRATA = (
    ('under_1_ml', 0.0, 1.0),
    ('1_to_10_ml', 1.0, 10.0),
    ('over_10_ml', 10.0, math.inf),
)
CASE_COLUMNS = (
    'study_id',
    'subject',
    'category',
    'dice',
    'iou',
    'sensitivity',
    'specificity_lung',
    'specificity_image',
    'precision',
    'hd95_mm',
    'nsd',
    'volume_ml_true',
    'volume_ml_predicted',
    'lung_ml',
    'infection_percent',
    'infection_percent_predicted',
    'volume_error_ml',
    'volume_error_percent',
    'lesion_f1',
    'lesions_true',
    'lesions_predicted',
    *(f'lesions_{name}' for name, _, _ in LESION_STRATA),
    *(f'lesions_found_{name}' for name, _, _ in LESION_STRATA),
    'average_precision',
    'ece',
    'brier',
)
SLICE_COLUMNS = (
    'study_id',
    'subject',
    'protocol',
    'slice',
    'dice',
    'sensitivity',
    'specificity_lung',
    'specificity_image',
    'infection_percent',
)
_TEXT_COLUMNS = ('study_id', 'subject', 'category', 'protocol')
_COUNT_COLUMNS = ('slice', *(name for name in CASE_COLUMNS if name.startswith('lesions_')))

NSD_TOLERANCE_MM = 2.0
ORIGINAL_MIN_INFECTION_PERCENT = 1.0
ORIGINAL_SHARE_OF_MAX = 0.2


@dataclasses.dataclass(frozen=True)
class CaseArrays:
    """What is scored of one study.

    Attributes:
      study_id: its name.
      category: 'CT-0' … 'CT-4', or None.
      truth, prediction, lungs: (Z, Y, X) boolean, native grid.
      spacing_mm: native voxel size along z, y, x.
      truth_model, lungs_model: (D, H, W) boolean, model grid.
      probability_model: (D, H, W) float in [0, 1], the network's output on the model grid.
      subject: whose study it is: what confidence intervals draw. '' is a subject of its own.

    Raises:
      InputError: arrays of one grid differ in shape, or the probability is not in [0, 1].
    """

    study_id: str
    category: str | None
    truth: np.ndarray
    prediction: np.ndarray
    lungs: np.ndarray
    spacing_mm: tuple[float, float, float]
    truth_model: np.ndarray
    probability_model: np.ndarray
    lungs_model: np.ndarray
    subject: str = ''

    def __post_init__(self):
        object.__setattr__(self, 'subject', self.subject or self.study_id)
        for grid in (
            ('truth', 'prediction', 'lungs'),
            ('truth_model', 'probability_model', 'lungs_model'),
        ):
            shapes = {name: getattr(self, name).shape for name in grid}
            if len(set(shapes.values())) > 1 or len(shapes[grid[0]]) != 3:
                listed = ', '.join(f'{name} {shape}' for name, shape in shapes.items())
                raise InputError(
                    f'{self.study_id}: masks on different grids ({listed}); '
                    'score masks that were made on the grid of their own scan'
                )
        probability = self.probability_model
        # Written so that a NaN fails it too.
        if probability.size and not (probability.min() >= 0 and probability.max() <= 1):
            raise InputError(
                f'{self.study_id}: the probability map has values outside [0, 1] or NaN; '
                'predict this study again'
            )


def _percent_of_lungs(mask: np.ndarray, lungs: np.ndarray) -> float:
    lung_voxels = int(np.count_nonzero(lungs))
    return 100 * int(np.count_nonzero(mask & lungs)) / lung_voxels if lung_voxels else math.nan


def _score_overlap(truth: np.ndarray, prediction: np.ndarray, lungs: np.ndarray) -> dict:
    image = metrics.count_confusion(truth, prediction)
    return {
        'dice': image.dice,
        'iou': image.iou,
        'sensitivity': image.sensitivity,
        'specificity_lung': metrics.count_confusion(truth, prediction, within=lungs).specificity,
        'specificity_image': image.specificity,
        'precision': image.precision,
        'infection_percent': _percent_of_lungs(truth, lungs),
    }


def _score_slices(
    arrays: CaseArrays,
    protocol: str,
    truth: np.ndarray,
    prediction: np.ndarray,
    lungs: np.ndarray,
    slices: Iterable[int],
) -> list[dict]:
    rows = []
    for z in slices:
        scores = _score_overlap(truth[z], prediction[z], lungs[z])
        row = scores | {
            'study_id': arrays.study_id,
            'subject': arrays.subject,
            'protocol': protocol,
            'slice': int(z),
        }
        rows.append({column: row[column] for column in SLICE_COLUMNS})
    return rows


def _score_volume(arrays: CaseArrays) -> dict:
    truth, prediction, lungs = arrays.truth, arrays.prediction, arrays.lungs
    voxel_ml = math.prod(float(step) for step in arrays.spacing_mm) / 1000
    volumes_ml = [float(np.count_nonzero(mask) * voxel_ml) for mask in (truth, prediction, lungs)]
    surfaces = metrics.surface_distances(truth, prediction, arrays.spacing_mm)
    row = _score_overlap(truth, prediction, lungs) | {
        'study_id': arrays.study_id,
        'subject': arrays.subject,
        'category': arrays.category,
        'hd95_mm': surfaces.hd95_mm,
        'nsd': surfaces.nsd(NSD_TOLERANCE_MM),
        'volume_ml_true': volumes_ml[0],
        'volume_ml_predicted': volumes_ml[1],
        'lung_ml': volumes_ml[2],
        'infection_percent_predicted': _percent_of_lungs(prediction, lungs),
        'volume_error_ml': abs(volumes_ml[1] - volumes_ml[0]),
        'volume_error_percent': 100 * abs(volumes_ml[1] - volumes_ml[0]) / volumes_ml[0]
        if volumes_ml[0]
        else math.nan,
    }
    row |= _score_lesions(truth, prediction, voxel_ml) | _score_probability(arrays)
    return {column: row[column] for column in CASE_COLUMNS}


def _score_lesions(truth: np.ndarray, prediction: np.ndarray, voxel_ml: float) -> dict:
    match = lesions.match_lesions(truth, prediction)
    size_ml = match.true_voxels * voxel_ml
    row = {
        'lesion_f1': match.f1,
        'lesions_true': len(size_ml),
        'lesions_predicted': match.num_predicted,
    }
    for name, low, high in LESION_STRATA:
        inside = (size_ml >= low) & (size_ml < high)
        row[f'lesions_{name}'] = int(inside.sum())
        row[f'lesions_found_{name}'] = int((match.covered[inside] > 0).sum())
    return row


def _score_probability(arrays: CaseArrays) -> dict:
    inside = arrays.lungs_model
    truth, probability = arrays.truth_model[inside], arrays.probability_model[inside]
    return {
        'average_precision': probabilities.average_precision(truth, probability),
        'ece': probabilities.expected_calibration_error(truth, probability),
        'brier': probabilities.brier_score(truth, probability),
    }


def score_case(arrays: CaseArrays) -> tuple[dict, list[dict]]:
    """Scores one study in the three protocols; an undefined score is NaN (rules in metrics.py).

    Volumes are in ml, distances in mm, `infection_percent` is 100 × lesion inside the lungs / lungs
    (of the study, or of the slice in a slice row). All but `infection_percent` and
    `specificity_lung` count every voxel of the study or slice, inside the lungs and out. Volume
    errors are absolute, in ml and in percent of the truth. `average_precision`, `ece` and `brier`
    are of the probabilities inside the lungs, on the model grid.

    The original's protocol (3DGAN_CT_Segmentation's notebook) keeps slices whose infection exceeds
    1 % and predicts output > 0.2 · max(output). Its text leaves open over what the maximum runs;
    here it is the whole study, on the model grid, and the 1 % is of the lung of the same slice.
    A study whose output is 0 everywhere has an empty prediction.

    Returns:
      (case_row, slice_rows): keys CASE_COLUMNS; SLICE_COLUMNS, with `slice` counted in the
      protocol's own grid.
    """
    with_lesion = np.flatnonzero(arrays.truth.any(axis=(1, 2)))
    slice_rows = _score_slices(
        arrays, 'slice_all', arrays.truth, arrays.prediction, arrays.lungs, with_lesion
    )
    probability = arrays.probability_model
    truth, lungs = arrays.truth_model, arrays.lungs_model
    above_share = probability > ORIGINAL_SHARE_OF_MAX * float(probability.max(initial=0))
    infected = [
        z
        for z in range(len(truth))
        if _percent_of_lungs(truth[z], lungs[z]) > ORIGINAL_MIN_INFECTION_PERCENT
    ]
    slice_rows += _score_slices(
        arrays, 'slice_infection_over_1pct', truth, above_share, lungs, infected
    )
    return _score_volume(arrays), slice_rows


def _none_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _summarise_metric(rows: list[dict], metric: str) -> dict:
    # Slice rows have no surface metrics: n = 0 and nothing undefined, for nothing was measured.
    measured = [row for row in rows if metric in row]
    values = np.array([row[metric] for row in measured], np.float64)
    defined = values[~np.isnan(values)]
    interval = metrics.bootstrap_interval(values, subjects=[row['subject'] for row in measured])
    return {
        'mean': float(defined.mean()) if defined.size else None,
        'std': float(defined.std(ddof=1)) if defined.size > 1 else None,
        'median': float(np.median(defined)) if defined.size else None,
        'ci95': [_none_if_nan(limit) for limit in interval],
        'n': int(defined.size),
        'undefined': int(values.size - defined.size),
    }


def summarise(case_rows: list[dict], slice_rows: list[dict]) -> dict:
    """The `protocols` object of summary.json: protocol → metric → figures.

    Each metric has `mean`, `std` (of the sample, n − 1), `median`, `ci95` [low, high], `n` defined
    values and how many are `undefined`, which are in no other figure. `ci95` is the percentile
    bootstrap over subjects, each of whom is drawn with all of its studies, and in slice protocols
    with all of their slices. A figure that cannot be computed is None; what is measured in `volume`
    only, such as the surface metrics (`hd95_mm`, `nsd`), has n = 0 elsewhere.
    """
    rows_of = {'volume': case_rows}
    for protocol in PROTOCOLS[1:]:
        rows_of[protocol] = [row for row in slice_rows if row['protocol'] == protocol]
    return {
        protocol: {metric: _summarise_metric(rows, metric) for metric in SUMMARY_METRICS}
        for protocol, rows in rows_of.items()
    }


def stratify(case_rows: list[dict]) -> dict:
    """The `strata` object of summary.json: the `volume` protocol's figures for studies of like
    infection (a study without infection is in none), and for true lesions of like size how many
    there are, how many were found (a voxel of them is predicted), and their share."""
    by_infection = {}
    for name, low, high in INFECTION_STRATA:
        rows = [
            r for r in case_rows if r['volume_ml_true'] and low <= r['infection_percent'] < high
        ]
        by_infection[name] = {metric: _summarise_metric(rows, metric) for metric in SUMMARY_METRICS}
    by_size = {}
    for name, _, _ in LESION_STRATA:
        count = int(sum(row[f'lesions_{name}'] for row in case_rows))
        found = int(sum(row[f'lesions_found_{name}'] for row in case_rows))
        by_size[name] = {'n': count, 'found': found, 'share': found / count if count else None}
    return {'infection': by_infection, 'lesion_size': by_size}


def _format_cell(value) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ''
    return str(value)  # of a float: the shortest text that reads back as the same number


def _write_table(path: pathlib.Path, columns: tuple[str, ...], rows: list[dict]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(columns)
    writer.writerows([_format_cell(row[column]) for column in columns] for row in rows)
    atomic.write_text(path, text.getvalue())


def write_tables(folder: pathlib.Path, case_rows: list[dict], slice_rows: list[dict]) -> None:
    """Writes cases.csv and slices.csv: full precision, an empty cell where a score is undefined."""
    folder = pathlib.Path(folder)
    _write_table(folder / 'cases.csv', CASE_COLUMNS, case_rows)
    _write_table(folder / 'slices.csv', SLICE_COLUMNS, slice_rows)


def _parse_cell(column: str, cell: str):
    if column in _TEXT_COLUMNS:
        return cell or None
    if column in _COUNT_COLUMNS:
        return int(cell)
    return float(cell) if cell else math.nan


def _parse_row(columns: tuple[str, ...], cells: dict) -> dict:
    # csv fills the end of a cut line with None, which must not pass for "undefined".
    if None in cells.values():
        raise ValueError('a line is cut short')
    return {column: _parse_cell(column, cells[column]) for column in columns}


def _read_table(path: pathlib.Path, columns: tuple[str, ...]) -> list[dict]:
    try:
        with path.open(encoding='utf-8', newline='') as file:
            reader = csv.DictReader(file)
            missing = [column for column in columns if column not in (reader.fieldnames or ())]
            if missing:
                raise InputError(f'{path}: no column {", ".join(missing)}; run evaluate again')
            return [_parse_row(columns, cells) for cells in reader]
    except FileNotFoundError:
        raise InputError(f'{path}: there is no such table; run evaluate first') from None
    except ValueError as error:
        raise InputError(f'{path}: {error}; the table is damaged, run evaluate again') from None


def read_tables(folder: pathlib.Path) -> tuple[list[dict], list[dict]]:
    """Reads what write_tables wrote: (case_rows, slice_rows), the same values to the last bit.

    Raises:
      InputError: a table is missing, lacks a column or holds something that is not a number.
    """
    folder = pathlib.Path(folder)
    return (
        _read_table(folder / 'cases.csv', CASE_COLUMNS),
        _read_table(folder / 'slices.csv', SLICE_COLUMNS),
    )


def write_summary(folder: pathlib.Path, summary: dict) -> None:
    """Writes summary.json, in JSON's strict form.

    Raises:
      ValueError: a figure is NaN or infinite; None is the way to say "undefined".
    """
    text = json.dumps(summary, indent=2, allow_nan=False)
    atomic.write_text(pathlib.Path(folder) / 'summary.json', text + '\n')
