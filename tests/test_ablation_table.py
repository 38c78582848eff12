"""The table of the comparison, from runs that are there."""

import json
import pathlib
import subprocess
import sys

from covseg_jax.evaluation import scores

TABLE = pathlib.Path(__file__).parents[1] / 'launch' / 'ablation_table.py'


def write_run(folder, *, dice, slice_dice, precision, revision):
    row = dict.fromkeys(scores.CASE_COLUMNS, 0.25) | {'study_id': 'a', 'category': 'CT-1'}
    slice_row = dict.fromkeys(scores.SLICE_COLUMNS, 0.25) | {
        'study_id': 'a',
        'protocol': 'slice_infection_over_1pct',
        'dice': slice_dice,
    }
    cases = [row | {'dice': dice, 'average_precision': precision}]
    (folder / 'evaluation').mkdir(parents=True)
    scores.write_summary(
        folder / 'evaluation',
        {'protocols': scores.summarise(cases, [slice_row]), 'pseudo_masks': None},
    )
    (folder / 'environment.json').write_text(json.dumps({'git_revision': revision}))


def test_table_names_protocols_and_the_code_that_made_each_row(tmp_path):
    first, second = 'a' * 40, 'b' * 40
    write_run(tmp_path / 'default_0', dice=0.5, slice_dice=0.6, precision=0.7, revision=first)
    write_run(tmp_path / 'default_1', dice=0.6, slice_dice=0.8, precision=0.8, revision=second)
    write_run(tmp_path / 'published_0', dice=0.1, slice_dice=0.2, precision=0.3, revision=None)
    printed = subprocess.run(
        [sys.executable, TABLE, tmp_path], capture_output=True, text=True, check=True
    ).stdout
    head, _, *rows = (
        [cell.strip() for cell in line.strip('|').split('|')] for line in printed.splitlines()
    )
    found = [dict(zip(head, row, strict=True)) for row in rows]
    assert [
        (row['Dice, `volume`'], row['Dice, `slice_infection_over_1pct`'],
         row['average precision, `volume`'], row['code'])
        for row in found
    ] == [
        ('0.550', '0.700', '0.750', f'{first[:10]} {second[:10]}'),
        ('0.100', '0.200', '0.300', 'unknown'),
    ]  # fmt: skip
    assert found[0]['each seed'] == '0.500 0.600'
