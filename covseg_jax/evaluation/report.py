"""The one-file HTML page of an evaluation."""

import base64
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence

import jinja2

from covseg_jax import atomic
from covseg_jax.evaluation.figures import METRIC_TITLES, PROTOCOL_TITLES
from covseg_jax.evaluation.scores import NSD_TOLERANCE_MM
from covseg_jax.predict.preview import PREDICTION_COLOUR, PSEUDO_COLOUR, TRUTH_COLOUR

_CASE_COLUMN_TITLES = {
    'study_id': 'Study',
    'category': 'Category',
    'dice': 'Dice',
    'iou': 'IoU',
    'sensitivity': 'Sensitivity',
    'specificity_lung': 'Specificity (lungs)',
    'specificity_image': 'Specificity (image)',
    'precision': 'Precision',
    'hd95_mm': 'HD95 (mm)',
    'nsd': f'NSD ({NSD_TOLERANCE_MM:g} mm)',
    'volume_ml_true': 'True lesion (ml)',
    'volume_ml_predicted': 'Predicted lesion (ml)',
    'lung_ml': 'Lungs (ml)',
    'infection_percent': 'Infection (%)',
    'infection_percent_predicted': 'Predicted infection (%)',
    'lesion_f1': 'F1 of lesions',
    'average_precision': 'Average precision',
}


def _format_number(value: float | None, digits: int = 3) -> str:
    return '–' if value is None or math.isnan(value) else f'{value:.{digits}f}'


def _protocol_table(protocol: str, metrics: Mapping[str, Mapping]) -> dict:
    rows = []
    for metric, figures in metrics.items():
        low, high = figures['ci95']
        interval = '–' if low is None else f'{low:.3f} … {high:.3f}'
        rows.append(
            [METRIC_TITLES.get(metric, metric)]
            + [_format_number(figures[name]) for name in ('mean', 'std', 'median')]
            + [interval, str(figures['n']), str(figures['undefined'])]
        )
    # Surface metrics are not measured on slices: a row of dashes would say nothing.
    rows = [row for row in rows if row[-2:] != ['0', '0']]
    return {'name': protocol, 'title': PROTOCOL_TITLES.get(protocol, protocol), 'rows': rows}


_STRATUM_METRICS = ('dice', 'sensitivity', 'specificity_lung', 'nsd', 'lesion_f1')
_STRATUM_TITLES = {
    'under_1_percent': '< 1 %',
    '1_to_5_percent': '1 – 5 %',
    '5_to_25_percent': '5 – 25 %',
    'over_25_percent': '≥ 25 %',
    'under_1_ml': '< 1 ml',
    '1_to_10_ml': '1 – 10 ml',
    'over_10_ml': '≥ 10 ml',
}


def _mean_cell(figures: Mapping) -> str:
    low, high = figures['ci95']
    interval = '' if low is None else f' ({low:.3f} … {high:.3f})'
    return _format_number(figures['mean']) + interval


def _strata_tables(strata: Mapping) -> list[dict]:
    infection = [
        [_STRATUM_TITLES[name], str(metrics['dice']['n'])]
        + [_mean_cell(metrics[metric]) for metric in _STRATUM_METRICS]
        for name, metrics in strata['infection'].items()
    ]
    size = [
        [_STRATUM_TITLES[name], str(each['n']), str(each['found']), _format_number(each['share'])]
        for name, each in strata['lesion_size'].items()
    ]
    return [
        {
            'title': 'Studies by infection of the lungs',
            'head': ['Infection', 'n', *(METRIC_TITLES[metric] for metric in _STRATUM_METRICS)],
            'rows': infection,
        },
        {
            'title': 'True lesions by size',
            'head': ['Size', 'Lesions', 'Found', 'Share'],
            'rows': size,
        },
    ]


def _case_cell(column: str, value) -> dict:
    """Text to show and key to sort by; an empty key sorts last, whichever way."""
    if isinstance(value, str) or value is None:
        return {'text': value or '–', 'key': value or '', 'number': False}
    key = '' if math.isnan(value) else repr(float(value))
    digits = 3 if column in METRIC_TITLES else 1
    digits = {'hd95_mm': 1, 'infection_percent': 2, 'infection_percent_predicted': 2}.get(
        column, digits
    )
    return {'text': _format_number(value, digits), 'key': key, 'number': True}


def _run_lines(run: Mapping) -> list[tuple[str, str]]:
    return [
        (str(name), value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
        for name, value in run.items()
    ]


def write_report(
    folder: pathlib.Path,
    summary: Mapping,
    case_rows: list[dict],
    figures: Sequence[str | os.PathLike],
    run: Mapping,
    views: Sequence[Mapping] = (),
) -> pathlib.Path:
    """Writes report.html: one file that opens from disk without a network.

    Args:
      folder: the evaluation folder.
      summary: the content of summary.json; `pseudo_masks` and `strata` are shown where they are.
      case_rows: as `scores.score_case` makes them; listed worst Dice first, undefined last.
      figures: PNG files, copied into the page in this order.
      run: name → value (text or anything JSON can say), shown at the top.
      views: what `viewer.draw_views` made of some or all of the cases.

    Returns:
      The path of report.html.
    """
    # Not select_autoescape: it goes by the ending, and .j2 is not one that it escapes.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    worst_first = sort_worst_first(case_rows)
    place = {row['study_id']: number for number, row in enumerate(worst_first)}
    sections = [('Prediction against the true masks', summary['protocols'])]
    if summary.get('pseudo_masks'):
        sections.append(('Pseudo-masks against the true masks', summary['pseudo_masks']))
    page = environment.get_template('report.html.j2').render(
        run=_run_lines(run),
        headline=[
            (METRIC_TITLES[metric], _mean_cell(summary['protocols']['volume'][metric]))
            for metric in ('dice', 'sensitivity', 'specificity_lung')
        ],
        sections=[
            (title, [_protocol_table(name, metrics) for name, metrics in protocols.items()])
            for title, protocols in sections
        ],
        strata=_strata_tables(summary['strata']) if 'strata' in summary else [],
        figures=[
            {
                'name': pathlib.Path(path).stem.replace('_', ' '),
                'base64': base64.b64encode(pathlib.Path(path).read_bytes()).decode('ascii'),
            }
            for path in figures
        ],
        columns=list(_CASE_COLUMN_TITLES.items()),
        cases=[
            [_case_cell(name, row[name]) for name in _CASE_COLUMN_TITLES] for row in worst_first
        ],
        undefined=[row['study_id'] for row in worst_first if math.isnan(row['dice'])],
        views=sorted(views, key=lambda view: place[view['study_id']]),
        viewed={view['study_id'] for view in views},
        colours={
            'truth': TRUTH_COLOUR, 'pseudo-mask': PSEUDO_COLOUR, 'prediction': PREDICTION_COLOUR
        },
    )  # fmt: skip
    path = pathlib.Path(folder) / 'report.html'
    atomic.write_text(path, page)
    return path


def sort_worst_first(case_rows: list[dict]) -> list[dict]:
    """By Dice, those without one last."""
    return sorted(
        case_rows, key=lambda row: (math.isnan(row['dice']), row['dice'], row['study_id'])
    )
