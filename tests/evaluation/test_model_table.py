"""The table of several models, from rows by hand."""

import csv
import io
import math

import numpy as np
import pytest

from covseg_jax.evaluation import model_table
from covseg_jax.evaluation.model_scores import COLUMNS, DICE_AT
from covseg_jax.evaluation.model_table import CSV_COLUMNS, HEAD, Recipe, make_table, write_rows
from covseg_jax.predict.model import RANGE


def rows(dice, peak, **more):
    """A row a study; its Dice at cuts is 0.1 above `dice` at the cut `peak`, else 0.2 below."""
    at_cuts = [{name: each + (0.1 if name == peak else -0.2) for name in DICE_AT} for each in dice]
    base = dict.fromkeys(COLUMNS, 0.25) | {'category': 'CT-1', 'status': 'ok'}
    counts = {'nodules': 3, 'nodules_found': 1}
    return [
        base | counts | at_cuts[n] | {'study_id': f's{n}', 'dice': each} | more
        for n, each in enumerate(dice)
    ]


def healthy(*marked):
    return [{'study_id': f'h{n}', 'status': 'ok', 'marked_ml': ml} for n, ml in enumerate(marked)]


DICE = np.linspace(0.2, 0.8, 20)
FIRST = Recipe('first', {'first': {
    'phantoms': rows(DICE, 'dice_at_0.50'), 'healthy_phantoms': healthy(*[10.0] * 20),
    'real_slices': rows([0.5, 0.7], 'dice_at_0.50'), 'healthy_scans': healthy(1.0, 2.0, math.nan),
}})  # fmt: skip
# Two seeds: one 0.1 above the first in each study, one as much below, best at other cuts.
SEEDS = Recipe('a,b', {
    name: {
        'phantoms': rows(DICE + change, peak, nodules_found=found),
        'healthy_phantoms': healthy(*[ml] * 20),
        'real_slices': rows([0.6, math.nan], peak), 'healthy_scans': healthy(3.0, 4.0, 5.0),
    }
    for name, change, peak, found, ml in (
        ('a', 0.1, 'dice_at_0.30', 0, 12.0), ('b', -0.1, 'dice_at_0.75', 2, 14.0),
    )
})  # fmt: skip


def read(text):
    lines = [line for line in text.splitlines() if line.startswith('|')]
    cells = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines]
    assert tuple(cells[0]) == HEAD
    return {(row[0], row[1]): dict(zip(HEAD, row, strict=True)) for row in cells[2:]}


def test_table_has_a_row_a_recipe_and_kind_of_scans():
    table = read(make_table([FIRST, SEEDS]))
    assert list(table) == [
        ('phantoms', 'first'), ('phantoms', 'a,b'), ('real', 'first'), ('real', 'a,b')
    ]  # fmt: skip
    first, seeds = table['phantoms', 'first'], table['phantoms', 'a,b']
    assert first['n'] == '20'
    assert first['Dice as cut'].startswith('0.500 [0.4')
    assert (first['Dice, best single cut'][:5], first['at']) == ('0.600', '0.50')
    assert first['mean over cuts'] == f'{0.5 + (0.1 - 18 * 0.2) / 19:.3f}'
    assert first['found under 1 ml'] == '0.333 (of 60)'
    assert (first['healthy ml'], first['ECE']) == ('10.0 (n 20)', '0.2500')
    assert {first[name] for name in HEAD if 'difference' in name} == {''}
    # Each seed is cut at its own best, and drawn as a whole: both of one kind in every fourth draw.
    assert (seeds['Dice, best single cut'][:5], seeds['at']) == ('0.600', '0.30 0.75')
    assert seeds['Dice as cut, difference'] == '+0.000 [-0.100, +0.100]'
    assert seeds['found under 1 ml'] == '0.333 (of 60)'
    assert seeds['healthy ml, difference'] == '+3.0 [+2.0, +4.0]'


def test_undefined_scores_count_in_no_mean_and_in_no_difference():
    table = read(make_table([FIRST, SEEDS]))
    first, seeds = table['real', 'first'], table['real', 'a,b']
    assert first['healthy ml'] == '1.5 (n 2: 1.0, 2.0)'
    assert seeds['healthy ml, difference'] == '+2.0 [+2.0, +2.0]'
    assert seeds['Dice as cut'] == '0.600 (n 1)'  # of one study there is no interval
    mean, interval = model_table.difference(
        SEEDS.column('real_slices', 'dice'), FIRST.column('real_slices', 'dice')
    )
    assert mean == pytest.approx(0.1)
    assert all(map(math.isnan, interval))


def test_range_is_held_against_the_truth_and_a_factor_is_found_for_it():
    ranged = [
        row | {'true_ml': 10.0, 'lesion_ml_low': 5.0, 'lesion_ml_high': high, 'range_factor': n + 1}
        for n, (row, high) in enumerate(zip(rows(DICE, ''), [15.0] * 16 + [9.0] * 4, strict=True))
    ]
    refused = rows([0.0], '', status='no lungs')[0]
    refused = {key: value for key, value in refused.items() if key not in RANGE}
    del refused['range_factor']
    table = read(make_table([Recipe('two', {'two': {'phantoms': [*ranged, refused]}})]))
    found = table['phantoms', 'two']
    assert found['true ml in range'].startswith('0.800 [0.')
    assert found['true ml in range'].endswith('(n 20)')
    assert found["range's width"] == '1.00'
    assert found['factor for 0.9'] == '19.00'  # the 19th of 20: 0.9 of 21 are 18.9
    assert model_table.conformal_quantile(np.arange(8.0), 0.9) == math.inf


def test_sets_that_are_not_there_are_not_in_the_table():
    only = Recipe('only', {'only': {'healthy_scans': healthy(1.0)}})
    assert read(make_table([only]))['real', 'only']['healthy ml'] == '1.0 (n 1: 1.0)'


def test_every_study_of_every_run_is_a_row_of_the_csv():
    found = list(csv.DictReader(io.StringIO(write_rows([FIRST, SEEDS]))))
    assert tuple(found[0]) == CSV_COLUMNS
    assert len(found) == 45 + 2 * 45
    assert {(row['model'], row['run']) for row in found} == {
        ('first', 'first'), ('a,b', 'a'), ('a,b', 'b')
    }  # fmt: skip
    undefined = [row['study_id'] for row in found if row['set'] != 'real_slices'
                 and row['marked_ml'] == '']  # fmt: skip
    assert undefined == ['h2']
    assert float(found[3]['dice']) == DICE[3]
