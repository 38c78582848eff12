"""Two runs on the same studies: whether one is better, and by how much.

Studies are paired; intervals and tests are over their subjects.
"""

import dataclasses
import math
import pathlib
from typing import Any

import numpy as np
from scipy import stats

from covseg_jax.errors import InputError
from covseg_jax.evaluation import metrics, scores
from covseg_jax.evaluation.metric_table import metrics_shown

_ROUNDING = 1e-12  # the mean of differences that cancel out is seldom exactly 0


@dataclasses.dataclass(frozen=True)
class Difference:
    """One metric of two runs, over the studies in which both have it.

    Attributes:
      metric: its name in cases.csv.
      n, subjects: how many studies, of how many subjects.
      first, second: the runs' means over the studies. difference: second − first.
      ci95: percentile bootstrap interval of the difference, over subjects; NaN of fewer than two.
      wilcoxon_p: two-sided p of Wilcoxon's signed-rank test (Wilcoxon 1945) of each subject's mean
        difference; differences of zero are left out; NaN where all are zero.
    """

    metric: str
    n: int
    subjects: int
    first: float
    second: float
    difference: float
    ci95: tuple[float, float]
    wilcoxon_p: float

    def to_json(self) -> dict[str, Any]:
        """Its fields, with None for NaN, which JSON has not."""
        fields = dataclasses.asdict(self) | {'ci95': [_or_none(value) for value in self.ci95]}
        return {name: _or_none(value) for name, value in fields.items()}


def _or_none(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def compare_runs(first: pathlib.Path, second: pathlib.Path) -> tuple[list[Difference], list[str]]:
    """Compares two runs, work directories or folders with a cases.csv, study by study. Returns the
    differences, and the studies that only one run has.

    Raises:
      InputError: a run has no cases.csv, or one without subjects; the two share no study, or give
        one to different subjects.
    """
    rows = [_read_cases(folder) for folder in (first, second)]
    shared = sorted(rows[0].keys() & rows[1].keys())
    if not shared:
        raise InputError(f'{first} and {second} have no study in common; evaluate both on the same')
    subjects = [rows[0][name]['subject'] for name in shared]
    for name, one in zip(shared, subjects, strict=True):
        other = rows[1][name]['subject']
        if one != other:
            raise InputError(
                f'{name}: a study of {one} in {first} and of {other} in {second}; evaluate both '
                'with the same data.subject_pattern'
            )
    found = []
    for metric in metrics_shown('compare'):
        a, b = (np.array([each[name][metric] for name in shared], np.float64) for each in rows)
        both = ~np.isnan(a) & ~np.isnan(b)
        found.append(_difference(metric, a[both], b[both], np.array(subjects)[both]))
    return found, sorted(rows[0].keys() ^ rows[1].keys())


def _read_cases(folder: pathlib.Path) -> dict[str, dict]:
    inside = folder / 'evaluation'
    case_rows, _ = scores.read_tables(inside if inside.is_dir() else folder)
    return {row['study_id']: row for row in case_rows}


def _difference(
    metric: str, first: np.ndarray, second: np.ndarray, subjects: np.ndarray
) -> Difference:
    change = second - first
    means = [float(each.mean()) if len(each) else math.nan for each in (first, second, change)]
    # Studies of one subject resemble each other: the test's independent figures are the subjects'.
    names = np.unique(subjects)
    of_subject = np.array([change[subjects == name].mean() for name in names])
    moved = of_subject[np.abs(of_subject) > _ROUNDING]
    return Difference(
        metric,
        len(change),
        len(names),
        *means,
        ci95=metrics.bootstrap_interval(change, subjects=subjects),
        wilcoxon_p=float(stats.wilcoxon(moved).pvalue) if len(moved) else math.nan,
    )
