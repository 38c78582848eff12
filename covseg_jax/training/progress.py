"""progress.png: how far the training of a work directory is, how it went, and what it makes."""

from __future__ import annotations

import math
import pathlib
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from scipy import ndimage

from covseg_jax import atomic
from covseg_jax.training.logging import find_pictures, read_rows, split_strip

if TYPE_CHECKING:  # imported where something is drawn: training alone does without it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.gridspec import SubplotSpec

Series = dict[str, tuple[np.ndarray, np.ndarray]]  # name -> (N,) steps, (N,) values, NaN: undefined

_MODELS = {  # folder -> title
    'lungs': 'Lung network',
    'gan': 'GAN',
    'transunet': 'Segmentation network',
}
# folder -> the pictures that its evaluations leave: their name, their columns, how many of these
# are the same at every step, and of how many steps the others are drawn.
_PICTURES = {
    'gan': ('covid_scan_healthy_difference', ('scan', 'healthy', 'difference'), 1, 2),
    'transunet': ('slice_target_prediction', ('scan', 'target', 'prediction'), 2, 3),
}
# Okabe and Ito's colours, told apart by colour-blind readers too.
_COLOURS = ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9')
_FAINT = '#8a8a8a'
_ERRORS = ('mse', 'harm', 'missed', 'added')  # validation's values that are best when 0
_LONG = 60  # a series of more points is drawn as its running median, over itself as a thin line


def draw_progress(workdir: pathlib.Path) -> pathlib.Path | None:
    """Draws `workdir`/progress.png; None, and no file, where nothing was logged yet.

    Raises:
      OSError: the disk is full or does not let itself be written.
    """
    figure = learning_curves(workdir)
    if figure is None:
        return None
    path = workdir / 'progress.png'
    with atomic.new_file(path) as temporary:
        figure.savefig(temporary, format='png', dpi=100, metadata={'Software': None})
    return path


def learning_curves(workdir: pathlib.Path) -> Figure | None:
    """One row of panels for each model in `workdir` that logged something, else None.

    From left to right: losses; validation's scores, and below them its errors; the learning rate,
    and below it the GAN's discriminator; what the network made of the same slices at its first
    evaluation, at one between, and at its newest. Legends give the newest value of each series.
    """
    paths = {name: workdir / name / 'metrics.jsonl' for name in _MODELS}
    logs = {name: read_rows(path) for name, path in paths.items() if path.exists()}
    logs = {name: rows for name, rows in logs.items() if rows}
    if not logs:
        return None
    from matplotlib.figure import Figure

    # Places are fixed: a layout engine draws everything once more to find them.
    figure = Figure(figsize=(19, 4.6 * len(logs)))
    parts = figure.subfigures(len(logs), 1, squeeze=False)[:, 0]
    for part, (name, rows) in zip(parts, logs.items(), strict=True):
        pictures = _lay_pictures(workdir / name)
        _draw_model(part, _MODELS[name], rows, right=0.99 if pictures is None else 0.7)
        if pictures is not None:
            _draw_pictures(part, *pictures)
    return figure


def _take_series(rows: list[dict], group: str) -> Series:
    """The series named `group`/..., without the group."""
    names = sorted({name for row in rows for name in row if name.startswith(f'{group}/')})
    found = {}
    for name in names:
        points = [(row['step'], row[name]) for row in rows if name in row]
        steps, values = zip(*points, strict=True)
        # None, an undefined value, becomes NaN.
        found[name.removeprefix(f'{group}/')] = np.array(steps), np.array(values, np.float64)
    return found


def _draw_model(part: SubFigure, title: str, rows: list[dict], right: float) -> None:
    last = max(row['step'] for row in rows)
    part.suptitle(f'{title}, step {last:,}', fontsize=13, fontweight='bold')
    grid = part.add_gridspec(
        1, 3, width_ratios=(1.25, 1, 0.8), left=0.03, right=right, bottom=0.12, top=0.8, wspace=0.17
    )
    losses, validation, optimizer, discriminator = (
        _take_series(rows, group) for group in ('loss', 'validation', 'optimizer', 'discriminator')
    )
    errors = {k: v for k, v in validation.items() if k in _ERRORS or np.any(v[1] > 1)}
    scores = {k: v for k, v in validation.items() if k not in errors}
    accuracy = {k: v for k, v in discriminator.items() if k == 'accuracy'}
    rate = {k: v for k, v in optimizer.items() if k == 'learning_rate'}

    (top,) = _add_column(part, grid[0], 1, last)
    _draw_lines(top, 'losses', losses)
    _use_log_scale(top, losses)

    top, *below = _add_column(part, grid[1], 2 if errors else 1, last)
    _draw_lines(top, 'validation', scores)
    lowest = min((np.nanmin(values, initial=0) for _, values in scores.values()), default=0)
    top.set_ylim(max(lowest, -1) - 0.02, 1.02)
    for axes in below:
        _draw_lines(axes, 'validation, errors', errors)
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))

    top, *below = _add_column(part, grid[2], 2 if accuracy else 1, last)
    _draw_lines(top, 'optimizer', rate, median=False)
    top.set_ylim(bottom=0)
    for axes in below:
        axes.axhline(0.5, color=_FAINT, linewidth=0.8, linestyle=':')  # where it only guesses
        _draw_lines(axes, 'discriminator', accuracy)
        axes.set_ylim(-0.05, 1.05)


def _lay_pictures(folder: pathlib.Path) -> tuple[np.ndarray, dict[str, float]] | None:
    """One (H, W) picture of all columns, 0 to 255, and the middle of each by its title; None where
    no evaluation left any."""
    if folder.name not in _PICTURES:
        return None
    name, titles, num_fixed, num_steps = _PICTURES[folder.name]
    paths = find_pictures(folder, name)
    if not paths:
        return None
    found = [*paths]
    chosen = np.unique(np.linspace(0, len(found) - 1, num_steps).round().astype(int))
    columns: dict[str, np.ndarray] = {}
    for step in (found[i] for i in chosen):
        with Image.open(paths[step]) as picture:
            strip = split_strip(np.asarray(picture.convert('L')), len(titles))
        for i, title in enumerate(titles):
            columns[title if i < num_fixed else f'{title},\nstep {step:,}'] = strip[i]
    width = next(iter(columns.values())).shape[1]
    gap = max(1, width // 16)
    padded = [np.pad(each, ((0, 0), (0, gap)), constant_values=255) for each in columns.values()]
    middles = {title: i * (width + gap) + width / 2 for i, title in enumerate(columns)}
    return np.hstack(padded)[:, :-gap], middles


def _draw_pictures(part: SubFigure, picture: np.ndarray, middles: dict[str, float]) -> None:
    axes = part.add_axes((0.715, 0.03, 0.28, 0.79))
    axes.imshow(picture, cmap='gray', vmin=0, vmax=255)
    axes.set_axis_off()
    for title, middle in middles.items():
        axes.text(middle, -0.02 * picture.shape[0], title, ha='center', va='bottom', fontsize=9)


def _add_column(part: SubFigure, place: SubplotSpec, num_panels: int, last: int) -> list[Axes]:
    """One panel, or two of which the lower is less high, over steps from 0 to `last`."""
    grid = place.subgridspec(num_panels, 1, height_ratios=(3, 2)[:num_panels], hspace=0.4)
    column = [part.add_subplot(grid[i]) for i in range(num_panels)]
    for axes in column:
        axes.set_xlim(0, last)
        axes.grid(alpha=0.25)
        axes.spines[['top', 'right']].set_visible(False)
        axes.xaxis.set_major_formatter('{x:,.0f}')
        axes.yaxis.set_major_formatter('{x:g}')
        axes.tick_params(which='both', labelsize=8, labelbottom=axes is column[-1])
    column[-1].set_xlabel('step', fontsize=9)
    return column


def _draw_lines(axes: Axes, title: str, series: Series, *, median: bool = True) -> None:
    axes.set_title(title, fontsize=10, loc='left')
    if not series:
        axes.text(0.5, 0.5, 'nothing yet', color=_FAINT, ha='center', transform=axes.transAxes)
        return
    colours = iter(_COLOURS * len(series))
    for name, (steps, values) in series.items():
        # The total lies behind the others, one of which it may be almost equal to.
        heavy = {'color': 'black', 'linewidth': 3, 'zorder': 2}
        light = {'linewidth': 1.5, 'zorder': 3}
        style = heavy if name == 'total' else light | {'color': next(colours)}
        newest = f'{values[-1]:.3g}' if math.isfinite(values[-1]) else 'undefined'
        style['label'] = f'{name.replace("_", " ")} {newest}'
        if len(steps) > _LONG and median:
            axes.plot(steps, values, color=style['color'], linewidth=0.6, alpha=0.35, zorder=1)
            axes.plot(steps, _running_median(values), **style)
        else:
            axes.plot(steps, values, marker='' if len(steps) > _LONG else '.', **style)
    # Above the panel: within it, it would lie on the lines.
    axes.legend(
        fontsize=8, frameon=False, ncols=min(len(series), 3), loc='lower right',
        bbox_to_anchor=(1, 1), borderpad=0.1, borderaxespad=0.2, handlelength=1.2,
        columnspacing=1,
    )  # fmt: skip


def _use_log_scale(axes: Axes, series: Series) -> None:
    values = np.concatenate([values for _, values in series.values()] or [[math.nan]])
    if np.all(values[np.isfinite(values)] > 0) and np.any(np.isfinite(values)):
        axes.set_yscale('log')


def _running_median(values: np.ndarray) -> np.ndarray:
    """(N,) medians over a twentieth of the points; where a value is NaN, so is its median."""
    finite = np.isfinite(values)
    medians = np.full_like(values, math.nan)
    width = 2 * (len(values) // 40) + 1
    # Mirrored at the ends: repeating the last value would make it the median.
    medians[finite] = ndimage.median_filter(values[finite], size=width, mode='reflect')
    return medians
