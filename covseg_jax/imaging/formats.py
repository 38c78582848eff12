"""Which format a study's file has, and the reader for it.

Formats are told apart here alone: a NIfTI file by its name, a DICOM series by being a folder, and a
published array by the index of the study in it.
"""

import pathlib
from collections.abc import Sequence

import numpy as np

from covseg_jax.imaging import arrays, dicom, dicom_files, nifti
from covseg_jax.imaging.volume import Volume

NIFTI_SUFFIXES = ('.nii.gz', '.nii')


def is_nifti(path: pathlib.Path) -> bool:
    """Whether the file's name ends in .nii or .nii.gz."""
    return path.name.lower().endswith(NIFTI_SUFFIXES)


def strip_suffix(path: pathlib.Path) -> str:
    """The file's name without .nii or .nii.gz: 'a/study_0042.nii.gz' -> 'study_0042'."""
    endings = (len(suffix) for suffix in NIFTI_SUFFIXES if path.name.lower().endswith(suffix))
    return path.name[: len(path.name) - next(endings, 0)]


def read_volume(
    path: pathlib.Path,
    index: int | None = None,
    files: Sequence[pathlib.Path] | None = None,
) -> Volume:
    """Reads and verifies a file of any format.

    Args:
        path: a NIfTI file, the folder of a DICOM series, or a published array.
        index: the study's place in the array; None for the other formats.
        files: of a DICOM series that is one of several in its folder, its files; None of others.

    Raises:
        FileFault: it is missing, damaged or of an unusable kind.
    """
    if index is not None:
        return arrays.read_array(path, index)
    return dicom.read_series(path, files) if path.is_dir() else nifti.read_volume(path)


def source_crc32(
    path: pathlib.Path,
    index: int | None = None,
    files: Sequence[pathlib.Path] | None = None,
) -> int:
    """CRC-32 of what `read_volume` would read; it equals the volume's `crc32`.

    Raises:
        FileFault: it is missing or cannot be read.
    """
    if index is not None:
        return arrays.array_crc32(path, index)
    return dicom.series_crc32(path, files) if path.is_dir() else nifti.source_crc32(path)


def source_files(
    path: pathlib.Path, files: Sequence[pathlib.Path] | None = None
) -> list[pathlib.Path]:
    """The files that `read_volume` would read, in the order of their names."""
    if path.is_dir():
        return list(dicom_files.list_files(path) if files is None else files)
    return [path]


def stored_bytes(
    path: pathlib.Path,
    index: int | None = None,
    files: Sequence[pathlib.Path] | None = None,
) -> int:
    """About how many bytes `read_volume`'s voxels take as they are stored; 0 where that cannot be
    told. Nothing is decompressed: the end of a .gz file says how long its content is, below 4 GiB
    and where it was compressed in one part."""
    try:
        if index is not None:
            array = np.load(path, mmap_mode='r', allow_pickle=False)
            return array.nbytes // len(array)
        if path.is_dir():
            return sum(file.stat().st_size for file in files or path.iterdir())
        size = path.stat().st_size
        if not path.name.lower().endswith('.gz'):
            return size
        with path.open('rb') as file:
            file.seek(-4, 2)
            length = int.from_bytes(file.read(4), 'little')  # RFC 1952: of the last part alone
        return length if length > size else 4 * size
    except (OSError, ValueError):
        return 0  # the reader says what is wrong with it
