"""One table of what several models score, from the rows of `model_scores`."""

import csv
import dataclasses
import io
import math
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from tabulate import tabulate

from covseg_jax.evaluation import metrics
from covseg_jax.evaluation.model_scores import COLUMNS, CUTS, DICE_AT, LEAST_SHARE, NODULE_ML, Row
from covseg_jax.predict.model import RANGE

# Kind of scans → the set that has lesion masks, the set of healthy scans. Either may be missing.
KINDS = {
    'phantoms': ('phantoms', 'healthy_phantoms'),
    'real': ('real_slices', 'healthy_scans'),
}
CSV_COLUMNS = ('model', 'run', 'set', *COLUMNS)
RANGE_SHARE = 0.9  # of the true volumes, for which a factor is looked for
HEAD = (
    'scans', 'model', 'n', 'Dice as cut', 'Dice, best single cut', 'at', 'mean over cuts',
    'average precision', 'lesion-wise F1', f'found under {NODULE_ML:g} ml', 'ECE', 'healthy ml',
    'true ml in range', "range's width", f'factor for {RANGE_SHARE:g}',
    'Dice as cut, difference', 'best single cut, difference', 'healthy ml, difference',
)  # fmt: skip
NOTES = textwrap.fill(
    'Dice is the mean over whole studies: "as cut" of the masks that the model gives, "best single '
    f'cut" of the probabilities at the one of {len(CUTS)} cuts, {CUTS[0]:.2f} to {CUTS[-1]:.2f}, '
    'that is best over all studies, "mean over cuts" of all these. Average precision counts every '
    f'voxel of a study. A true lesion is found where at least {100 * LEAST_SHARE:g} % of its '
    'voxels are marked; a marked one that touches no true one is false. The expected calibration '
    'error (ECE) is inside the lungs that the model found. "Healthy ml" is what is marked in a '
    'healthy scan. Of a model of several networks, "true ml in range" is the share of scans whose '
    'true volume lies in the range of lesion ml, "range\'s width" the median of its width in parts '
    f'of the true volume, and "factor for {RANGE_SHARE:g}" the least of the odds at which so many '
    'do, with the correction of split conformal prediction for the number of scans. In brackets '
    'are 95 % bootstrap intervals over studies, each taken for a subject, and where a model has '
    'several runs over these too. Differences are to the first model, paired by study. Where a '
    'score is undefined in some studies, the number of the others stands beside it.',
    width=100,
)
_MOST_LISTED = 12  # healthy scans that are listed one by one


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A row of the table: one model, or the runs of one recipe with several seeds.

    Attributes:
      name: in the table.
      runs: run → set → its rows of `score_studies`, in one order for all runs and recipes.
    """

    name: str
    runs: Mapping[str, Mapping[str, Sequence[Row]]]

    def column(self, set_name: str, column: str) -> np.ndarray:
        """(runs, studies) float64, NaN where it is undefined; no study where the set is missing."""
        sets = [run.get(set_name, ()) for run in self.runs.values()]
        return np.array([[row.get(column, np.nan) for row in rows] for rows in sets], np.float64)

    def dice_at_cuts(self, set_name: str) -> np.ndarray:
        """(cuts, runs, studies)."""
        return np.stack([self.column(set_name, name) for name in DICE_AT])


def make_table(recipes: Sequence[Recipe]) -> str:
    """Markdown: a row a recipe and kind of scans, and below what the columns are."""
    rows = []
    for kind, (lesion_set, healthy_set) in KINDS.items():
        if any(lesion_set in run or healthy_set in run for run in recipes[0].runs.values()):
            rows += [_cells(kind, each, recipes[0]) for each in recipes]
    return tabulate(rows, HEAD, tablefmt='github', disable_numparse=True) + '\n\n' + NOTES + '\n'


def write_rows(recipes: Sequence[Recipe]) -> str:
    """CSV_COLUMNS of every study of every run, as CSV; an undefined score is an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, restval='', lineterminator='\n')
    writer.writeheader()
    for recipe in recipes:
        for run, sets in recipe.runs.items():
            for set_name, rows in sets.items():
                for row in rows:
                    cells = {key: '' if value != value else value for key, value in row.items()}
                    writer.writerow({'model': recipe.name, 'run': run, 'set': set_name} | cells)
    return text.getvalue()


def _cells(kind: str, recipe: Recipe, first: Recipe) -> list[str]:
    lesion_set, healthy_set = KINDS[kind]
    dice, marked = recipe.column(lesion_set, 'dice'), recipe.column(healthy_set, 'marked_ml')
    best, cuts = best_single_cut(recipe, lesion_set)
    at_cuts = [_mean(each) for each in recipe.dice_at_cuts(lesion_set)]
    cells = [
        kind,
        recipe.name,
        str(dice.shape[1]),
        _mean_with_interval(dice),
        _mean_with_interval(best),
        ' '.join(f'{cut:.2f}' for cut in cuts),
        _format(_mean(np.array(at_cuts))),
        *(_mean_with_n(recipe.column(lesion_set, name))
          for name in ('average_precision', 'lesion_f1')),
        _found_nodules(recipe, lesion_set),
        _mean_with_n(recipe.column(lesion_set, 'ece'), 4),
        _healthy(marked),
        *_range_cells(recipe, lesion_set),
    ]  # fmt: skip
    if recipe is first:
        return [*cells, '', '', '']
    others = first.column(lesion_set, 'dice'), best_single_cut(first, lesion_set)[0]
    return [
        *cells,
        *(_difference(*pair) for pair in zip((dice, best), others, strict=True)),
        _difference(marked, first.column(healthy_set, 'marked_ml'), 1),
    ]


def best_single_cut(recipe: Recipe, set_name: str) -> tuple[np.ndarray, list[float]]:
    """Dice (runs, studies) at the single cut that is best over all studies, each run's own; and
    these cuts. No cut where there is no study with a Dice."""
    at_cuts = recipe.dice_at_cuts(set_name)
    means = np.array([[_mean(run) for run in cut] for cut in at_cuts])
    if np.isnan(means).any():
        return at_cuts[0], []
    best = means.argmax(axis=0)
    chosen = [at_cuts[index, run] for run, index in enumerate(best)]
    return np.stack(chosen), [float(CUTS[index]) for index in best]


def difference(runs: np.ndarray, against: np.ndarray) -> tuple[float, tuple[float, float]]:
    """Mean of (R, N) figures minus the mean of (Q, N) others, over the studies in which all of them
    are defined, and its 95 % interval."""
    both = ~np.isnan(runs).any(axis=0) & ~np.isnan(against).any(axis=0)
    runs, against = runs[:, both], against[:, both]
    return _mean(runs) - _mean(against), metrics.bootstrap_runs(runs, against)


def _range_cells(recipe: Recipe, set_name: str) -> list[str]:
    low, high, true_ml, factors = (
        recipe.column(set_name, name) for name in (*RANGE, 'true_ml', 'range_factor')
    )
    if np.isnan(low).all():
        return ['', '', '']
    held = np.where(np.isnan(low), np.nan, (low <= true_ml) & (true_ml <= high))
    widths = ((high - low) / true_ml)[~np.isnan(low) & (true_ml > 0)]
    return [
        _mean_with_interval(held),
        _format(float(np.median(widths)), 2),
        _format(conformal_quantile(factors[~np.isnan(factors)], RANGE_SHARE), 2),
    ]


def conformal_quantile(scores: np.ndarray, share: float) -> float:
    """The least bound that a further score, exchangeable with these, keeps with a probability of
    `share`: the ⌈(n + 1) share⌉-th of n, infinite where there are fewer (Vovk et al. 2005)."""
    rank = math.ceil((len(scores) + 1) * share)
    return float(np.sort(scores)[rank - 1]) if rank <= len(scores) else math.inf


def _difference(runs: np.ndarray, against: np.ndarray, digits: int = 3) -> str:
    mean, interval = difference(runs, against)
    low, high = (f'{limit:+.{digits}f}' for limit in interval)
    return '' if np.isnan(mean) else f'{mean:+.{digits}f} [{low}, {high}]'


def _mean(values: np.ndarray) -> float:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else np.nan


def _format(value: float, digits: int = 3) -> str:
    return '' if np.isnan(value) else f'{value:.{digits}f}'


def _mean_with_n(values: np.ndarray, digits: int = 3) -> str:
    defined = int((~np.isnan(values)).any(axis=0).sum())
    return _format(_mean(values), digits) + f' (n {defined})' * (0 < defined < values.shape[1])


def _mean_with_interval(values: np.ndarray) -> str:
    limits = metrics.bootstrap_runs(values)
    interval = '' if np.isnan(limits).any() else ' [{:.3f}, {:.3f}]'.format(*limits)
    mean, _, count = _mean_with_n(values).partition(' ')
    return mean + interval + f' {count}' * bool(count)


def _found_nodules(recipe: Recipe, set_name: str) -> str:
    total, found = (recipe.column(set_name, name) for name in ('nodules', 'nodules_found'))
    if not total.sum():
        return ''
    return f'{found.sum() / total.sum():.3f} (of {total.sum() / len(total):.0f})'


def _healthy(marked_ml: np.ndarray) -> str:
    of_scan = [_mean(each) for each in marked_ml.T]
    defined = [f'{each:.1f}' for each in of_scan if not np.isnan(each)]
    if not defined:
        return ''
    each = ': ' + ', '.join(defined) if len(defined) <= _MOST_LISTED else ''
    return f'{_mean(marked_ml):.1f} (n {len(defined)}{each})'
