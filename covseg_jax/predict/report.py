"""The one-file HTML page of predictions: scans without a true mask."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from covseg_jax.predict import viewer
from covseg_jax.predict.default import INTENDED_USE
from covseg_jax.predict.model import RANGE
from covseg_jax.predict.page import make_environment
from covseg_jax.predict.preview import (
    DISAGREEMENT_COLOUR,
    LUNG_WINDOW_HU,
    LUNGS_COLOUR,
    PREDICTION_COLOUR,
)

_ENVIRONMENT = make_environment()
# Column of results.csv, title, digits.
_COLUMNS = (
    ('infection_percent', 'Infection, %', 1), ('severity', 'Severity', None),
    ('lesion_ml', 'Lesions, ml', 1), ('lung_ml', 'Lungs, ml', 0),
    ('right_lesion_ml', 'Right lesions, ml', 1), ('right_lung_ml', 'Right lung, ml', 0),
    ('left_lesion_ml', 'Left lesions, ml', 1), ('left_lung_ml', 'Left lung, ml', 0),
)  # fmt: skip
_COLOURS = {
    'lungs': LUNGS_COLOUR, 'lesions': PREDICTION_COLOUR, 'disagreement': DISAGREEMENT_COLOUR,
}  # fmt: skip
_TOGGLES = (('l', 'lesions'), ('u', 'lungs'), ('d', 'disagreement'))  # key, layer
_SIDES = (('Both', ''), ('Right', 'right_'), ('Left', 'left_'))


def render_report(
    records: Sequence[Mapping[str, Any]],
    set_aside: Mapping[str, str],
    methods: tuple[str, str],
    read_view: Callable[[str], Mapping[str, Any]],
) -> str:
    """The page, as HTML that opens from disk without a network.

    Args:
      records: of each study, what `record.write_record` wrote, lesions of either lung included;
        listed by infection, the most first.
      set_aside: study id → fault, of those that could not be used.
      methods: paragraph and references, from `methods.describe_methods`.
      read_view: study id → what `viewer.draw_views` made of it. It is asked for the studies of most
        infection, as far as the bounds of a page allow.
    """
    most_first = sorted(records, key=lambda each: (-_infection(each), each['study_id']))
    views = _choose_views([record['study_id'] for record in most_first], read_view)
    viewed = {view['study_id'] for view in views}
    drawn = {name for view in views for name in view['masks']}
    has_ranges = any(RANGE[0] in record['results'] for record in records)
    paragraph, references = methods
    return _ENVIRONMENT.get_template('results.html.j2').render(
        columns=[
            'Study',
            *(title for _, title, _ in _COLUMNS),
            *(['Range of lesions, ml'] if has_ranges else []),
            'Warnings',
        ],
        studies=[_describe_study(record, has_ranges) for record in most_first],
        set_aside=set_aside,
        views=views,
        viewed=viewed,
        panel=[name for name in _COLOURS if name in drawn],
        toggles=[(key, name, [name]) for key, name in _TOGGLES if name in drawn],
        colours=_COLOURS,
        has_ranges=has_ranges,
        window_hu=LUNG_WINDOW_HU,
        facts=_describe_run(most_first),
        settings=json.dumps(most_first[0]['settings'], indent=2) if most_first else '',
        paragraph=paragraph,
        references=references.splitlines(),
        intended_use=INTENDED_USE,
    )


def _infection(record: Mapping[str, Any]) -> float:
    return float(record['results']['infection_percent'])


def _choose_views(
    study_ids: Sequence[str], read_view: Callable[[str], Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    views, left = [], viewer.PAGE_BYTES
    for study_id in study_ids[: viewer.MAX_VIEWS]:
        view = read_view(study_id)
        left -= len(view['scan']) + sum(map(len, view['masks'].values()))
        if left < 0 and views:
            break
        views.append(view)
    return views


def _format(value: Any, digits: int | None) -> str:
    return str(value) if digits is None else f'{value:.{digits}f}'


def _describe_study(record: Mapping[str, Any], has_ranges: bool) -> dict[str, Any]:
    """What the page shows of a study: cells of the table, (text, key to sort by, is it a number)
    each, and a small table of both lungs."""
    results, warnings = record['results'], record['warnings']
    cells = [(record['study_id'], record['study_id'], False)]
    cells += [
        (_format(results[name], digits), results[name], digits is not None)
        for name, _, digits in _COLUMNS
    ]
    ends = [results[name] for name in RANGE if name in results]
    span = ' to '.join(f'{each:.1f}' for each in ends)
    if has_ranges:  # sorted by their widths
        cells.append((span, ends[1] - ends[0] if ends else '', True))
    cells.append((str(len(warnings) or ''), len(warnings), True))
    lungs = []
    for title, prefix in _SIDES:
        lesion, lung, percent = (
            results[f'{prefix}{name}'] for name in ('lesion_ml', 'lung_ml', 'infection_percent')
        )
        lungs.append((title, f'{lung:.0f}', f'{lesion:.1f}', f'{percent:.1f}'))
    scan = record['scan']
    return {
        'study_id': record['study_id'],
        'cells': cells,
        'severity': results['severity'],
        'lungs': lungs,
        'range': span,
        'warnings': warnings,
        'mask': results['mask'],
        'scan': scan['name'],
        'size': ' × '.join(map(str, scan['shape'])),
        'spacing': ' × '.join(f'{each:.3g}' for each in scan['spacing_mm']),
        'finished': record['finished'][:16].replace('T', ' ') + ' UTC',
    }


def _describe_run(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(name, text) of what made the masks."""
    if not records:
        return []
    software, facts = records[0]['software'], []
    for network in records[0]['model']['networks']:
        details = [network['config'], f'step {network["checkpoint_step"]}']
        named = f' ({", ".join(details)})' if network['config'] else ''
        facts.append(('Model', f'{network["name"]}{named}'))
        for file, checksum in network['sha256'].items():
            if file == 'weights.safetensors':
                facts.append(('SHA-256 of its weights', checksum))
    versions = sorted({each['software']['covseg_jax'] for each in records})
    revision = software['git_revision']
    facts.append(
        ('covseg_jax', ', '.join(versions) + (f', revision {revision}' if revision else ''))
    )
    packages = software['packages']
    facts.append(
        ('Computed with', f'JAX {packages["jax"]}, {software["device"]}, {software["platform"]}')
    )
    return facts
