"""Which files this program wrote, so that in a folder that a person named nothing else is replaced,
removed or, in the next run, taken for a scan or a human mask.

Such a folder holds `.covseg_jax.jsonl`, a line a file: its name relative to that folder, its size
and its CRC-32. A file is this program's only if what it holds now was noted under its name: a mask
that somebody corrected and saved under the same name is theirs, and so is a copy of a file that
came without its note.

A file is noted when it is whole and before it gets its name: a kill in between leaves a note too
many, and never a file that nobody claims.
"""

import contextlib
import functools
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator
from typing import Any

from isal import isal_zlib

from covseg_jax import atomic
from covseg_jax.errors import InputError

RECORD = '.covseg_jax.jsonl'
_CHUNK = 1 << 20


def is_ours(path: str | os.PathLike) -> bool:
    """Whether a file is there and holds what this program wrote."""
    return _find_note(pathlib.Path(path)) is not None


def is_output(path: str | os.PathLike) -> bool:
    """Whether a file is this program's and a result: no scan and no human mask. A scan that it
    copied is a scan."""
    note = _find_note(pathlib.Path(path))
    return note is not None and not note.get('scan')


def refuse_foreign(paths: Iterable[str | os.PathLike]) -> None:
    """To be called before any work with what is to be written or removed.

    Raises:
        InputError: at one of the paths is something that this program did not write, or that was
            changed since; names the first.
    """
    for path in paths:
        # In this order: another host may remove what is its own between the two.
        if not is_ours(path) and os.path.lexists(path):
            raise InputError(
                f'{path}: is in the way: this program did not write it, or it was changed since; '
                'name another --output, or move it elsewhere'
            )


@contextlib.contextmanager
def new_file(
    path: str | os.PathLike, folder: str | os.PathLike | None = None, *, is_scan: bool = False
) -> Iterator[pathlib.Path]:
    """As `atomic.new_file`, for a file that is noted.

    Args:
        path: the file.
        folder: where the note goes: the file's own folder, or the one above.
        is_scan: a copy of a scan.

    Raises:
        InputError: something is there by then that this program did not write.
    """
    path = pathlib.Path(path)
    with atomic.new_file(path) as temporary:
        yield temporary
        refuse_foreign([path])
        note = _describe(temporary) | ({'scan': True} if is_scan else {})
        _note(path, pathlib.Path(folder or path.parent), **note)


@contextlib.contextmanager
def new_files(folder: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields an empty folder; the files in it, and in folders in it, are noted and put into
    `folder` once the block has ended well.

    Raises:
        InputError: something is there by then that this program did not write.
    """
    folder = pathlib.Path(folder)
    atomic.remove_leftovers(folder)
    temporary = atomic.temporary_sibling(folder / 'files')
    temporary.mkdir(parents=True)
    try:
        yield temporary
        made = sorted(path for path in temporary.rglob('*') if path.is_file())
        places = [folder / path.relative_to(temporary) for path in made]
        refuse_foreign(places)
        for path, place in zip(made, places, strict=True):
            with new_file(place) as new:
                path.replace(new)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes UTF-8 text as `new_file` does."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding='utf-8')


def remove(paths: Iterable[str | os.PathLike]) -> None:
    """Removes those of the files that are this program's."""
    for path in paths:
        if is_ours(path):
            pathlib.Path(path).unlink(missing_ok=True)


def claim(path: str | os.PathLike, head: bytes) -> None:
    """Notes a file that will grow, before it is there: it is this program's for as long as it
    begins with `head`, or is empty."""
    path = pathlib.Path(path)
    if not is_ours(path):
        note = {'bytes': len(head), 'crc32': isal_zlib.crc32(head)}
        _note(path, path.parent, **note, grows=True)


def adopt(paths: Iterable[str | os.PathLike]) -> None:
    """Takes for this program's what lies at places that are its own, such as its names in the work
    directory: files of versions without this record, and files that were changed since."""
    for path in map(pathlib.Path, paths):
        if path.is_file() and not path.is_symlink() and not is_ours(path):
            _note(path, path.parent, **_describe(path))


def _find_note(path: pathlib.Path) -> dict[str, Any] | None:
    try:
        if path.is_symlink() or not path.is_file():
            return None
        notes = [note for record, name in _records(path) for note in _read(record).get(name, ())]
        size = path.stat().st_size if notes else 0
        return next((note for note in notes if _fits(note, path, size)), None)
    except FileNotFoundError:  # removed meanwhile
        return None


def _records(path: pathlib.Path) -> Iterator[tuple[pathlib.Path, str]]:
    """The records that may name a file, and its name in each."""
    folder = path.parent.resolve()
    yield folder / RECORD, path.name
    yield folder.parent / RECORD, f'{folder.name}/{path.name}'


def _fits(note: dict[str, Any], path: pathlib.Path, size: int) -> bool:
    if note.get('grows') and size == 0:
        return True
    noted = note.get('bytes')
    if not isinstance(noted, int) or size < noted or (size > noted and not note.get('grows')):
        return False
    return _crc32(path, noted) == note.get('crc32')


def _crc32(path: pathlib.Path, size: int) -> int:
    """Of the first bytes of a file."""
    checksum = 0
    with path.open('rb') as file:
        while size > 0 and (chunk := file.read(min(size, _CHUNK))):
            checksum, size = isal_zlib.crc32(chunk, checksum), size - len(chunk)
    return checksum


def _read(record: pathlib.Path) -> dict[str, list[dict[str, Any]]]:
    try:
        # Opened, for on a shared disk the size of an open file is not one remembered.
        with record.open('rb') as file:
            state = os.fstat(file.fileno())
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return {}
    return _parse(record, state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _parse(record: pathlib.Path, size: int, mtime_ns: int) -> dict[str, list[dict[str, Any]]]:
    del size, mtime_ns  # what tells one state of the record from the next
    notes: dict[str, list[dict[str, Any]]] = {}
    for note in atomic.read_json_lines(record):
        notes.setdefault(str(note.get('name')), []).append(note)
    return notes


def _describe(content: pathlib.Path) -> dict[str, int]:
    size = content.stat().st_size
    return {'bytes': size, 'crc32': _crc32(content, size)}


def _note(path: pathlib.Path, folder: pathlib.Path, **note: int | bool) -> None:
    name = path.absolute().relative_to(folder.absolute()).as_posix()
    atomic.append_json_line(folder / RECORD, {'name': name, **note})
