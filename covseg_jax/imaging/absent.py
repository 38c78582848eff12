"""Files whose content is elsewhere: links that lead nowhere, and what Git LFS and git-annex leave
in the place of a file that was not fetched."""

import os
import pathlib

from covseg_jax.errors import FileFault

_POINTERS = {b'version https://git-lfs': 'Git LFS', b'/annex/objects/': 'git-annex'}
_LONGEST_POINTER = 1024  # bytes; Git LFS's own limit
_FETCH = (
    'fetch the content (git annex get, datalad get, git lfs pull, dvc pull), mount the archive '
    'that it lies in, or remove it'
)


def is_dangling(path: pathlib.Path) -> bool:
    """Whether the path is a link to something that is not there."""
    return path.is_symlink() and not path.exists()


def find_absence(path: pathlib.Path) -> FileFault | None:
    """The fault of a link that leads nowhere, or of a pointer in place of a file; None of any other
    path."""
    try:
        if is_dangling(path):
            return FileFault(path, f'a link to {os.readlink(path)}, which is not there', _FETCH)
        if not path.is_file() or path.stat().st_size > _LONGEST_POINTER:
            return None
        head = path.read_bytes()
    except OSError:  # whoever reads it says so
        return None
    for start, archive in _POINTERS.items():
        if head.startswith(start):
            return FileFault(path, f'a pointer of {archive}, not the file itself', _FETCH)
    return None
