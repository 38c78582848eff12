"""Prints the table of launch/ablation.sh from the summaries of its rows, as Markdown."""

import json
import pathlib
import re
import sys
from collections import defaultdict

_SLICES = 'slice_infection_over_1pct'  # the original paper's protocol
_HEAD = (
    'row', 'Dice, `volume`', 'each seed', f'Dice, `{_SLICES}`', 'average precision, `volume`',
    'sensitivity, `volume`', 'its pseudo-masks, Dice, `volume`', 'healthy ml', 'code',
)  # fmt: skip


def _mean(values):
    return sum(values) / len(values) if values else None


def _format(value, digits=3):
    return '' if value is None else f'{value:.{digits}f}'


def _read(path: pathlib.Path) -> dict:
    return json.loads(path.read_text(encoding='utf-8')) if path.exists() else {}


def _figures(workdir: pathlib.Path) -> dict:
    """What the table shows of one run; None where the run does not say it."""
    summary = _read(workdir / 'evaluation' / 'summary.json')
    pseudo = summary['pseudo_masks'] and summary['pseudo_masks']['volume']['dice']['mean']
    volume, slices = summary['protocols']['volume'], summary['protocols'][_SLICES]
    calibration = _read(workdir / 'transunet' / 'calibration.json')
    revision = _read(workdir / 'environment.json').get('git_revision')
    return {
        'dice': volume['dice']['mean'],
        'slice_dice': slices['dice']['mean'],
        # summaries of older code have none
        'average_precision': volume.get('average_precision', {}).get('mean'),
        'sensitivity': volume['sensitivity']['mean'],
        'pseudo': pseudo,
        'healthy_ml': calibration.get('healthy_false_positive_ml'),
        'revision': revision and revision[:10],
    }


def main(folder: pathlib.Path) -> None:
    """One line a recipe: means over its seeds, each seed's Dice, and the revisions of the code that
    made them."""
    runs = defaultdict(list)
    for path in sorted(folder.glob('*/evaluation/summary.json')):
        workdir = path.parent.parent
        runs[re.sub(r'_\d+$', '', workdir.name)].append(_figures(workdir))
    print('| ' + ' | '.join(_HEAD) + ' |')
    print('|' + '---|' * len(_HEAD))
    for recipe, rows in runs.items():
        of = {name: [row[name] for row in rows if row[name] is not None] for name in rows[0]}
        cells = [
            recipe,
            _format(_mean(of['dice'])),
            ' '.join(_format(value) for value in of['dice']),
            _format(_mean(of['slice_dice'])),
            _format(_mean(of['average_precision'])),
            _format(_mean(of['sensitivity'])),
            _format(_mean(of['pseudo'])),
            _format(_mean(of['healthy_ml']), 1),
            ' '.join(sorted(set(of['revision']))) or 'unknown',
        ]
        print('| ' + ' | '.join(cells) + ' |')


if __name__ == '__main__':
    main(pathlib.Path(sys.argv[1]))
