"""What a stage ends with: its files, and a table for the person who waits."""

import dataclasses
import pathlib
from collections.abc import Sequence

from tabulate import tabulate

from covseg_jax.evaluation.metric_table import metrics_shown


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A finished stage of the pipeline: its files, and rows and head of its summary table."""

    outputs: list[pathlib.Path]
    rows: Sequence[Sequence[object]] = ()
    head: Sequence[str] = ()


def show_table(rows: Sequence[Sequence[object]], head: Sequence[str] = ()) -> None:
    """Prints a table; numbers with a fraction have four digits."""
    cells = [
        [f'{value:.4g}' if isinstance(value, float) else str(value) for value in row]
        for row in rows
    ]
    if cells:
        # Not parsed: a study may be called 1e5.
        print(tabulate(cells, head, tablefmt='simple', disable_numparse=True))


def table_of_summary(summary: dict) -> tuple[list[tuple], tuple[str, ...]]:
    """The chief figures of a summary.json: rows and head of a table."""
    rows, chief = [], metrics_shown('headline')
    pseudo = summary.get('pseudo_masks')
    for source, protocols in (('network', summary['protocols']), ('pseudo-masks', pseudo)):
        for protocol, metrics in (protocols or {}).items():
            means = [_mean(metrics[name]) for name in chief]
            rows.append((source, protocol, metrics['dice']['n'], *means))
    return rows, ('of', 'protocol', 'n', *chief)


def _mean(figures: dict) -> str:
    if figures['mean'] is None:
        return 'undefined'
    low, high = figures['ci95']
    interval = '' if low is None else f' [{low:.3f}, {high:.3f}]'
    return f'{figures["mean"]:.3f}{interval}'
