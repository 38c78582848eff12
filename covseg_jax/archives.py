"""ZIP archives that others made, such as workbooks and weights, before they are unpacked."""

import os
import zipfile

from covseg_jax.errors import FileFault

_ANY_SIZE = 64 * 2**20  # bytes that every machine has
_RATIO = 20  # unpacked to packed; weights have 1.1, XML at most about this


def check_unpacked_size(path: str | os.PathLike, most_bytes: int) -> None:
    """Refuses an archive that would fill the memory: one of 1 MB can hold 1 GB of zeros.

    Its contents may have `most_bytes` together, unpacked, and where they are over 64 MiB at most 20
    times the archive's size. The sizes are those that its directory names: Python's zipfile unpacks
    no more than these.

    Raises:
      FileFault: its contents are larger.
      zipfile.BadZipFile: it is not an archive.
    """
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    packed = os.path.getsize(path)
    if unpacked > min(most_bytes, max(_ANY_SIZE, _RATIO * packed)):
        raise FileFault(
            path,
            f'{packed:,} bytes that unpack to {unpacked:,}, which no such file has',
            'get it again, from where it was made',
        )
