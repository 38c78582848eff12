"""What a stage made, from what, so that a done stage is known as done.

`<workdir>/manifests/<stage>.json` is written once a stage has ended well. Its fingerprint covers
the settings that the stage depends on and the fingerprints of the stages before it.
"""

import dataclasses
import datetime
import hashlib
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from covseg_jax import atomic
from covseg_jax.errors import InputError

# Of the settings' names, in a record: 2 since fields are grouped as the dataclasses that they fill.
_NAMES = 'names'
_NAMES_VERSION = 2


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A finished stage: its fingerprint, its outputs with their sizes in bytes, its time."""

    stage: str
    fingerprint: str
    outputs: dict[str, int]
    finished_at: str
    seconds: float


def fingerprint(value: Any) -> str:
    """SHA-256 of a JSON-like value; equal for equal values whatever the order of their keys."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _path(workdir: pathlib.Path, stage: str) -> pathlib.Path:
    return workdir / 'manifests' / f'{stage}.json'


def _begun_path(workdir: pathlib.Path, stage: str) -> pathlib.Path:
    return workdir / 'manifests' / f'{stage}.begun.json'


def read_manifest(workdir: pathlib.Path, stage: str) -> Manifest | None:
    """The stage's manifest, or None where it has not ended well yet."""
    path = _path(workdir, stage)
    if not path.exists():
        return None
    return Manifest(**json.loads(path.read_text(encoding='utf-8')))


def read_begun(workdir: pathlib.Path, stage: str) -> dict | None:
    """The settings that the stage was begun with, or None where nobody knows them."""
    record = _read_record(workdir, stage)
    return None if record is None else {k: v for k, v in record.items() if k != _NAMES}


def _read_record(workdir: pathlib.Path, stage: str) -> dict | None:
    path = _begun_path(workdir, stage)
    return json.loads(path.read_text(encoding='utf-8')) if path.exists() else None


def is_done(workdir: pathlib.Path, stage: str, expected: str) -> bool:
    """True when the stage ended well with this fingerprint and its outputs are as it left them."""
    manifest = read_manifest(workdir, stage)
    if manifest is None or manifest.fingerprint != expected:
        return False
    return all(
        (workdir / name).exists() and (workdir / name).stat().st_size == size
        for name, size in manifest.outputs.items()
    )


def describe(workdir: pathlib.Path, stage: str) -> str:
    """In a few words: done, begun or not begun."""
    manifest = read_manifest(workdir, stage)
    if manifest is not None:
        return f'done {manifest.finished_at}, in {manifest.seconds:.0f} s'
    return 'begun, not done' if _begun_path(workdir, stage).exists() else 'not begun'


def refuse_other_settings(
    workdir: pathlib.Path, stage: str, settings: Mapping, remedy: str
) -> None:
    """What a stage was begun with decides, for itself where it goes on and for those that use it.

    Settings that only one side names do not count: they are of an older or a newer program, or not
    the stage's that asks. A stage without a record refuses nothing.

    Raises:
      InputError: the stage was begun with other settings; names those that differ, and `remedy`.
        Or it was begun by a version whose settings had other names.
    """
    begun = _read_record(workdir, stage)
    if begun is None:
        return
    if begun.pop(_NAMES, None) != _NAMES_VERSION:
        raise InputError(
            f'{workdir}: stage {stage} was begun by a version of covseg_jax whose settings had '
            'other names; go on with that version (environment.json names its revision), or use '
            'another --workdir'
        )
    begun = flatten(begun)
    now = flatten(json.loads(json.dumps(settings, default=str)))
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
        if isinstance(value, Mapping):
            flat |= flatten(value, f'{prefix}{key}.')
        else:
            flat[prefix + key] = value
    return flat


def begin(workdir: pathlib.Path, stage: str, settings: Mapping) -> None:
    """The stage is about to run: it is not done until it says so."""
    _path(workdir, stage).unlink(missing_ok=True)
    _record(workdir, stage, settings)


def _record(workdir: pathlib.Path, stage: str, settings: Mapping) -> None:
    record = {_NAMES: _NAMES_VERSION, **settings}
    atomic.write_text(_begun_path(workdir, stage), json.dumps(record, indent=2, default=str))


def finish(
    workdir: pathlib.Path,
    stage: str,
    settings: Mapping,
    outputs: Iterable[pathlib.Path],
    seconds: float,
) -> None:
    """Marks a stage as done. Outputs are files, inside the work directory or not.

    The settings are those that it began with, but for a stage that made the data set which they
    describe."""
    _record(workdir, stage, settings)
    sizes = {
        str(p.relative_to(workdir) if p.is_relative_to(workdir) else p.resolve()): p.stat().st_size
        for p in outputs
    }
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
    manifest = Manifest(stage, fingerprint(settings), sizes, now, round(seconds, 3))
    atomic.write_text(_path(workdir, stage), json.dumps(dataclasses.asdict(manifest), indent=2))
