"""Scores of studies in three protocols, their tables and their summary.

The protocols (method.md section 5), always named beside a number:
- `volume`: the whole study on its native grid, thresholded prediction. One row a study.
- `slice_infection_over_1pct`: the original paper's, on the model grid. One row a slice.
- `slice_all`: each native axial slice with true lesion, thresholded prediction. One row a slice.

`cases.csv` and `slices.csv` hold every row at full precision: `summarise(*read_tables(folder))`
gives the summary's figures again, bit for bit.
"""

import csv
import io
import json
import math
import pathlib
from collections.abc import Iterator

import numpy as np

from covseg_jax import atomic
from covseg_jax.errors import InputError
from covseg_jax.evaluation import metric_table, metrics
from covseg_jax.evaluation.metric_table import COLUMNS, CaseArrays

ORIGINAL_MIN_INFECTION_PERCENT = 1.0
ORIGINAL_SHARE_OF_MAX = 0.2

_SLICE_SCORES = tuple(column for column in COLUMNS if 'slices' in column.shown)
CASE_COLUMNS = tuple(column.name for column in COLUMNS)
SLICE_COLUMNS = (
    'study_id', 'subject', 'protocol', 'slice', *(column.name for column in _SLICE_SCORES)
)  # fmt: skip
_TABLES = {'cases.csv': CASE_COLUMNS, 'slices.csv': SLICE_COLUMNS}
_KINDS = {column.name: column.kind for column in COLUMNS} | {'protocol': str, 'slice': int}


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
    probability = arrays.probability_model
    above_share = probability > ORIGINAL_SHARE_OF_MAX * float(probability.max(initial=0))
    native = _slices(arrays, arrays.truth, arrays.prediction, arrays.lungs)
    model = _slices(arrays, arrays.truth_model, above_share, arrays.lungs_model)
    slice_rows = [_score_slice('slice_all', z, each) for z, each in native if each.truth.any()]
    slice_rows += [
        _score_slice('slice_infection_over_1pct', z, each)
        for z, each in model
        if each.percent_of_lungs(each.truth) > ORIGINAL_MIN_INFECTION_PERCENT
    ]
    return {column.name: column.score(arrays) for column in COLUMNS}, slice_rows


def _slices(case: CaseArrays, *masks: np.ndarray) -> Iterator[tuple[int, CaseArrays]]:
    for z in range(len(masks[0])):
        truth, prediction, lungs = (mask[z : z + 1] for mask in masks)
        yield z, CaseArrays(
            case.study_id, case.category, truth, prediction, lungs, case.spacing_mm,
            subject=case.subject, voxel_ml=case.voxel_ml,
        )  # fmt: skip


def _score_slice(protocol: str, z: int, arrays: CaseArrays) -> dict:
    row = {'study_id': arrays.study_id, 'subject': arrays.subject, 'protocol': protocol, 'slice': z}
    return row | {column.name: column.score(arrays) for column in _SLICE_SCORES}


def rows_by_protocol(case_rows: list[dict], slice_rows: list[dict]) -> dict[str, list[dict]]:
    """The rows of each of PROTOCOLS."""
    return {
        name: case_rows
        if name == 'volume'
        else [row for row in slice_rows if row['protocol'] == name]
        for name in metric_table.PROTOCOLS
    }


def _summarise_rows(rows: list[dict]) -> dict[str, dict]:
    return {metric.name: _summarise_metric(rows, metric.name) for metric in metric_table.METRICS}


def _summarise_metric(rows: list[dict], metric: str) -> dict:
    # Slice rows lack some metrics: n = 0 and nothing undefined, for nothing was measured.
    measured = [row for row in rows if metric in row]
    values = np.array([row[metric] for row in measured], np.float64)
    defined = values[~np.isnan(values)]
    interval = metrics.bootstrap_interval(values, subjects=[row['subject'] for row in measured])
    return {
        'mean': float(defined.mean()) if defined.size else None,
        'std': float(defined.std(ddof=1)) if defined.size > 1 else None,
        'median': float(np.median(defined)) if defined.size else None,
        'ci95': [None if math.isnan(limit) else limit for limit in interval],
        'n': int(defined.size),
        'undefined': int(values.size - defined.size),
    }


def summarise(case_rows: list[dict], slice_rows: list[dict]) -> dict:
    """The `protocols` object of summary.json: protocol → metric → figures.

    Each metric has `mean`, `std` (of the sample, n − 1), `median`, `ci95` [low, high], `n` defined
    values, and `undefined`, how many values are not defined and count in no other figure. `ci95` is
    the percentile bootstrap over subjects, each of whom is drawn with all of its studies, and in
    slice protocols with all of their slices. A figure that cannot be computed is None. A metric
    that a protocol does not have has n = 0 there.
    """
    rows_of = rows_by_protocol(case_rows, slice_rows)
    return {protocol: _summarise_rows(rows) for protocol, rows in rows_of.items()}


def stratify(case_rows: list[dict]) -> dict:
    """The `strata` object of summary.json: the `volume` protocol's figures for studies of like
    infection (a study without infection is in none), and for true lesions of like size how many
    there are, how many were found (a voxel of them is predicted), and their share."""
    infected = [row for row in case_rows if row['volume_ml_true']]
    by_infection = {
        name: _summarise_rows([row for row in infected if low <= row['infection_percent'] < high])
        for name, _, low, high in metric_table.INFECTION_STRATA
    }
    by_size = {}
    for name, *_ in metric_table.LESION_STRATA:
        count = int(sum(row[f'lesions_{name}'] for row in case_rows))
        found = int(sum(row[f'lesions_found_{name}'] for row in case_rows))
        by_size[name] = {'n': count, 'found': found, 'share': found / count if count else None}
    return {'infection': by_infection, 'lesion_size': by_size}


def make_summary(case_rows: list[dict], slice_rows: list[dict], **more: dict | None) -> dict:
    """The content of summary.json, with `more` of the masks behind `protocols`."""
    return {
        'protocols': summarise(case_rows, slice_rows),
        **more,
        'strata': stratify(case_rows),
        'studies': len(case_rows),
        'subjects': len({row['subject'] for row in case_rows}),
    }


def write_tables(folder: pathlib.Path, case_rows: list[dict], slice_rows: list[dict]) -> None:
    """Writes cases.csv and slices.csv: full precision, an empty cell where a score is undefined."""
    for (name, columns), rows in zip(_TABLES.items(), (case_rows, slice_rows), strict=True):
        text = io.StringIO()
        writer = csv.writer(text, lineterminator='\n')
        writer.writerow(columns)
        for row in rows:
            # NaN equals nothing. A float is written as the shortest text that gives it back.
            cells = [row[column] for column in columns]
            writer.writerow(['' if cell != cell else cell for cell in cells])
        atomic.write_text(folder / name, text.getvalue())


def _parse_row(columns: tuple[str, ...], cells: dict) -> dict:
    # csv fills the end of a cut line with None, which must not pass for "undefined".
    if None in cells.values():
        raise ValueError('a line is cut short')
    empty = {str: None, float: math.nan}
    row = {}
    for column in columns:
        kind, cell = _KINDS[column], cells[column]
        row[column] = kind(cell) if cell or kind is int else empty[kind]
    return row


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
    case_rows, slice_rows = (_read_table(folder / name, each) for name, each in _TABLES.items())
    return case_rows, slice_rows


def write_summary(folder: pathlib.Path, summary: dict) -> None:
    """Writes summary.json. Raises ValueError where a figure is NaN or infinite: strict JSON has
    neither, and "undefined" is None."""
    text = json.dumps(summary, indent=2, allow_nan=False)
    atomic.write_text(folder / 'summary.json', text + '\n')
