"""The figures of an evaluation: PNG files in `figures/` of the evaluation folder."""

import dataclasses
import math
import pathlib

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from covseg_jax import atomic
from covseg_jax.evaluation import scores
from covseg_jax.evaluation.metric_table import PROTOCOLS, TITLES, metrics_shown
from covseg_jax.predict import preview

# Okabe and Ito's colours, as those of the masks.
POINT_COLOUR, TREND_COLOUR = '#0072b2', '#d55e00'
MASK_COLOURS = {
    'truth': preview.TRUTH_COLOUR,
    'pseudo-mask': preview.PSEUDO_COLOUR,
    'prediction': preview.PREDICTION_COLOUR,
}
_MIN_POINTS_FOR_TREND = 10


@dataclasses.dataclass(frozen=True)
class CaseImages:
    """What is drawn of one study, all on its native grid.

    Attributes:
      study_id: its name. dice: its volume Dice.
      image_hu: (Z, Y, X) in HU, canonical: `imshow(image_hu[z])` is the radiological view.
      lungs, truth, prediction: (Z, Y, X) boolean. pseudo_mask: the same, or None.
      spacing_mm: voxel size along z, y, x.
    """

    study_id: str
    dice: float
    image_hu: np.ndarray
    lungs: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray
    pseudo_mask: np.ndarray | None
    spacing_mm: tuple[float, float, float]

    @property
    def masks(self) -> dict[str, np.ndarray]:
        """Those that there are, by their names in MASK_COLOURS."""
        found = zip(MASK_COLOURS, (self.truth, self.pseudo_mask, self.prediction), strict=True)
        return {name: mask for name, mask in found if mask is not None}


def _save(figure: Figure, folder: pathlib.Path, name: str) -> pathlib.Path:
    path = folder / 'figures' / f'{name}.png'
    with atomic.new_file(path) as temporary:
        figure.savefig(temporary, format='png', dpi=110, metadata={'Software': None})
    return path


def _style(axes: Axes) -> None:
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.spines[['top', 'right']].set_visible(False)


def running_quartiles(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quartiles of y over windows of neighbouring x: a fifth of the points each, five at least.

    From (N,) finite x and y, N >= 5: the (N - w + 1,) median x, and the (3, N - w + 1) quartiles of
    y, of each window of w points.
    """
    order, width = np.argsort(x, kind='stable'), max(5, len(x) // 5)
    x, y = (np.lib.stride_tricks.sliding_window_view(each[order], width) for each in (x, y))
    return np.median(x, axis=1), np.percentile(y, (25, 50, 75), axis=1)


def _scatter(axes: Axes, protocol: str, rows: list[dict], metric: str) -> None:
    x = np.array([row['infection_percent'] for row in rows], np.float64)
    y = np.array([row[metric] for row in rows], np.float64)
    # A logarithmic axis has no place for 0. The title says how many points are left.
    shown = (x > 0) & np.isfinite(y)
    x, y = x[shown], y[shown]
    unit = 'studies' if protocol == 'volume' else 'slices'
    points = f'protocol {protocol}, n = {len(x)} of {len(rows)} {unit}'
    axes.set_title(f'{PROTOCOLS[protocol]}\n{points}', fontsize=9)
    axes.set(xscale='log', xlabel='Infection, % of the lungs', ylabel=TITLES[metric])
    _style(axes)
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
        middle, (low, median, high) = running_quartiles(x, y)
        axes.fill_between(
            middle, low, high, color=TREND_COLOUR, alpha=0.15, linewidth=0, label='middle half'
        )
        axes.plot(middle, median, color=TREND_COLOUR, linewidth=2, label='running median')
        axes.legend(fontsize=8, loc='best', framealpha=0.7)


def plot_against_infection(
    case_rows: list[dict], slice_rows: list[dict], folder: pathlib.Path
) -> list[pathlib.Path]:
    """Draws each headline metric against infection %, in one file, with a panel for each protocol.
    Rows are as `scores.score_case` makes them."""
    rows_of = scores.rows_by_protocol(case_rows, slice_rows)
    paths = []
    for metric in metrics_shown('headline'):
        figure = Figure(figsize=(13, 4), layout='constrained')
        panels = figure.subplots(1, len(rows_of))
        for axes, (protocol, rows) in zip(panels, rows_of.items(), strict=True):
            _scatter(axes, protocol, rows, metric)
        paths.append(_save(figure, folder, f'{metric.removesuffix("_lung")}_vs_infection'))
    return paths


def plot_agreement(
    case_rows: list[dict], pseudo_rows: list[dict], folder: pathlib.Path
) -> pathlib.Path:
    """Draws predicted minus true lesion volume against their mean, one point for each study (Bland
    and Altman 1986), with the mean difference and mean ± 1.96 standard deviations, for the network
    and, if they have rows, the pseudo-masks."""
    sources = {'prediction': case_rows} | ({'pseudo-masks': pseudo_rows} if pseudo_rows else {})
    figure = Figure(figsize=(1 + 5.5 * len(sources), 4), layout='constrained')
    panels = figure.subplots(1, len(sources), squeeze=False)[0]
    for axes, (name, rows) in zip(panels, sources.items(), strict=True):
        true, found = (
            np.array([row[column] for row in rows], np.float64)
            for column in ('volume_ml_true', 'volume_ml_predicted')
        )
        difference, mean = found - true, (found + true) / 2
        axes.scatter(mean, difference, s=26, color=POINT_COLOUR, alpha=0.55, linewidths=0)
        bias = difference.mean()
        lines = {'mean': bias}
        if len(rows) > 1:
            spread = 1.96 * difference.std(ddof=1)
            lines |= {'+1.96 SD': bias + spread, '−1.96 SD': bias - spread}
        for label, height in lines.items():
            style = '-' if label == 'mean' else '--'
            axes.axhline(height, color=TREND_COLOUR, linestyle=style, linewidth=1.2)
            axes.annotate(
                f'{label}: {height:.1f} ml', (1, height), xycoords=('axes fraction', 'data'),
                xytext=(-3, 3), textcoords='offset points', ha='right', fontsize=8,
            )  # fmt: skip
        axes.axhline(0, color='0.7', linewidth=0.8, zorder=0)
        axes.set_title(f'Lesion volume of {name}, n = {len(rows)} studies', fontsize=9)
        axes.set(xlabel='Mean of true and predicted, ml', ylabel='Predicted − true, ml')
        _style(axes)
    return _save(figure, folder, 'bland_altman')


def plot_calibration(curve: np.ndarray, folder: pathlib.Path) -> pathlib.Path:
    """Draws the observed share of lesion against the predicted probability, over the voxels inside
    the lungs of all studies together, and below it how many voxels have each probability. `curve`
    is (3, B), as `probabilities.calibration_curve` gives it."""
    counts, sums, hits = curve
    filled = counts > 0
    figure = Figure(figsize=(5, 5.2), layout='constrained')
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot((0, 1), (0, 1), color='0.7', linewidth=0.8, label='perfectly calibrated')
    upper.plot(
        sums[filled] / counts[filled], hits[filled] / counts[filled], 'o-', color=POINT_COLOUR,
        label='observed',
    )  # fmt: skip
    upper.set(ylabel='Share of voxels with lesion', ylim=(-0.03, 1.03))
    upper.set_title('Calibration inside the lungs, model grid, all studies together', fontsize=9)
    upper.legend(fontsize=8, loc='upper left')
    edges = np.linspace(0, 1, len(counts) + 1)
    lower.bar(edges[:-1], counts, width=np.diff(edges), align='edge', color=POINT_COLOUR)
    lower.set(xlabel='Predicted probability', ylabel='Voxels', yscale='log', xlim=(-0.02, 1.02))
    for axes in (upper, lower):
        _style(axes)
    return _save(figure, folder, 'calibration')


def choose_cases(case_rows: list[dict]) -> dict[str, str]:
    """The studies with the best, the median and the worst Dice: role → study_id.

    Studies without a Dice are left out. No study has two roles: of two there is no median, of one
    it is the best. Ties go by study_id; of an even number, the median is the lower of the middle
    two.
    """
    ranked = sorted(
        (row['dice'], row['study_id']) for row in case_rows if not math.isnan(row['dice'])
    )
    roles = {}
    if ranked:
        roles['best'] = ranked[-1][1]
    if len(ranked) > 2:
        roles['median'] = ranked[(len(ranked) - 1) // 2][1]
    if len(ranked) > 1:
        roles['worst'] = ranked[0][1]
    return roles


def _choose_slices(case: CaseImages) -> list[int]:
    """The three slices with most lesion, true or predicted where none is true, in their order."""
    areas = case.truth.sum(axis=(1, 2))
    if not areas.any():
        areas = case.prediction.sum(axis=(1, 2))
    most = np.argsort(-areas, kind='stable')[:3]
    return sorted(int(z) for z in most if areas[z]) or [len(areas) // 2]


def _body_box(image_hu: np.ndarray, slices: list[int]) -> tuple[slice, slice]:
    """Rows and columns that hold the body (> -500 HU) in these slices, with a few voxels around."""
    body = (image_hu[slices] > -500).any(axis=0)
    box = []
    for axis in (0, 1):
        # At least 2 % of a line, so that a thread of the table does not count as body.
        filled = np.flatnonzero(body.mean(axis=1 - axis) > 0.02)
        ends = (max(0, int(filled[0]) - 4), int(filled[-1]) + 5) if filled.size else (None,)
        box.append(slice(*ends))
    return box[0], box[1]


def plot_overlay(role: str, case: CaseImages, folder: pathlib.Path) -> pathlib.Path:
    """Draws scan | truth | pseudo-mask (where given) | prediction of the three slices with most
    lesion, one in a row, in the lung window. `role` is one of those of `choose_cases`."""
    slices, columns = _choose_slices(case), {'scan': None, **case.masks}
    rows, cols = _body_box(case.image_hu, slices)
    aspect = float(case.spacing_mm[1]) / float(case.spacing_mm[2])
    height, width = case.image_hu[0][rows, cols].shape
    panel = 3.0
    figure = Figure(
        figsize=(panel * len(columns), 0.6 + panel * aspect * height / width * len(slices)),
        layout='constrained',
    )
    panels = figure.subplots(len(slices), len(columns), squeeze=False)
    low, high = preview.LUNG_WINDOW_HU
    for line, z in zip(panels, slices, strict=True):
        for axes, (name, mask) in zip(line, columns.items(), strict=True):
            scan = case.image_hu[z][rows, cols]
            axes.imshow(scan, cmap='gray', vmin=low, vmax=high, aspect=aspect)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if axes in panels[0]:
                axes.set_title(name, fontsize=10)
            if mask is not None and mask[z][rows, cols].any():
                colours = [MASK_COLOURS[name]]
                axes.contour(mask[z][rows, cols], levels=[0.5], colors=colours, linewidths=1.1)
        line[0].set_ylabel(f'slice {z}', fontsize=9)
    score = 'undefined' if math.isnan(case.dice) else f'{case.dice:.3f}'
    # A study's name may hold what looks like a formula.
    title = f'{role}: {case.study_id}, volume Dice {score}'
    figure.suptitle(title, fontsize=11, parse_math=False)
    return _save(figure, folder, f'case_{role}')
