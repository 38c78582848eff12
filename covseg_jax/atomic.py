"""Files and folders that are either there and whole, or not there."""

import contextlib
import json
import os
import pathlib
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

# `new_file` below, or another that does more.
NewFile = Callable[[str | os.PathLike], AbstractContextManager[pathlib.Path]]


def _sync(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_sibling(path: pathlib.Path) -> pathlib.Path:
    """Where this process writes what `path` will be; `remove_leftovers` knows its name."""
    # The suffixes stay at the end: writers such as nibabel choose the format by them.
    return path.with_name(f'.tmp-{_host()}-{os.getpid()}-{path.name}')


def _host() -> str:
    return socket.gethostname().replace('-', '_')


def remove_leftovers(folder: str | os.PathLike) -> None:
    """Removes what killed processes of this host had begun to write, anywhere in a folder."""
    for path in list(pathlib.Path(folder).rglob('.tmp-*')):
        parts = path.name.split('-', 3)
        if len(parts) == 4 and parts[1] == _host() and parts[2].isdigit():
            if _is_running(int(parts[2])):
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


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
    """Yields an empty temporary sibling; it replaces the folder `path` once the block is done."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_sibling(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob('*'):
            _sync(file)
        _sync(temporary)
        # Aside first: deleting takes long enough to be killed in.
        before = temporary.with_name(f'{temporary.name}-before')
        if path.exists():
            path.rename(before)
        temporary.rename(path)
        _sync(path.parent)
        shutil.rmtree(before, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes UTF-8 text atomically."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding='utf-8')


def read_json_lines(path: str | os.PathLike) -> list[dict]:
    """The objects in a file of JSON lines that grows, without a line that is, or was left,
    half-written."""
    rows = []
    for line in pathlib.Path(path).read_text(encoding='utf-8', errors='replace').splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]
