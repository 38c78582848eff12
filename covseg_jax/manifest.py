"""What a stage made, from what, so that a done stage is known as done.

`<workdir>/manifests/<stage>.json` is written once a stage has ended well: its fingerprint, its
outputs with their sizes in bytes, and its time. The fingerprint covers the settings that the stage
and those before it depend on. `<stage>.begun.json` has the settings that the stage began with.
"""

import datetime
import hashlib
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from covseg_jax import atomic
from covseg_jax.errors import InputError

_EVALUATE = 'evaluate'  # the stage that comes after all others
# Version of the settings' names: 2 since fields are grouped as the dataclasses that they fill.
_NAMES, _NAMES_VERSION = 'names', 2
NOT_BEGUN = 'not begun'


def fingerprint(value: Any) -> str:
    """SHA-256 of a JSON-like value; equal for equal values whatever the order of their keys."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _path(workdir: pathlib.Path, stage: str) -> pathlib.Path:
    return workdir / 'manifests' / f'{stage}.json'


def _read(path: pathlib.Path) -> dict | None:
    return json.loads(path.read_text(encoding='utf-8')) if path.exists() else None


def read_begun(workdir: pathlib.Path, stage: str) -> dict | None:
    """The settings that the stage was begun with, or None where nobody knows them."""
    record = _read(_path(workdir, f'{stage}.begun'))
    return record and {key: value for key, value in record.items() if key != _NAMES}


def is_done(workdir: pathlib.Path, stage: str, expected: str) -> bool:
    """True when the stage ended well with this fingerprint and its outputs are as it left them."""
    done = _read(_path(workdir, stage))
    if done is None or done['fingerprint'] != expected:
        return False
    outputs = {workdir / name: size for name, size in done['outputs'].items()}
    return all(path.exists() and path.stat().st_size == size for path, size in outputs.items())


def read_outputs(workdir: pathlib.Path, stage: str) -> list[pathlib.Path]:
    """The files that a stage made when it last ended well."""
    done = _read(_path(workdir, stage)) or {'outputs': ()}
    return [workdir / name for name in done['outputs']]


def read_seconds(workdir: pathlib.Path, stage: str) -> float | None:
    """How long the stage took when it last ended well; None where nobody knows."""
    done = _read(_path(workdir, stage))
    return done and done['seconds']


def describe(workdir: pathlib.Path, stage: str) -> str:
    """In a few words: done, begun or not begun."""
    done = _read(_path(workdir, stage))
    if done is not None:
        return f'done {done["finished_at"]}, in {done["seconds"]:.0f} s'
    return 'begun, not done' if _path(workdir, f'{stage}.begun').exists() else NOT_BEGUN


def refuse_other_settings(
    workdir: pathlib.Path, stage: str, settings: Mapping, remedy: str
) -> None:
    """Holds a stage that goes on, and those that use what it made, to what it was begun with.

    Settings that only one side names do not count: they are of an older or a newer program, or not
    of the stage that asks. A stage without a record refuses nothing.

    Raises:
      InputError: the stage was begun with other settings; names those that differ, and `remedy`.
        Or it was begun by a version whose settings had other names.
    """
    begun = _read(_path(workdir, f'{stage}.begun'))
    if begun is None:
        return
    if begun.pop(_NAMES, None) != _NAMES_VERSION:
        raise InputError(
            f'{workdir}: stage {stage} was begun by a version of covseg_jax whose settings had '
            'other names; go on with that version (environment.json names its revision), or use '
            'another --workdir'
        )
    begun, now = flatten(begun), flatten(json.loads(json.dumps(settings, default=str)))
    changed = sorted(key for key in begun.keys() & now.keys() if begun[key] != now[key])
    if changed:
        listed = ', '.join(f'{key} was {begun[key]}, is {now[key]}' for key in changed[:5])
        more = f' and {len(changed) - 5} more' if len(changed) > 5 else ''
        raise InputError(
            f'{workdir}: stage {stage} was begun with other settings ({listed}{more}); {remedy}'
        )


def flatten(values: Mapping, prefix: str = '') -> dict[str, Any]:
    """Nested values by dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        is_nested = isinstance(value, Mapping)
        flat |= flatten(value, f'{prefix}{key}.') if is_nested else {prefix + key: value}
    return flat


def begin(workdir: pathlib.Path, stage: str, settings: Mapping) -> None:
    """The stage is about to run: it is not done until it says so, and what was evaluated before is
    not what it will have made."""
    for each in {stage, _EVALUATE}:
        _path(workdir, each).unlink(missing_ok=True)
    _record(workdir, stage, settings)


def _record(workdir: pathlib.Path, stage: str, settings: Mapping) -> None:
    text = json.dumps({_NAMES: _NAMES_VERSION, **settings}, indent=2, default=str)
    atomic.write_text(_path(workdir, f'{stage}.begun'), text)


def finish(
    workdir: pathlib.Path,
    stage: str,
    settings: Mapping,
    outputs: Iterable[pathlib.Path],
    seconds: float,
) -> None:
    """Marks a stage as done. Outputs are files, inside the work directory or not. Settings differ
    from those that it began with only where the stage made the data set that they describe."""
    _record(workdir, stage, settings)
    sizes = {
        str(p.relative_to(workdir) if p.is_relative_to(workdir) else p.resolve()): p.stat().st_size
        for p in outputs
    }
    done = {
        'stage': stage,
        'fingerprint': fingerprint(settings),
        'outputs': sizes,
        'finished_at': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
        'seconds': round(seconds, 3),
    }
    atomic.write_text(_path(workdir, stage), json.dumps(done, indent=2))
