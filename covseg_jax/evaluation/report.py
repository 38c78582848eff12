"""Figures and the one-file HTML page of an evaluation."""

import base64
import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence

import jinja2
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from covseg_jax import atomic
from covseg_jax.evaluation import evaluate

# Level -600, width 1500 HU: the window in which lungs are read.
LUNG_WINDOW_HU = (-1350.0, 150.0)
# Okabe and Ito's colours, told apart by colour-blind readers too.
TRUTH_COLOUR, PSEUDO_COLOUR, PREDICTION_COLOUR = '#009e73', '#56b4e9', '#e69f00'
POINT_COLOUR, TREND_COLOUR = '#0072b2', '#d55e00'

PROTOCOL_TITLES = {
    'volume': 'Whole study, native grid',
    'slice_infection_over_1pct': 'Slices with infection > 1 %, output > 0.2 · max',
    'slice_all': 'All slices with lesion, native grid',
}
METRIC_TITLES = {
    'dice': 'Dice',
    'sensitivity': 'Sensitivity',
    'specificity_lung': 'Specificity in the lungs',
    'specificity_image': 'Specificity, whole image',
    'hd95_mm': 'HD95 (mm)',
    'nsd': f'Surface Dice at {evaluate.NSD_TOLERANCE_MM:g} mm',
    'iou': 'IoU',
    'precision': 'Precision',
    'lesion_f1': 'F1 of lesions',
    'volume_error_ml': 'Volume error (ml)',
    'volume_error_percent': 'Volume error (%)',
    'average_precision': 'Average precision',
    'ece': 'Calibration error',
    'brier': 'Brier score',
}
_FIGURES_AGAINST_INFECTION = {
    'dice': 'dice_vs_infection.png',
    'sensitivity': 'sensitivity_vs_infection.png',
    'specificity_lung': 'specificity_vs_infection.png',
}
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
    'nsd': f'NSD ({evaluate.NSD_TOLERANCE_MM:g} mm)',
    'volume_ml_true': 'True lesion (ml)',
    'volume_ml_predicted': 'Predicted lesion (ml)',
    'lung_ml': 'Lungs (ml)',
    'infection_percent': 'Infection (%)',
    'infection_percent_predicted': 'Predicted infection (%)',
    'lesion_f1': 'F1 of lesions',
    'average_precision': 'Average precision',
}
_MIN_POINTS_FOR_TREND = 10


@dataclasses.dataclass(frozen=True)
class OverlayCase:
    """What is drawn of one study, all on its native grid.

    Attributes:
      study_id: its name. dice: its volume Dice.
      image_hu: (Z, Y, X) in HU, canonical: `imshow(image_hu[z])` is the radiological view.
      truth, prediction: (Z, Y, X) boolean. pseudo_mask: the same, or None.
      spacing_mm: voxel size along z, y, x.
    """

    study_id: str
    dice: float
    image_hu: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray
    pseudo_mask: np.ndarray | None
    spacing_mm: tuple[float, float, float]


def _save(figure: Figure, path: pathlib.Path) -> pathlib.Path:
    with atomic.new_file(path) as temporary:
        figure.savefig(temporary, format='png', dpi=110, metadata={'Software': None})
    return path


def running_median(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Median of y over windows of neighbouring x: a fifth of the points each, five at least.

    Args:
      x, y: (N,) finite, N >= 5.

    Returns:
      (N - w + 1,) the median x and the median y of each window of w points.
    """
    order = np.argsort(x, kind='stable')
    width = max(5, len(x) // 5)
    windows = np.lib.stride_tricks.sliding_window_view
    return (
        np.median(windows(x[order], width), axis=1),
        np.median(windows(y[order], width), axis=1),
    )


def _scatter(axes: Axes, protocol: str, rows: list[dict], metric: str) -> None:
    x = np.array([row['infection_percent'] for row in rows], np.float64)
    y = np.array([row[metric] for row in rows], np.float64)
    # A logarithmic axis has no place for 0, nor for an undefined figure: n says how many are shown.
    shown = (x > 0) & np.isfinite(y)
    x, y = x[shown], y[shown]
    unit = 'studies' if protocol == 'volume' else 'slices'
    axes.set_title(
        f'{PROTOCOL_TITLES[protocol]}\nprotocol {protocol}, n = {len(x)} of {len(rows)} {unit}',
        fontsize=9,
    )
    axes.set(xscale='log', xlabel='Infection, % of the lungs', ylabel=METRIC_TITLES[metric])
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.spines[['top', 'right']].set_visible(False)
    if not len(x):
        axes.set(xlim=(0.1, 100), ylim=(-0.03, 1.03))
        axes.text(0.5, 0.5, 'nothing to show', transform=axes.transAxes, ha='center')
        return
    size = 26 if len(x) < 200 else 9
    axes.scatter(x, y, s=size, color=POINT_COLOUR, alpha=0.55, linewidths=0)
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5), numticks=12))
    axes.xaxis.set_major_formatter('{x:g}')
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    # Specificity lives near 1: its own range, or all points lie on one line.
    low = 0.0 if metric != 'specificity_lung' else min(0.9, float(y.min()))
    margin = 0.04 * (1 - low)
    axes.set_ylim(low - margin, 1 + margin)
    if len(x) >= _MIN_POINTS_FOR_TREND:
        axes.plot(*running_median(x, y), color=TREND_COLOUR, linewidth=2, label='running median')
        axes.legend(fontsize=8, loc='lower right', framealpha=0.9)


def plot_against_infection(
    case_rows: list[dict], slice_rows: list[dict], folder: pathlib.Path
) -> list[pathlib.Path]:
    """Draws Dice, sensitivity and specificity (lungs) against infection %, a panel a protocol.

    Args:
      case_rows, slice_rows: as `evaluate.score_case` makes them.
      folder: the evaluation folder; the figures go into its `figures/`.

    Returns:
      The PNG files: dice_vs_infection, sensitivity_vs_infection, specificity_vs_infection.
    """
    rows_of = {
        protocol: case_rows
        if protocol == 'volume'
        else [row for row in slice_rows if row['protocol'] == protocol]
        for protocol in evaluate.PROTOCOLS
    }
    paths = []
    for metric, name in _FIGURES_AGAINST_INFECTION.items():
        figure = Figure(figsize=(13, 4), layout='constrained')
        panels = figure.subplots(1, len(rows_of))
        for axes, (protocol, rows) in zip(panels, rows_of.items(), strict=True):
            _scatter(axes, protocol, rows, metric)
        paths.append(_save(figure, pathlib.Path(folder) / 'figures' / name))
    return paths


def choose_cases(case_rows: list[dict]) -> dict[str, str]:
    """The studies with the best, the median and the worst Dice: role → study_id.

    Undefined Dice is left out; with fewer than three studies each is named once, so that a role may
    be missing. Ties go by study_id; of an even number, the median is the lower of the middle two.
    """
    ranked = sorted(
        (row['dice'], row['study_id']) for row in case_rows if not math.isnan(row['dice'])
    )
    if not ranked:
        return {}
    chosen = {'best': ranked[-1][1], 'median': ranked[(len(ranked) - 1) // 2][1]}
    chosen['worst'] = ranked[0][1]
    roles = {}
    for role in ('best', 'worst', 'median'):
        if chosen[role] not in roles.values():
            roles[role] = chosen[role]
    return {role: roles[role] for role in ('best', 'median', 'worst') if role in roles}


def _choose_slices(case: OverlayCase, num_slices: int) -> list[int]:
    """Slices with most lesion, true or predicted where none is true, from top to bottom."""
    areas = case.truth.sum(axis=(1, 2))
    if not areas.any():
        areas = case.prediction.sum(axis=(1, 2))
    most = np.argsort(-areas, kind='stable')[:num_slices]
    with_lesion = most[areas[most] > 0]
    return sorted(int(z) for z in with_lesion) or [len(areas) // 2]


def _body_box(image_hu: np.ndarray, slices: list[int]) -> tuple[slice, slice]:
    """Rows and columns that hold the body (> -500 HU) in these slices, with a few voxels around."""
    body = (image_hu[slices] > -500).any(axis=0)
    box = []
    for axis in (0, 1):
        # At least 2 % of a line, so that a thread of the table does not count as body.
        filled = np.flatnonzero(body.mean(axis=1 - axis) > 0.02)
        if filled.size:
            box.append(slice(max(0, int(filled[0]) - 4), int(filled[-1]) + 5))
        else:
            box.append(slice(None))
    return box[0], box[1]


def _draw_overlay(role: str, case: OverlayCase, slices: list[int]) -> Figure:
    masks = {
        'scan': (None, None),
        'truth': (case.truth, TRUTH_COLOUR),
        'pseudo-mask': (case.pseudo_mask, PSEUDO_COLOUR),
        'prediction': (case.prediction, PREDICTION_COLOUR),
    }
    columns = {
        name: drawn for name, drawn in masks.items() if name == 'scan' or drawn[0] is not None
    }
    rows, cols = _body_box(case.image_hu, slices)
    aspect = float(case.spacing_mm[1]) / float(case.spacing_mm[2])
    height, width = case.image_hu[0][rows, cols].shape
    panel = 3.0
    figure = Figure(
        figsize=(panel * len(columns), 0.6 + panel * aspect * height / width * len(slices)),
        layout='constrained',
    )
    panels = figure.subplots(len(slices), len(columns), squeeze=False)
    for line, z in zip(panels, slices, strict=True):
        for axes, (name, (mask, colour)) in zip(line, columns.items(), strict=True):
            low, high = LUNG_WINDOW_HU
            scan = case.image_hu[z][rows, cols]
            axes.imshow(scan, cmap='gray', vmin=low, vmax=high, aspect=aspect)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if axes in panels[0]:
                axes.set_title(name, fontsize=10)
            if mask is not None and mask[z][rows, cols].any():
                axes.contour(mask[z][rows, cols], levels=[0.5], colors=[colour], linewidths=1.1)
        line[0].set_ylabel(f'slice {z}', fontsize=9)
    score = 'undefined' if math.isnan(case.dice) else f'{case.dice:.3f}'
    figure.suptitle(f'{role}: {case.study_id}, volume Dice {score}', fontsize=11)
    return figure


def plot_overlays(
    cases: Mapping[str, OverlayCase], folder: pathlib.Path, *, num_slices: int = 3
) -> list[pathlib.Path]:
    """Draws scan | truth | pseudo-mask (where given) | prediction, a row a slice, lung window.

    Args:
      cases: role → study, the roles being those of `choose_cases`.
      folder: the evaluation folder; the figures go into its `figures/`.
      num_slices: how many axial slices a study, those with most true lesion (predicted lesion
        where the truth is empty).

    Returns:
      The PNG files, `figures/case_<role>.png` each.
    """
    return [
        _save(
            _draw_overlay(role, case, _choose_slices(case, num_slices)),
            pathlib.Path(folder) / 'figures' / f'case_{role}.png',
        )
        for role, case in cases.items()
    ]


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
) -> pathlib.Path:
    """Writes report.html: one file that opens from disk without a network.

    Args:
      folder: the evaluation folder.
      summary: the content of summary.json; `pseudo_masks` is shown where it is there.
      case_rows: as `evaluate.score_case` makes them; listed worst Dice first, undefined last.
      figures: PNG files, copied into the page in this order.
      run: name → value (text or anything JSON can say), shown at the top.

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
    worst_first = sorted(
        case_rows, key=lambda row: (math.isnan(row['dice']), row['dice'], row['study_id'])
    )
    sections = [('Prediction against the true masks', summary['protocols'])]
    if summary.get('pseudo_masks'):
        sections.append(('Pseudo-masks against the true masks', summary['pseudo_masks']))
    page = environment.get_template('report.html.j2').render(
        run=_run_lines(run),
        sections=[
            (title, [_protocol_table(name, metrics) for name, metrics in protocols.items()])
            for title, protocols in sections
        ],
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
    )
    path = pathlib.Path(folder) / 'report.html'
    atomic.write_text(path, page)
    return path
