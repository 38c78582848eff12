"""Two runs on the same studies."""

import numpy as np
import pytest

from covseg_jax.errors import InputError
from covseg_jax.evaluation import evaluate
from covseg_jax.evaluation.compare import compare_runs


def write_run(folder, dice):
    """A run whose studies have the given Dice; its masks do not matter."""
    mask = np.zeros((2, 4, 4), bool)
    mask[0, 0, 0] = True
    rows = []
    for name, value in dice.items():
        row, _ = evaluate.score_case(
            evaluate.CaseArrays(
                *(name, None, mask, mask, mask, (1.0, 1.0, 1.0)),
                *(mask, mask.astype(np.float32), mask),
            )
        )
        rows.append(row | {'dice': value})
    evaluate.write_tables(folder / 'evaluation', rows, [])
    return folder


def test_runs_are_compared_study_by_study(tmp_path):
    first = write_run(tmp_path / 'a', {f's{n}': 0.5 for n in range(8)})
    second = {f's{n}': 0.5 + 0.01 * n for n in range(1, 8)} | {'other': 1.0}
    differences, alone = compare_runs(first, write_run(tmp_path / 'b', second))
    assert alone == ['other', 's0']
    dice = differences[0]
    assert (dice.metric, dice.n) == ('dice', 7)
    assert dice.difference == pytest.approx(0.04)
    assert 0 < dice.ci95[0] < 0.04 < dice.ci95[1]
    assert dice.wilcoxon_p == pytest.approx(2 / 2**7)  # all seven of one sign


def test_runs_without_a_study_in_common_are_refused(tmp_path):
    runs = write_run(tmp_path / 'a', {'x': 0.5}), write_run(tmp_path / 'b', {'y': 0.5})
    with pytest.raises(InputError, match='no study in common'):
        compare_runs(*runs)
