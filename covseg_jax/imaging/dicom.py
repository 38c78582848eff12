"""One verified DICOM series in: a folder of slices becomes a volume.

Slices are ordered by where they lie, never by name or number, and a slice that is missing is found
by the gap that it leaves.
"""

import itertools
import os
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
import pydicom
from isal import isal_zlib
from pydicom import encaps, uid

from covseg_jax.errors import FileFault
from covseg_jax.imaging import codecs
from covseg_jax.imaging.absent import find_absence
from covseg_jax.imaging.dicom_files import (
    CONVERT,
    EXPORT_AGAIN,
    Slice,
    find_slices,
    list_counts,
    list_files,
    num_frames,
    one_line,
    quiet_pydicom,
)
from covseg_jax.imaging.geometry import describe_tilt, to_canonical
from covseg_jax.imaging.volume import Volume

_NEEDED = (
    'Rows',
    'Columns',
    'PixelSpacing',
    'ImageOrientationPatient',
    'ImagePositionPatient',
    'RescaleIntercept',
    'BitsStored',
    'PixelRepresentation',
)
# DICOM's axes run to Left, Posterior, Superior; affines here to Right, Anterior, Superior.
_TO_RAS = np.diag([-1.0, -1.0, 1.0])
_ASIDE_MM = 1.0  # that a slice may lie beside the line of the others
_EVEN = 0.05  # share of the usual gap that gaps between slices may differ by
_SAME_PLACE_MM = 0.01
# Positions rounded in the header lie this far from an even row: less than any slice that is missing
# would move them.
_ROUNDED_SHARE, _ROUNDED_MM = 0.2, 0.5
_ROUNDED_TO_MM = (1.0, 0.5, 0.1)


def series_crc32(folder: str | os.PathLike, files: Sequence[pathlib.Path] | None = None) -> int:
    """CRC-32 of all of a series' files, in the order of their names.

    Raises:
        FileFault: a file cannot be read.
    """
    checksum = 0
    for path in list_files(pathlib.Path(folder)) if files is None else files:
        checksum = isal_zlib.crc32(_read(path), checksum)
    return checksum


@quiet_pydicom()
def read_series(folder: str | os.PathLike, files: Sequence[pathlib.Path] | None = None) -> Volume:
    """Reads a folder that holds the slices of one CT series, in HU.

    Args:
        folder: other files in it, such as DICOMDIR or text, are passed over, but not those that
            have the suffix of the slices. Other DICOM objects and scouts are passed over and
            noted.
        files: those of its files that make the series; None for all.

    Returns:
        The volume, (X, Y, Z): x along a slice's rows, y along its columns, z along the slices.
        int16 where rescaling keeps whole numbers, else float32.

    Raises:
        FileFault: no or several series, slices of different geometry, a slice that is damaged,
            missing or there twice with other pixels, or pixels that cannot be read.
    """
    slices, notes = order_slices(folder, files)
    affine = _make_affine(slices[0].header, _positions(slices))
    notes += describe_tilt(affine)
    data = _read_pixels(slices)
    data.flags.writeable = False
    return Volume(to_canonical(data, affine), affine, series_crc32(folder, files), tuple(notes))


@quiet_pydicom()
def order_slices(
    folder: str | os.PathLike, files: Sequence[pathlib.Path] | None = None
) -> tuple[list[Slice], list[str]]:
    """The slices that `read_series` reads, with their headers: slice k is the volume's plane
    [:, :, k], whose voxel (x, y) is the pixel in row y and column x. And notes of what was decided.

    Raises:
        FileFault: as `read_series` does, but for pixels, which are read only of slices that lie at
            the same place.
    """
    folder = pathlib.Path(folder)
    slices, others = find_slices(folder, list_files(folder) if files is None else files)
    notes = [f'passed over beside the slices: {list_counts(others)}'] if others else []
    if files is not None:
        begins = min((each.path.name for each in slices), default='none')
        notes.append(f'one of several series or phases in its folder; its first file is {begins}')
    if len(slices) < 2:
        fault = f'holds {len(slices)} DICOM slices'
        raise FileFault(folder, fault, 'name the folder of a whole CT series')
    _check_slices(slices)
    series = {str(each.header.get('SeriesInstanceUID', '')) for each in slices}
    if len(series) > 1:
        raise FileFault(folder, f'holds {len(series)} series', 'give each a folder of its own')
    normal, positions = np.cross(*_axes(slices[0].header)), _positions(slices)
    order = np.argsort(positions @ normal, kind='stable')
    kept = _without_copies([slices[i] for i in order], positions[order])
    if len(kept) < len(slices):
        number = len(slices) - len(kept)
        notes.append(f'{number} slices are there twice, with the same pixels; one of each is read')
    slices, positions = [slices[i] for i in order[kept]], positions[order[kept]]
    if len(slices) < 2:
        raise FileFault(folder, 'holds one slice alone', 'name the folder of a whole CT series')
    notes += _check_gaps(folder, positions @ normal, slices)
    _check_line(positions, slices)
    return slices, notes


def _positions(slices: Sequence[Slice]) -> np.ndarray:
    """(slices, 3), in mm: where the first pixel of each lies."""
    return np.array([[float(v) for v in each.header.ImagePositionPatient] for each in slices])


def _axes(header: pydicom.Dataset) -> np.ndarray:
    """(2, 3): the directions along a slice's rows and along its columns."""
    return np.reshape(np.asarray(header.ImageOrientationPatient, np.float64), (2, 3))


def _make_affine(header: pydicom.Dataset, positions: np.ndarray) -> np.ndarray:
    """(4, 4), of a slice's header and the slices' positions in mm, in order."""
    across, down = _axes(header)
    row_mm, column_mm = (float(value) for value in header.PixelSpacing)
    affine = np.eye(4)
    affine[:3, 0] = _TO_RAS @ across * column_mm
    affine[:3, 1] = _TO_RAS @ down * row_mm
    # From the outer slices, so that a gantry's tilt is kept.
    affine[:3, 2] = _TO_RAS @ (positions[-1] - positions[0]) / (len(positions) - 1)
    affine[:3, 3] = _TO_RAS @ positions[0]
    return affine


def _read(path: pathlib.Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        absence = find_absence(path)
        if absence is not None:
            raise absence from error
        raise FileFault(path, f'cannot be read ({error.strerror})', 'check the disk') from error


def _check_slices(slices: Sequence[Slice]) -> None:
    for each in slices:
        try:
            _check_slice(each.path, each.header)
            _check_same_grid(each.path, each.header, slices[0].path, slices[0].header)
        except (TypeError, ValueError, OverflowError, AttributeError) as error:
            # One value where two belong, two where one does, or text.
            fault = f'an element has no usable value ({one_line(error)})'
            raise FileFault(each.path, fault, EXPORT_AGAIN) from error


def _check_slice(path: pathlib.Path, data: pydicom.Dataset) -> None:
    if data.get('Modality', 'CT') != 'CT':
        raise FileFault(path, f'modality {data.Modality}, not CT', 'give a CT series')
    missing = [name for name in _NEEDED if data.get(name) in (None, '')]
    if missing:
        raise FileFault(path, f'has no {" and no ".join(missing)}', EXPORT_AGAIN)
    whole = [int(data[name].value) for name in ('Rows', 'Columns', 'BitsStored')]
    if min(whole) < 1 or int(data.PixelRepresentation) not in (0, 1):
        raise FileFault(path, f'Rows, Columns and BitsStored are {whole}', EXPORT_AGAIN)
    if int(data.get('SamplesPerPixel', 1)) != 1:
        raise FileFault(path, 'a colour image, not CT', 'give the original CT series')
    numbers = [
        *data.PixelSpacing,
        *data.ImageOrientationPatient,
        *data.ImagePositionPatient,
        data.RescaleIntercept,
        data.get('RescaleSlope', 1),
    ]
    if len(numbers) != 13 or not np.isfinite(np.asarray(numbers, np.float64)).all():
        raise FileFault(path, 'position, orientation or scaling is no number', EXPORT_AGAIN)
    if min(float(value) for value in data.PixelSpacing) <= 0:
        raise FileFault(path, f'pixel spacing {list(data.PixelSpacing)} mm', EXPORT_AGAIN)
    across, down = _axes(data)
    if not np.allclose([across @ across, down @ down, across @ down], [1, 1, 0], atol=1e-3):
        raise FileFault(path, 'its orientation is no rotation', EXPORT_AGAIN)


def _check_same_grid(path, data, first_path, first) -> None:
    for name, tolerance in (
        ('Rows', 0),
        ('Columns', 0),
        ('PixelSpacing', 1e-4),
        ('ImageOrientationPatient', 1e-3),
    ):
        here, there = (np.asarray(d.get(name), np.float64) for d in (data, first))
        if not np.allclose(here, there, rtol=0, atol=tolerance):
            raise FileFault(
                path, f'{name} is not that of {first_path.name}', 'give each series a folder'
            )


def _without_copies(slices: Sequence[Slice], positions: np.ndarray) -> list[int]:
    """The places of the slices to keep: without those that lie where the one before lies, with the
    same pixels. Slices and positions in mm are in order."""
    kept = [0]
    for index in range(1, len(slices)):
        before, here = slices[kept[-1]], slices[index]
        if np.linalg.norm(positions[index] - positions[kept[-1]]) < _SAME_PLACE_MM:
            is_copy = _rescaling(before.header) == _rescaling(here.header) and np.array_equal(
                _read_frame(before), _read_frame(here)
            )
            if not is_copy:
                fault = f'lies where {before.name} lies, with other pixels (two phases or two '
                remedy = 'remove one of the two, or give each series a folder of its own'
                if before.path == here.path:
                    fault, remedy = f'frame {here.frame + 1} {fault}', CONVERT
                raise FileFault(here.path, f'{fault}reconstructions?)', remedy)
            continue
        kept.append(index)
    return kept


def _check_gaps(folder: pathlib.Path, heights: np.ndarray, slices: Sequence[Slice]) -> list[str]:
    """Heights in mm along the slices' normal, ascending. Returns the notes."""
    gaps = np.diff(heights)
    usual = float(np.median(gaps))
    if gaps.min() < _SAME_PLACE_MM:
        twice = int(gaps.argmin())
        fault = f'lies where {slices[twice].name} lies'
        raise FileFault(slices[twice + 1].path, fault, 'remove one of the two')
    if np.abs(gaps - usual).max() <= _EVEN * usual:
        return []
    even_mm = float(heights[-1] - heights[0]) / len(gaps)
    off_mm = np.abs(heights - np.linspace(heights[0], heights[-1], len(heights))).max()
    apart = f'slices are {gaps.min():.4g} to {gaps.max():.4g} mm apart'
    if off_mm <= min(_ROUNDED_SHARE * even_mm, _ROUNDED_MM) or _are_rounded(heights, off_mm):
        return [
            f'{apart}, as positions that were rounded in the header are: at most {off_mm:.2g} mm '
            f'off an even {even_mm:.5g} mm, which is used'
        ]
    wide = int(gaps.argmax())
    if gaps[wide] > 1.5 * usual:
        missing = max(1, round(gaps[wide] / usual) - 1)
        raise FileFault(
            folder,
            f'{missing} slices are missing between {slices[wide].name} and {slices[wide + 1].name} '
            f'(a gap of {gaps[wide]:.1f} mm, {usual:.1f} mm elsewhere)',
            EXPORT_AGAIN,
        )
    raise FileFault(folder, f'{apart}, not evenly', f'{EXPORT_AGAIN}, with slices evenly spaced')


def _are_rounded(heights: np.ndarray, off_mm: float) -> bool:
    """Whether heights in mm are an even row, rounded to whole units: gaps then differ by one unit,
    and a missing slice's would be twice the others', which are two units or more."""
    gaps = np.diff(heights)
    for unit in _ROUNDED_TO_MM:
        if np.abs(heights - np.rint(heights / unit) * unit).max() < 1e-3:
            is_by_one = np.ptp(gaps) < unit + 1e-3 and gaps.min() > 2 * unit - 1e-3
            return bool(is_by_one and off_mm < unit)
    return False


def _check_line(positions: np.ndarray, slices: Sequence[Slice]) -> None:
    """Positions in mm, in order: the slices lie behind each other, in a line."""
    share = np.linspace(0, 1, len(positions))[:, None]
    aside_mm = np.linalg.norm(
        positions - (positions[0] + share * (positions[-1] - positions[0])), axis=1
    )
    if aside_mm.max() > _ASIDE_MM:
        path = slices[int(aside_mm.argmax())].path
        fault = f'lies {aside_mm.max():.1f} mm beside the line of the slices'
        raise FileFault(path, fault, EXPORT_AGAIN)


def _read_pixels(slices: Sequence[Slice]) -> np.ndarray:
    # One file at a time: never all the slices' bytes beside the volume.
    first = slices[0].header
    shape = (int(first.Columns), int(first.Rows), len(slices))
    fits = all(_fits_int16(each.header) for each in slices)
    volume = np.empty(shape, np.int16 if fits else np.float32, order='F')
    of_file: dict[pathlib.Path, dict[int, int]] = {}
    for index, each in enumerate(slices):
        of_file.setdefault(each.path, {})[each.frame] = index
    for path, indices in of_file.items():
        for frame, pixels in enumerate(_read_frames(path)):
            if frame in indices:
                index = indices[frame]
                if pixels.shape != (shape[1], shape[0]):
                    fault = f'its pixels have the shape {pixels.shape}'
                    raise FileFault(path, fault, EXPORT_AGAIN)
                slope, intercept = _rescaling(slices[index].header)
                volume[:, :, index] = pixels.T * np.float32(slope) + np.float32(intercept)
        if max(indices) > frame:
            raise FileFault(path, f'holds {frame + 1} frames, fewer than it says', EXPORT_AGAIN)
    return volume


def _read_frame(one: Slice) -> np.ndarray:
    return next(itertools.islice(_read_frames(one.path), one.frame, None), np.empty(0))


def _read_frames(path: pathlib.Path) -> Iterator[np.ndarray]:
    """The stored numbers of a file's frames, (rows, columns) each; at least one.

    Raises:
        FileFault: they cannot be read.
    """
    try:
        yield from _decode_frames(pydicom.dcmread(path, force=True))
    except Exception as error:  # of pydicom and the decoders, each with its own
        fault = f'its pixels cannot be read ({one_line(error)})'
        raise FileFault(path, fault, f'{CONVERT}, or {EXPORT_AGAIN}') from error


def _decode_frames(data: pydicom.Dataset) -> Iterator[np.ndarray]:
    syntax = data.file_meta.get('TransferSyntaxUID', None)
    if syntax is None:  # a file without preamble: what pydicom found it to be
        is_implicit, is_little = data.original_encoding
        syntax = uid.ExplicitVRLittleEndian if is_little else uid.ExplicitVRBigEndian
        syntax = uid.ImplicitVRLittleEndian if is_implicit else syntax
        data.file_meta.TransferSyntaxUID = syntax
    number = num_frames(data)
    if syntax not in codecs.DECODERS:
        yield from [data.pixel_array] if number == 1 else pydicom.pixels.iter_pixels(data)
        return
    shape = int(data.Rows), int(data.Columns)
    bits, is_signed = int(data.BitsStored), bool(data.PixelRepresentation)
    offsets = None
    if 'ExtendedOffsetTable' in data:
        offsets = data.ExtendedOffsetTable, data.ExtendedOffsetTableLengths
    for code in encaps.generate_frames(
        data.PixelData, number_of_frames=number, extended_offsets=offsets
    ):
        yield codecs.decode_frame(bytes(code), syntax, shape, bits, is_signed)


def _rescaling(header: pydicom.Dataset) -> tuple[float, float]:
    return float(header.get('RescaleSlope', 1)), float(header.RescaleIntercept)


def _fits_int16(header: pydicom.Dataset) -> bool:
    slope, intercept = _rescaling(header)
    bits, signed = int(header.BitsStored), int(header.PixelRepresentation)
    stored = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    limits = np.iinfo(np.int16)
    return (
        slope.is_integer()
        and intercept.is_integer()
        and all(limits.min <= slope * value + intercept <= limits.max for value in stored)
    )
