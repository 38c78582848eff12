"""Two runs on the same studies."""

import json

import numpy as np
import pytest

from covseg_jax.errors import InputError
from covseg_jax.evaluation import scores
from covseg_jax.evaluation.compare import compare_runs


def write_run(folder, dice, subject_of=lambda name: name):
    """A run whose studies have the given Dice; its masks do not matter."""
    mask = np.zeros((2, 4, 4), bool)
    mask[0, 0, 0] = True
    rows = []
    for name, value in dice.items():
        row, _ = scores.score_case(
            scores.CaseArrays(
                *(name, None, mask, mask, mask, (1.0, 1.0, 1.0)),
                *(mask, mask.astype(np.float32), mask),
                subject=subject_of(name),
            )
        )
        rows.append(row | {'dice': value})
    scores.write_tables(folder / 'evaluation', rows, [])
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


def test_runs_are_compared_over_subjects(tmp_path):
    change = {'p_1': 0.1, 'p_2': 0.3, 'p_3': 0.2, 'q_1': -0.1, 'r_1': 0.3, 'r_2': -0.3}
    subject_of = '{0[0]}'.format
    first = write_run(tmp_path / 'a', dict.fromkeys(change, 0.5), subject_of)
    second = {name: 0.5 + each for name, each in change.items()}
    (dice, *_), _ = compare_runs(first, write_run(tmp_path / 'b', second, subject_of))
    assert (dice.n, dice.subjects) == (6, 3)
    assert dice.difference == pytest.approx(0.5 / 6)
    # Three draws of p (three studies, 0.6 together), q (one, -0.1) and r (two, 0.0): of 27 one is
    # all q and one is all p, each 3.7 %, more than the 2.5 % on either side.
    assert dice.ci95 == pytest.approx((-0.1, 0.2))
    # The subjects' means are 0.2, -0.1 and 0.0: two signed ranks, of which the smaller is negative,
    # so that every second of the four is as far or farther from even.
    assert dice.wilcoxon_p == 1.0


def test_runs_that_disagree_on_a_studys_subject_are_refused(tmp_path):
    first = write_run(tmp_path / 'a', {'p_1': 0.5, 'p_2': 0.5})
    second = write_run(tmp_path / 'b', {'p_1': 0.5, 'p_2': 0.5}, lambda name: 'p')
    with pytest.raises(InputError, match=r'p_1: a study of p_1 in .*subject_pattern'):
        compare_runs(first, second)


def test_tables_without_subjects_are_to_be_made_again(tmp_path):
    run = write_run(tmp_path / 'a', {'x': 0.5})
    table = run / 'evaluation' / 'cases.csv'
    table.write_text(table.read_text().replace('subject', 'person'))
    with pytest.raises(InputError, match=r'cases\.csv: no column subject; run evaluate again'):
        compare_runs(run, run)


def test_runs_without_a_study_in_common_are_refused(tmp_path):
    runs = write_run(tmp_path / 'a', {'x': 0.5}), write_run(tmp_path / 'b', {'y': 0.5})
    with pytest.raises(InputError, match='no study in common'):
        compare_runs(*runs)


def test_a_difference_of_one_study_is_json(tmp_path):
    first = write_run(tmp_path / 'a', {'s': 0.5})
    second = write_run(tmp_path / 'b', {'s': 0.6})
    differences, _ = compare_runs(first, second)
    text = json.dumps([each.to_json() for each in differences], allow_nan=False)
    dice = next(each for each in json.loads(text) if each['metric'] == 'dice')
    assert dice['ci95'] == [None, None]
    assert dice['difference'] == pytest.approx(0.1)
