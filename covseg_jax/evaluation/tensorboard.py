"""An evaluation in TensorBoard: means, precision against recall, pictures, and the run's settings
beside what they reached."""

import contextlib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import image

from covseg_jax.evaluation.metric_table import metrics_shown
from covseg_jax.manifest import flatten
from covseg_jax.training.events import Events


def write_board(
    folder: pathlib.Path,
    summary: Mapping,
    curve: np.ndarray,
    pictures: Sequence[pathlib.Path],
    settings: Mapping[str, Any],
) -> None:
    """Writes tensorboard/ of the evaluation folder; the events of an earlier evaluation go.

    The means of `summary`, the content of summary.json, become scalars
    `evaluation_<protocol>/<metric>` at its `checkpoint_step`. `curve` is (3, B), as
    `probabilities.calibration_curve` gives it for many bins. `settings` are the run's, nested, for
    the HPARAMS tab.
    """
    board, step = folder / 'tensorboard', summary['checkpoint_step']
    for earlier in board.glob('events.out.tfevents.*'):
        earlier.unlink()
    means = {
        f'evaluation_{protocol}/{metric}': figures['mean']
        for protocol, metrics in summary['protocols'].items()
        for metric, figures in metrics.items()
        if figures['mean'] is not None
    }
    counts, _, hits = curve
    with contextlib.closing(Events(board, start_step=0)) as events:
        hparams = {
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in flatten(settings).items()
        }
        events.hparams(hparams, [f'evaluation_volume/{name}' for name in metrics_shown('hparams')])
        events.scalars(step, means)
        events.pr_curve(step, 'evaluation_volume/voxels_in_lungs', hits, counts - hits)
        for path in pictures:
            events.image(step, f'pictures/{path.stem}', image.imread(path)[..., :3])
