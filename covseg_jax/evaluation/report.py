"""The one-file HTML page of an evaluation."""

import base64
import json
import math
import pathlib
from collections.abc import Mapping, Sequence

from covseg_jax import atomic
from covseg_jax.evaluation import metric_table
from covseg_jax.evaluation.figures import MASK_COLOURS
from covseg_jax.predict.page import make_environment

_ENVIRONMENT = make_environment(pathlib.Path(__file__).parent)
_SLICES = 'The three slices with most lesion of the study with the {} Dice.'
_CAPTIONS = {  # of figures by the stems of their files
    **{
        f'{metric.removesuffix("_lung")}_vs_infection': (
            f'{metric_table.TITLES[metric]} against the infected share of the lungs. Each point is '
            'a study or a slice, the line is the running median, the band the middle half.'
        )
        for metric in metric_table.metrics_shown('headline')
    },
    'bland_altman': (
        'Predicted minus true lesion volume against the mean of the two. Each point is a study, '
        'and the lines are the mean difference and 1.96 standard deviations around it.'
    ),
    'calibration': (
        'The share of voxels that are lesion against the predicted probability, and how many '
        'voxels have it. A calibrated network lies on the diagonal.'
    ),
    **{f'case_{role}': _SLICES.format(role) for role in ('best', 'median', 'worst')},
    'progress': (
        'The losses, the validation and the learning rate of the trainings, step by step, and '
        'what the networks made of the same slices at several steps.'
    ),
}
_CASE_COLUMNS = [column for column in metric_table.COLUMNS if column.digits is not None]


def _format_number(value: float | None, digits: int = 3) -> str:
    return '–' if value is None or math.isnan(value) else f'{value:.{digits}f}'


def _protocol_table(protocol: str, metrics: Mapping[str, Mapping]) -> dict:
    rows = []
    for metric, figures in metrics.items():
        if not figures['n'] + figures['undefined']:
            continue  # the protocol does not have it: a row of dashes would say nothing
        low, high = figures['ci95']
        interval = '–' if low is None else f'{low:.3f} … {high:.3f}'
        rows.append(
            [metric_table.TITLES[metric]]
            + [_format_number(figures[name]) for name in ('mean', 'std', 'median')]
            + [interval, figures['n'], figures['undefined']]
        )
    return {'name': protocol, 'title': metric_table.PROTOCOLS[protocol], 'rows': rows}


def _mean_cell(figures: Mapping) -> str:
    low, high = figures['ci95']
    interval = '' if low is None else f' ({low:.3f} … {high:.3f})'
    return _format_number(figures['mean']) + interval


def _strata_tables(strata: Mapping) -> list[tuple]:
    """(title, head, rows) of each."""
    shown = metric_table.metrics_shown('strata')
    infection, size = [], []
    for name, title, *_ in metric_table.INFECTION_STRATA:
        metrics = strata['infection'][name]
        means = [_mean_cell(metrics[metric]) for metric in shown]
        infection.append([title, metrics['dice']['n'], *means])
    for name, title, *_ in metric_table.LESION_STRATA:
        each = strata['lesion_size'][name]
        size.append([title, each['n'], each['found'], _format_number(each['share'])])
    head = ['Infection', 'n', *(metric_table.TITLES[metric] for metric in shown)]
    return [
        ('Studies by infection of the lungs', head, infection),
        ('True lesions by size', ['Size', 'Lesions', 'Found', 'Share'], size),
    ]


def _case_cell(column: metric_table.Column, value: str | float | None) -> dict:
    """Text to show and key to sort by; an empty key sorts last in either direction."""
    if column.kind is str:
        return {'text': value or '–', 'key': value or '', 'number': False}
    key = '' if math.isnan(value) else repr(float(value))
    return {'text': _format_number(value, column.digits), 'key': key, 'number': True}


def write_report(
    folder: pathlib.Path,
    summary: Mapping,
    case_rows: list[dict],
    figures: Sequence[pathlib.Path],
    run: Mapping,
    views: Sequence[Mapping] = (),
) -> pathlib.Path:
    """Writes report.html into the folder: one file that opens from disk without a network.

    Args:
      summary: the content of summary.json; `pseudo_masks` and `strata` are shown where they are.
      case_rows: as `scores.score_case` makes them; listed worst Dice first, undefined last.
      figures: PNG files, copied into the page in this order.
      run: name → value (text or anything JSON can say), shown at the top.
      views: what `predict.viewer.draw_views` made of some or all of the cases.
    """
    worst_first = sort_worst_first(case_rows)
    place = {row['study_id']: number for number, row in enumerate(worst_first)}
    sections = {
        'Prediction against the true masks': summary['protocols'],
        'Pseudo-masks against the true masks': summary.get('pseudo_masks'),
    }
    volume = summary['protocols']['volume']
    page = _ENVIRONMENT.get_template('report.html.j2').render(
        run=[
            (name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
            for name, value in run.items()
        ],
        headline=[
            (metric_table.TITLES[metric], _mean_cell(volume[metric]))
            for metric in metric_table.metrics_shown('headline')
        ],
        sections=[
            (title, [_protocol_table(*each) for each in protocols.items()])
            for title, protocols in sections.items()
            if protocols
        ],
        strata=_strata_tables(summary['strata']) if 'strata' in summary else [],
        figures=[
            (
                _CAPTIONS.get(path.stem, path.stem),
                base64.b64encode(path.read_bytes()).decode('ascii'),
            )
            for path in figures
        ],
        columns=_CASE_COLUMNS,
        cases=[[_case_cell(each, row[each.name]) for each in _CASE_COLUMNS] for row in worst_first],
        undefined=[row['study_id'] for row in worst_first if math.isnan(row['dice'])],
        views=sorted(views, key=lambda view: place[view['study_id']]),
        viewed={view['study_id'] for view in views},
        colours=MASK_COLOURS,
    )
    path = folder / 'report.html'
    atomic.write_text(path, page)
    return path


def sort_worst_first(case_rows: list[dict]) -> list[dict]:
    """By Dice, those without one last."""
    return sorted(
        case_rows, key=lambda row: (math.isnan(row['dice']), row['dice'], row['study_id'])
    )
