"""Prints the table of launch/ablation.sh from the summaries of its rows, as Markdown."""

import json
import pathlib
import re
import sys
from collections import defaultdict


def _mean(values):
    return sum(values) / len(values) if values else None


def _format(value, digits=3):
    return '' if value is None else f'{value:.{digits}f}'


def main(folder: pathlib.Path) -> None:
    """One line a recipe: the mean over its seeds, and each seed's Dice."""
    runs = defaultdict(list)
    for path in sorted(folder.glob('*/evaluation/summary.json')):
        workdir = path.parent.parent
        recipe = re.sub(r'_\d+$', '', workdir.name)
        summary = json.loads(path.read_text(encoding='utf-8'))
        calibration = workdir / 'transunet' / 'calibration.json'
        healthy = None
        if calibration.exists():
            healthy = json.loads(calibration.read_text(encoding='utf-8')).get(
                'healthy_false_positive_ml'
            )
        pseudo = summary['pseudo_masks'] and summary['pseudo_masks']['volume']['dice']['mean']
        volume = summary['protocols']['volume']
        runs[recipe].append(
            (volume['dice']['mean'], volume['sensitivity']['mean'], pseudo, healthy)
        )
    print('| row | Dice | each seed | sensitivity | its pseudo-masks | healthy ml |')
    print('|---|---|---|---|---|---|')
    for recipe, rows in runs.items():
        dice, sensitivity, pseudo, healthy = (
            [value for value in column if value is not None] for column in zip(*rows, strict=True)
        )
        cells = [
            recipe,
            _format(_mean(dice)),
            ' '.join(_format(value) for value in dice),
            _format(_mean(sensitivity)),
            _format(_mean(pseudo)),
            _format(_mean(healthy), 1),
        ]
        print('| ' + ' | '.join(cells) + ' |')


if __name__ == '__main__':
    main(pathlib.Path(sys.argv[1]))
