"""Files and folders that are either there and whole, or not there."""

import contextlib
import errno
import fcntl
import glob
import json
import os
import pathlib
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

# `new_file` below, or another that does more.
NewFile = Callable[[str | os.PathLike], AbstractContextManager[pathlib.Path]]

# Names of what lies beside a file or folder while it is replaced: .KIND-HOST-PROCESS-NAME. The
# suffixes stay at the end: writers such as nibabel choose the format by them.
_NEW, _OLD = 'tmp', 'old'
_HOST = socket.gethostname().replace('-', '_')


def temporary_sibling(path: pathlib.Path, kind: str = _NEW) -> pathlib.Path:
    """Where this process writes what `path` will be; `remove_leftovers` knows its name."""
    return path.with_name(f'.{kind}-{_HOST}-{os.getpid()}-{path.name}')


def _is_leftover(path: pathlib.Path) -> bool:
    """Whether a process of this host that has ended left it."""
    parts = path.name.split('-', 3)
    if len(parts) < 4 or parts[1] != _HOST or not parts[2].isdigit():
        return False
    try:
        os.kill(int(parts[2]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # it runs, and is another user's
        pass
    return False


def remove_leftovers(folder: str | os.PathLike) -> None:
    """Removes what killed processes of this host had begun to write, anywhere in a folder; a folder
    that one of them was about to put in another's place is put there."""
    for old in list(pathlib.Path(folder).rglob(f'.{_OLD}-*')):
        if _is_leftover(old):
            _end_replacement(old)
    for path in list(pathlib.Path(folder).rglob(f'.{_NEW}-*')):
        if _is_leftover(path):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def recover(path: str | os.PathLike) -> None:
    """Ends what a killed process of this host had begun, where it was about to put another folder
    in the place of `path`."""
    path = pathlib.Path(path)
    with contextlib.suppress(OSError):  # a disk that cannot be written, or no such place
        for old in list(path.parent.glob(f'.{_OLD}-*-{glob.escape(path.name)}')):
            # In a container a killed process had this one's number.
            is_own = old == temporary_sibling(path, _OLD)
            if is_own or (old.name.split('-', 3)[3:] == [path.name] and _is_leftover(old)):
                _end_replacement(old)


def _end_replacement(old: pathlib.Path) -> None:
    """Between `new_folder`'s renames the old folder is aside, and the new one whole."""
    _, host, process, name = old.name.split('-', 3)
    path, new = old.with_name(name), old.with_name(f'.{_NEW}-{host}-{process}-{name}')
    if not path.exists():
        (new if new.exists() else old).rename(path)
        _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def new_file(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields a temporary sibling to write; it becomes `path` once the block has ended well."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_sibling(path)
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields an empty temporary sibling; it replaces the folder `path` once the block is done.

    Killed at any moment, the old folder or the new one is there, or `remove_leftovers`, `recover`
    and the next `new_folder` put it there.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    recover(path)
    temporary, old = temporary_sibling(path), temporary_sibling(path, _OLD)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob('*'):
            _sync(file)
        _sync(temporary)
        # Aside first: deleting takes long enough to be killed in.
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        _sync(path.parent)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(temporary, ignore_errors=True)


def _sync(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes UTF-8 text atomically."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding='utf-8')


def append_json_line(path: pathlib.Path, value: Any, head: bytes = b'') -> None:
    """Appends one line to a file that other processes and hosts append to; a new file begins with
    `head`.

    Raises:
      OSError: the disk is full.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        # Several hosts append, and a shared disk appends for one at a time only under a lock.
        with contextlib.suppress(OSError):
            fcntl.lockf(descriptor, fcntl.LOCK_EX)
        is_new = os.fstat(descriptor).st_size == 0
        # One call writes the line whole. A kill may have left half a line before it.
        text = (head if is_new else b'') + f'\n{json.dumps(value)}\n'.encode()
        if os.write(descriptor, text) < len(text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if is_new:  # the folder has to keep its name too
        _sync(path.parent)


def read_json_lines(path: str | os.PathLike) -> list[dict]:
    """The objects in a file of JSON lines that grows, without lines that are half-written."""
    rows = []
    for line in pathlib.Path(path).read_text(encoding='utf-8', errors='replace').splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]
