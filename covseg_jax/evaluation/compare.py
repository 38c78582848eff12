"""Two runs on the same studies: whether one is better, and by how much."""

import dataclasses
import math
import pathlib

import numpy as np
from scipy import stats

from covseg_jax.errors import InputError
from covseg_jax.evaluation import evaluate, metrics

METRICS = ('dice', 'sensitivity', 'specificity_lung', 'hd95_mm', 'nsd', 'lesion_f1')


@dataclasses.dataclass(frozen=True)
class Difference:
    """One metric of two runs, over the studies in which both have it.

    Attributes:
      metric: its name in cases.csv.
      n: the studies.
      first, second: the runs' means over them.
      difference: second − first.
      ci95: percentile bootstrap interval of the difference, over subjects; NaN of fewer than two.
      wilcoxon_p: two-sided p of Wilcoxon's signed-rank test (Wilcoxon 1945; zero differences are
        left out); NaN where all differences are zero.
    """

    metric: str
    n: int
    first: float
    second: float
    difference: float
    ci95: tuple[float, float]
    wilcoxon_p: float


def compare_runs(first: pathlib.Path, second: pathlib.Path) -> tuple[list[Difference], list[str]]:
    """Compares two runs study by study.

    Args:
      first, second: work directories, or folders with a cases.csv.

    Returns:
      The differences, and the studies that only one of them has.

    Raises:
      InputError: a run has no cases.csv, or the two share no study.
    """
    rows = [_read_cases(folder) for folder in (first, second)]
    shared = sorted(rows[0].keys() & rows[1].keys())
    if not shared:
        raise InputError(f'{first} and {second} have no study in common; evaluate both on the same')
    found = []
    for metric in METRICS:
        a, b = (np.array([each[name][metric] for name in shared], np.float64) for each in rows)
        both = ~np.isnan(a) & ~np.isnan(b)
        found.append(_difference(metric, a[both], b[both]))
    return found, sorted(rows[0].keys() ^ rows[1].keys())


def _read_cases(folder: pathlib.Path) -> dict[str, dict]:
    inside = folder / 'evaluation'
    case_rows, _ = evaluate.read_tables(inside if inside.is_dir() else folder)
    return {row['study_id']: row for row in case_rows}


def _difference(metric: str, first: np.ndarray, second: np.ndarray) -> Difference:
    change = second - first
    moved = change[change != 0]
    return Difference(
        metric,
        n=len(change),
        first=float(first.mean()) if len(change) else math.nan,
        second=float(second.mean()) if len(change) else math.nan,
        difference=float(change.mean()) if len(change) else math.nan,
        ci95=metrics.bootstrap_interval(change),
        wilcoxon_p=float(stats.wilcoxon(moved).pvalue) if len(moved) else math.nan,
    )
