"""What a data set's files hold, in one line that differs where a file differs, is new or is gone.

Files are read whole, and again only where their size or times changed: MosMedData has 33 GB.
"""

import hashlib
import json
import pathlib
from collections.abc import Iterator
from concurrent import futures

from tqdm import tqdm

from covseg_jax import atomic, cpu, written


def describe_data_set(folder: pathlib.Path, known: pathlib.Path) -> str:
    """The number of a data set's files, and a fingerprint of their names and contents.

    Args:
      folder: the data set; one that is not there has no files. Hidden files do not count, nor do
        predictions that this program wrote among them.
      known: a JSON file that keeps the checksums with each file's size and times; it is written
        where something is new.

    Raises:
      OSError: a file cannot be read.
    """
    try:
        before = json.loads(known.read_text(encoding='utf-8'))
    except (OSError, ValueError):  # none yet; a damaged one costs time alone
        before = {}
    found = {path.relative_to(folder).as_posix(): _identity(path) for path in _walk(folder)}
    changed = [name for name in found if before.get(name, [])[:-1] != found[name]]
    sums = {name: before[name][-1] for name in found.keys() - changed}
    with futures.ThreadPoolExecutor(cpu.count_cores()) as threads:
        jobs = threads.map(lambda name: sha256(folder / name), changed)
        bar = tqdm(jobs, 'checksums', len(changed), unit='file', disable=None, leave=False)
        sums |= dict(zip(changed, bar, strict=True))
    rows = {name: [*found[name], sums[name]] for name in sorted(found)}
    if rows != before:
        atomic.write_text(known, json.dumps(rows, indent=0))
    every = hashlib.sha256(json.dumps(sorted(sums.items())).encode())
    return f'{len(sums)} files of SHA-256 {every.hexdigest()[:16]}'


def _walk(folder: pathlib.Path, seen: frozenset = frozenset()) -> Iterator[pathlib.Path]:
    """Files in the folder and in folders that links in it lead to, as the studies are found."""
    if not folder.is_dir():
        return
    status = folder.stat()
    identity = status.st_dev, status.st_ino
    if identity in seen:  # a link to a folder around it
        return
    for path in sorted(folder.glob('[!.]*')):
        if path.is_dir():
            yield from _walk(path, seen | {identity})
        elif path.is_file() and not written.is_output(path):
            yield path


def _identity(path: pathlib.Path) -> list[int]:
    status = path.stat()
    # The second time is of a change that left the first as it was.
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def sha256(path: pathlib.Path) -> str:
    """The checksum of a file, in hexadecimal digits."""
    with path.open('rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def read_sums(path: pathlib.Path) -> dict[str, str]:
    """Name -> checksum in a file as `sha256sum` writes it; other lines are passed over."""
    text = path.read_text(encoding='utf-8', errors='replace')
    lines = [line.split('  ', 1) for line in text.splitlines()]
    return {name: each for each, name in (line for line in lines if len(line) == 2)}
