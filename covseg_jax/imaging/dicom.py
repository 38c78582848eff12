"""One verified DICOM series in: a folder of slices becomes a volume.

Slices are ordered by where they lie, never by name or number, and a slice that is missing is found
by the gap that it leaves.
"""

import os
import pathlib

import numpy as np
import pydicom
from isal import isal_zlib

from covseg_jax import written
from covseg_jax.errors import FileFault
from covseg_jax.imaging.geometry import to_canonical
from covseg_jax.imaging.volume import Volume

_CONVERT = 'convert it with dcm2niix'
_EXPORT_AGAIN = 'export the series again'
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


def is_series(folder: str | os.PathLike) -> bool:
    """Whether a folder holds a DICOM file that is not hidden."""
    return any(_is_dicom(path) for path in _files(pathlib.Path(folder)))


def series_crc32(folder: str | os.PathLike) -> int:
    """CRC-32 of all of a series' files, in the order of their names.

    Raises:
        FileFault: a file cannot be read.
    """
    checksum = 0
    for path in _files(pathlib.Path(folder)):
        checksum = isal_zlib.crc32(_read(path), checksum)
    return checksum


def read_series(folder: str | os.PathLike) -> Volume:
    """Reads a folder that holds the slices of one CT series, in HU.

    Args:
        folder: other files in it, such as DICOMDIR or text, are passed over, but not those that
            have the suffix of the slices.

    Returns:
        The volume, (X, Y, Z): x along a slice's rows, y along its columns, z along the slices.
        int16 where rescaling keeps whole numbers, else float32.

    Raises:
        FileFault: no or several series, slices of different geometry, a slice that is damaged,
            missing or there twice, or pixels that cannot be read.
    """
    folder = pathlib.Path(folder)
    slices = _find_slices(folder)
    if len(slices) < 2:
        fault = f'holds {len(slices)} DICOM slices'
        raise FileFault(folder, fault, 'name the folder of a whole CT series')
    for path, data in slices:
        try:
            _check_slice(path, data)
            _check_same_grid(path, data, *slices[0])
        except (TypeError, ValueError, OverflowError, AttributeError) as error:
            # One value where two belong, two where one does, or text.
            fault = f'an element has no usable value ({_one_line(error)})'
            raise FileFault(path, fault, _EXPORT_AGAIN) from error
    series = {str(data.get('SeriesInstanceUID', '')) for _, data in slices}
    if len(series) > 1:
        raise FileFault(folder, f'holds {len(series)} series', 'give each a folder of its own')
    first = slices[0][1]
    across, down = np.reshape(np.asarray(first.ImageOrientationPatient, np.float64), (2, 3))
    normal = np.cross(across, down)
    positions = np.array([[float(v) for v in data.ImagePositionPatient] for _, data in slices])
    order = np.argsort(positions @ normal, kind='stable')
    slices, positions = [slices[i] for i in order], positions[order]
    _check_gaps(folder, positions @ normal, [path for path, _ in slices])
    _check_line(positions, [path for path, _ in slices])

    affine = np.eye(4)
    row_mm, column_mm = (float(value) for value in first.PixelSpacing)
    affine[:3, 0] = _TO_RAS @ across * column_mm
    affine[:3, 1] = _TO_RAS @ down * row_mm
    # From the outer slices, so that a gantry's tilt is kept.
    affine[:3, 2] = _TO_RAS @ (positions[-1] - positions[0]) / (len(positions) - 1)
    affine[:3, 3] = _TO_RAS @ positions[0]
    data = _read_pixels(slices)
    data.flags.writeable = False
    return Volume(to_canonical(data, affine), affine, series_crc32(folder))


def _find_slices(folder: pathlib.Path) -> list[tuple[pathlib.Path, pydicom.Dataset]]:
    """The files of a folder that are slices of an image, with their headers.

    A damaged slice at either end of the series leaves no gap. So a file is passed over only if it
    says that it is something else: by its suffix, or as DICOM by its class.
    """
    files = _files(folder)
    readable = [path for path in files if _is_dicom(path)]
    suffixes = {path.suffix.lower() for path in readable}
    slices = []
    for path in files:
        if path not in readable:
            if path.suffix.lower() in suffixes and path.name != 'DICOMDIR':
                fault = 'not a DICOM file, though it is named as the slices beside it'
                raise FileFault(path, fault, f'{_EXPORT_AGAIN}, or remove it')
            continue
        data = _read_header(path)
        if 'Rows' in data:
            slices.append((path, data))
        elif 'image' in _class_name(data).lower() or not _class_name(data):
            raise FileFault(path, 'a slice without Rows', _EXPORT_AGAIN)
    return slices


def _class_name(data: pydicom.Dataset) -> str:
    # Of the object that the file says it is: 'CT Image Storage', 'Basic Text SR Storage', ...; ''
    # where DICOM knows no such class, as in a header that damage has run together.
    uid = str(data.get('SOPClassUID', ''))
    name = pydicom.uid.UID(uid).name
    return '' if name == uid else name


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    try:
        files = [p for p in folder.iterdir() if p.is_file() and not p.name.startswith('.')]
    except OSError as error:
        fault = f'cannot be listed ({error.strerror})'
        raise FileFault(folder, fault, 'name the folder of a DICOM series') from error
    return sorted(path for path in files if not written.is_output(path))


def _read(path: pathlib.Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise FileFault(path, f'cannot be read ({error.strerror})', 'check the disk') from error


def _is_dicom(path: pathlib.Path) -> bool:
    try:
        with path.open('rb') as file:
            return path.name != 'DICOMDIR' and file.read(132)[128:] == b'DICM'
    except OSError:
        return False


def _read_header(path: pathlib.Path) -> pydicom.Dataset:
    try:
        data = pydicom.dcmread(path, stop_before_pixels=True)
        # pydicom decodes an element at its first use: here, so that the fault is told once.
        for element in data:
            _ = element.value
    except Exception as error:  # pydicom raises whatever its parser stumbles over
        fault = f'not a readable DICOM file ({_one_line(error)})'
        raise FileFault(path, fault, _EXPORT_AGAIN) from error
    return data


def _check_slice(path: pathlib.Path, data: pydicom.Dataset) -> None:
    if data.get('Modality', 'CT') != 'CT':
        raise FileFault(path, f'modality {data.Modality}, not CT', 'give a CT series')
    if int(data.get('NumberOfFrames', None) or 1) > 1:
        raise FileFault(path, 'many frames in one DICOM file', _CONVERT)
    missing = [name for name in _NEEDED if data.get(name) in (None, '')]
    if missing:
        raise FileFault(path, f'has no {" and no ".join(missing)}', _EXPORT_AGAIN)
    whole = [int(data[name].value) for name in ('Rows', 'Columns', 'BitsStored')]
    if min(whole) < 1 or int(data.PixelRepresentation) not in (0, 1):
        raise FileFault(path, f'Rows, Columns and BitsStored are {whole}', _EXPORT_AGAIN)
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
        raise FileFault(path, 'position, orientation or scaling is no number', _EXPORT_AGAIN)
    if min(float(value) for value in data.PixelSpacing) <= 0:
        raise FileFault(path, f'pixel spacing {list(data.PixelSpacing)} mm', _EXPORT_AGAIN)
    across, down = np.reshape(np.asarray(data.ImageOrientationPatient, np.float64), (2, 3))
    if not np.allclose([across @ across, down @ down, across @ down], [1, 1, 0], atol=1e-3):
        raise FileFault(path, 'its orientation is no rotation', _EXPORT_AGAIN)


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


def _check_gaps(folder: pathlib.Path, heights: np.ndarray, paths: list[pathlib.Path]) -> None:
    """Heights in mm along the slices' normal, ascending."""
    gaps = np.diff(heights)
    usual = float(np.median(gaps))
    if gaps.min() < 0.01:
        twice = int(gaps.argmin())
        fault = f'lies where {paths[twice].name} lies'
        raise FileFault(paths[twice + 1], fault, 'remove one of the two')
    wide = int(gaps.argmax())
    if gaps[wide] > 1.5 * usual:
        missing = max(1, round(gaps[wide] / usual) - 1)
        raise FileFault(
            folder,
            f'{missing} slices are missing between {paths[wide].name} and {paths[wide + 1].name} '
            f'(a gap of {gaps[wide]:.1f} mm, {usual:.1f} mm elsewhere)',
            _EXPORT_AGAIN,
        )
    if np.abs(gaps - usual).max() > _EVEN * usual:
        fault = f'slices are {gaps.min():.2f} to {gaps.max():.2f} mm apart, not evenly'
        raise FileFault(folder, fault, _CONVERT)


def _check_line(positions: np.ndarray, paths: list[pathlib.Path]) -> None:
    """Positions in mm, in order: the slices lie behind each other, in a line."""
    share = np.linspace(0, 1, len(positions))[:, None]
    aside_mm = np.linalg.norm(
        positions - (positions[0] + share * (positions[-1] - positions[0])), axis=1
    )
    if aside_mm.max() > _ASIDE_MM:
        path = paths[int(aside_mm.argmax())]
        fault = f'lies {aside_mm.max():.1f} mm beside the line of the slices'
        raise FileFault(path, fault, _EXPORT_AGAIN)


def _read_pixels(slices: list[tuple[pathlib.Path, pydicom.Dataset]]) -> np.ndarray:
    # One file at a time: never all the slices' bytes beside the volume.
    first = slices[0][1]
    shape = (int(first.Columns), int(first.Rows), len(slices))
    fits = all(_fits_int16(data) for _, data in slices)
    volume = None
    for index, (path, header) in enumerate(slices):
        try:
            pixels = pydicom.dcmread(path).pixel_array
        except Exception as error:  # of pydicom's decoders, each with its own
            fault = f'its pixels cannot be read ({_one_line(error)})'
            raise FileFault(path, fault, _CONVERT) from error
        if pixels.shape != (shape[1], shape[0]):
            raise FileFault(path, f'its pixels have the shape {pixels.shape}', _EXPORT_AGAIN)
        if volume is None:
            volume = np.empty(shape, np.int16 if fits else np.float32, order='F')
        slope, intercept = _rescaling(header)
        volume[:, :, index] = pixels.T * np.float32(slope) + np.float32(intercept)
    return volume


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


def _one_line(error: Exception) -> str:
    return ' '.join(str(error).split())[:200] or type(error).__name__
