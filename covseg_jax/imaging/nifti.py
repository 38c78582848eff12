"""Reads and verifies a NIfTI file, and writes one.

nibabel loads a .nii.gz with a flipped bit, and allocates whatever a header claims, without a word.
Here the header is checked against what the file holds before any voxel array is allocated, and the
whole file is read, so that its gzip CRC is checked.
"""

import io
import os
import pathlib
import stat
import struct
import zlib

import nibabel
import nibabel.quaternions
import numpy as np
from isal import igzip, isal_zlib

from covseg_jax import atomic
from covseg_jax.errors import FileFault
from covseg_jax.imaging.absent import find_absence
from covseg_jax.imaging.geometry import (
    Shape,
    describe_tilt,
    from_canonical,
    right_angle_share,
    to_canonical,
)
from covseg_jax.imaging.volume import Volume

_HEADER_CLASSES = {348: nibabel.Nifti1Header, 540: nibabel.Nifti2Header}
_KEPT_TYPES = (np.uint8, np.int16)
_WRITTEN_TYPES = (np.uint8, np.int16, np.float32)
_HIGHEST_CODE = 5  # of NIfTI's names for a space: NIFTI_XFORM_TEMPLATE_OTHER
_DOWNLOAD_AGAIN = 'download it again'
_CONVERT = 'convert it to .nii.gz'
# Deflate codes at most 258 bytes in 2 bits: no content is longer than 1032 times its gzip file.
_MAXIMUM_RATIO = 1032
_CHUNK = 2**18  # bytes
_FORMS_APART_MM = 1.0  # sform and qform, before one of them is told to be wrong
_ROUNDED_EXCESS = 0.01  # by which a quaternion's square may exceed 1 for rounding


def source_crc32(path: str | os.PathLike) -> int:
    """CRC-32 of a file's content, from the gzip trailer where there is one.

    Reading the trailer costs nothing. It tells whether a file changed, not whether it is whole.

    Raises:
        FileFault: the file is missing or cannot be read.
    """
    path = pathlib.Path(path)
    if _is_named_gzip(path):
        trailer = _trailer(path)
        # bgzip ends its files with an empty member and others pad with zeros: no use as a checksum.
        if all(trailer):
            return trailer[0]
    with _open(path) as file:
        try:
            return isal_zlib.crc32(file.read())
        except OSError as error:
            raise _unreadable(path, error) from error


def read_volume(path: str | os.PathLike) -> Volume:
    """Reads a .nii or .nii.gz file (NIfTI-1 or -2, either byte order) and verifies all of it.

    A scl_slope of 0 (by the NIfTI-1 standard) or NaN (which MosMed writes) scales nothing.
    The affine is the sform where its code is positive, else the qform. A file with neither is
    refused, because left and right would be guesses. A fourth axis of length 1 is dropped. The
    volume's notes say what a rule decided, such as between an sform and another qform.

    Returns:
        uint8 and int16 voxels as they are where the header scales nothing, all others as float32.

    Raises:
        FileFault: the file is missing, damaged, cut short, not a 3D NIfTI volume, of a type or an
            orientation that cannot be used, or holds voxels that are not finite.
    """
    path = pathlib.Path(path)
    with _open(path) as file:
        try:
            stream = _content(path, file)
            header = _read_header(path, stream)
            shape = _checked_shape(path, header)
            dtype = _checked_type(path, header)
            offset = _checked_offset(path, header)
            scaling = _checked_scaling(path, header)
            affine, notes = _checked_affine(path, header, shape)
            raw = _read_voxels(path, stream, shape, dtype, offset)
        except EOFError as error:
            raise FileFault(path, 'the file is cut short', _DOWNLOAD_AGAIN) from error
        except (igzip.BadGzipFile, isal_zlib.error, zlib.error) as error:
            fault = f'gzip data is damaged ({error})'
            if 'crc' in str(error).lower():
                fault = 'gzip CRC does not match (file damaged on disk or in transfer)'
            raise FileFault(path, fault, _DOWNLOAD_AGAIN) from error
        except OSError as error:
            raise _unreadable(path, error) from error
    data = _scale(raw.view(dtype).reshape(shape, order='F'), scaling)
    del raw  # before anything else is allocated
    # A NaN is both the minimum and the maximum of its array: no array of booleans is needed.
    if data.dtype == np.float32 and not np.isfinite([data.min(), data.max()]).all():
        raise FileFault(path, 'holds voxels that are not finite (NaN or infinity)', 'replace them')
    data.flags.writeable = False
    # By now the stream has verified the trailer that source_crc32 reads.
    return Volume(to_canonical(data, affine), affine, source_crc32(path), notes)


def write_volume(
    path: str | os.PathLike,
    array: np.ndarray,
    affine: np.ndarray,
    new_file: atomic.NewFile = atomic.new_file,
) -> None:
    """Writes a NIfTI-1 file atomically; the same input gives the same bytes.

    sform and qform codes are 1, units mm, scl_slope and scl_inter NaN (nothing is scaled), as in
    MosMed's own files. Of axes that are not at right angles (gantry tilt), which a qform cannot
    say, its code is 0: a reader that prefers it would put the mask elsewhere. The gzip header
    carries no time.

    Args:
        path: .nii, or .nii.gz, which is compressed.
        array: (Z, Y, X) canonical, uint8, int16 or float32; bool is written as uint8.
        affine: (4, 4), voxel indices of the file to mm, axes to Right, Anterior, Superior; the
            array is turned to its axes.
        new_file: creates the file; `written.new_file` in a folder that a person named.

    Raises:
        ValueError: another type, or an array that is not 3D.
    """
    path = pathlib.Path(path)
    array = array.view(np.uint8) if array.dtype == bool else array
    if array.dtype.type not in _WRITTEN_TYPES or array.ndim != 3:
        raise ValueError(f'{path.name}: cannot write {array.ndim}D {array.dtype}')
    data = from_canonical(array, affine)
    header = nibabel.Nifti1Header(endianness='<')
    header.set_data_dtype(data.dtype.type)
    header.set_data_shape(data.shape)
    header.set_qform(affine, code=1)
    if _shift_mm(header.get_qform() - affine, data.shape) > _FORMS_APART_MM:
        header.set_qform(None, code=0)
    header.set_sform(affine, code=1)
    header.set_xyzt_units('mm')
    header['magic'], header['vox_offset'] = b'n+1', 352
    header['scl_slope'] = header['scl_inter'] = np.nan
    # Four zero bytes after the header: no extensions follow.
    content = header.binaryblock + bytes(4) + data.astype(data.dtype.newbyteorder('<')).tobytes('F')
    if _is_named_gzip(path):
        content = igzip.compress(content, compresslevel=2, mtime=0)
    with new_file(path) as temporary:
        temporary.write_bytes(content)


def _is_named_gzip(path: pathlib.Path) -> bool:
    return path.name.lower().endswith('.gz')


def _unreadable(path: pathlib.Path, error: OSError) -> FileFault:
    absence = find_absence(path)
    if absence is not None:
        return absence
    if isinstance(error, FileNotFoundError):
        return FileFault(path, f'no such file in {path.parent}', 'check the path')
    if isinstance(error, IsADirectoryError):
        return FileFault(path, 'is a folder, not a NIfTI file', 'name the file in it')
    return FileFault(path, f'cannot be read ({error.strerror or error})', 'check the disk')


def _open(path: pathlib.Path) -> io.BufferedReader:
    try:
        if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():
            # Opening a pipe would wait for a writer.
            raise FileFault(path, 'is a device or a pipe, not a NIfTI file', 'name a file')
        return path.open('rb')
    except OSError as error:
        raise _unreadable(path, error) from error


def _content(path: pathlib.Path, file: io.BufferedReader) -> io.BufferedIOBase:
    """The uncompressed bytes as a stream."""
    if not os.fstat(file.fileno()).st_size:
        raise FileFault(path, 'the file is empty', _DOWNLOAD_AGAIN)
    if file.peek(2)[:2] == b'\x1f\x8b':
        return igzip.IGzipFile(fileobj=file, mode='rb')
    absence = find_absence(path)
    if absence is not None:
        raise absence
    if _is_named_gzip(path):
        raise FileFault(path, 'not gzip data, whatever its name', 'rename or download it')
    return file


def _read_header(path: pathlib.Path, stream: io.BufferedIOBase) -> nibabel.Nifti1Header:
    start = stream.read(4)
    for order in '<>':
        length = struct.unpack(order + 'i', start)[0] if len(start) == 4 else 0
        if length in _HEADER_CLASSES:
            break
    else:
        raise FileFault(path, 'not a NIfTI file', _CONVERT)
    block = start + stream.read(length - 4)
    if len(block) < length:
        raise FileFault(path, 'the file is cut short, in its header', _DOWNLOAD_AGAIN)
    header = _HEADER_CLASSES[length](block, endianness=order, check=False)
    # Of the block: NumPy drops a string's last zeros.
    magic = block[344:348] if length == 348 else block[4:12]
    if magic in (b'ni1\0', b'ni2\0\r\n\x1a\n'):
        raise FileFault(path, 'header without voxels (.hdr/.img)', _CONVERT)
    if magic not in (b'n+1\0', b'n+2\0\r\n\x1a\n'):
        raise FileFault(path, 'not a NIfTI file', _CONVERT)
    return header


def _checked_shape(path: pathlib.Path, header: nibabel.Nifti1Header) -> Shape:
    num_axes = int(header['dim'][0])
    if not 1 <= num_axes <= 7:
        raise FileFault(path, f'header names {num_axes} axes', _DOWNLOAD_AGAIN)
    shape = tuple(int(length) for length in header['dim'][1 : num_axes + 1])
    if min(shape) < 1:
        raise FileFault(path, f'header gives the shape {shape}', _DOWNLOAD_AGAIN)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3 or min(shape) < 2:
        num_axes = len(shape) if len(shape) != 3 else sum(length > 1 for length in shape)
        raise FileFault(path, f'{num_axes}D image ({_times(shape)})', 'give one 3D volume a file')
    return shape


def _checked_type(path: pathlib.Path, header: nibabel.Nifti1Header) -> np.dtype:
    try:
        dtype = header.get_data_dtype()
    except (KeyError, nibabel.spatialimages.HeaderDataError) as error:
        fault = f'unknown voxel type {int(header["datatype"])}'
        raise FileFault(path, fault, _DOWNLOAD_AGAIN) from error
    if dtype.kind not in 'iuf' or dtype.itemsize > 8:
        raise FileFault(path, f'voxels of type {dtype} are not CT', 'save int16 or float32')
    if int(header['bitpix']) not in (0, 8 * dtype.itemsize):
        fault = f'header gives {int(header["bitpix"])} bits for {dtype}'
        raise FileFault(path, fault, _DOWNLOAD_AGAIN)
    return dtype


def _checked_offset(path: pathlib.Path, header: nibabel.Nifti1Header) -> int:
    offset = float(header['vox_offset'])
    first = int(header['sizeof_hdr']) + 4
    if offset == 0:  # some writers leave 0 and mean the first byte after the header
        return first
    if not np.isfinite(offset) or not first <= offset < 2**31 or offset != int(offset):
        raise FileFault(path, f'voxels start at byte {offset:g}?', _DOWNLOAD_AGAIN)
    return int(offset)


def _read_voxels(
    path: pathlib.Path,
    stream: io.BufferedIOBase,
    shape: Shape,
    dtype: np.dtype,
    offset: int,
) -> np.ndarray:
    """The voxels' bytes, and the stream read to its end, which is what verifies it."""
    num_bytes = dtype.itemsize
    for length in shape:  # Python integers: no overflow
        num_bytes *= length
    held = _content_length(path, stream, offset + num_bytes)
    if held != offset + num_bytes:
        promise = f'{_times(shape)} voxels of {dtype.itemsize} bytes ({num_bytes} bytes)'
        fault = f'header promises {promise}, the file holds {max(0, held - offset)}'
        raise FileFault(path, fault, _DOWNLOAD_AGAIN)
    stream.seek(offset)
    raw = np.empty(num_bytes, np.uint8)
    view, filled = memoryview(raw), 0
    while filled < num_bytes:
        step = stream.readinto(view[filled : filled + _CHUNK])
        if not step:
            raise EOFError
        filled += step
    if stream.read(1):
        raise igzip.BadGzipFile('more data than its trailer says')
    return raw


def _content_length(path: pathlib.Path, stream: io.BufferedIOBase, promised: int) -> int:
    """How many bytes there are, without allocating what a header only promises."""
    file = stream if isinstance(stream, io.BufferedReader) else stream.fileobj
    length = os.fstat(file.fileno()).st_size
    if file is stream:
        return length
    if promised <= _MAXIMUM_RATIO * length and _trailer(path)[1] == promised % 2**32:
        return promised
    # The header lies, or the file has several gzip members, whose trailers tell of one each.
    counted = stream.tell()
    while step := len(stream.read(_CHUNK)):
        counted += step
    return counted


def _trailer(path: pathlib.Path) -> tuple[int, int]:
    """CRC-32 and length of a gzip file's (last) content."""
    with _open(path) as file:
        try:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 8))
            trailer = file.read(8)
        except OSError as error:
            raise _unreadable(path, error) from error
    return struct.unpack('<II', trailer) if len(trailer) == 8 else (0, 0)  # RFC 1952


def _checked_affine(
    path: pathlib.Path, header: nibabel.Nifti1Header, shape: Shape
) -> tuple[np.ndarray, tuple[str, ...]]:
    """The affine, and notes of what a rule decided."""
    pixdim = np.asarray(header['pixdim'][1:4], np.float64)
    if not (np.isfinite(pixdim).all() and (pixdim > 0).all()):
        fault = f'voxel size {pixdim.tolist()} mm is not positive'
        raise FileFault(path, fault, 'correct pixdim')
    affine, notes = _chosen_affine(path, header, shape)
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if not right_angle_share(affine) > 0.5:
        raise FileFault(path, 'affine cannot be inverted', 'correct the sform or qform')
    notes += describe_tilt(affine)
    if not np.allclose(lengths, pixdim, rtol=0.01):
        found, said = (' × '.join(f'{value:.4g}' for value in row) for row in (lengths, pixdim))
        notes.append(f'pixdim says {said} mm a voxel, the affine {found} mm; the affine is used')
    return affine, tuple(notes)


def _chosen_affine(
    path: pathlib.Path, header: nibabel.Nifti1Header, shape: Shape
) -> tuple[np.ndarray, list[str]]:
    codes = int(header['sform_code']), int(header['qform_code'])
    if not all(0 <= code <= _HIGHEST_CODE for code in codes):
        raise FileFault(path, f'sform and qform codes {codes} do not exist', _DOWNLOAD_AGAIN)
    if codes == (0, 0):
        fault = 'no orientation (sform and qform codes are 0)'
        raise FileFault(path, fault, 'convert it from DICOM again, with orientation')
    has_sform, has_qform = (code > 0 for code in codes)
    sform = np.asarray(header.get_sform(), np.float64)
    if not has_qform:
        return sform, []
    try:
        qform, qform_notes = _read_qform(header)
    except (ValueError, nibabel.spatialimages.HeaderDataError) as error:
        if not has_sform:
            raise FileFault(path, 'qform is no rotation', 'correct it') from error
        return sform, ['its qform is no rotation; the sform is used']
    if not has_sform:
        return qform, qform_notes
    if not sform[:3, :3].any():
        return qform, [*qform_notes, 'its sform is all zeros; the qform is used']
    shift_mm = _shift_mm(sform - qform, shape)
    # Not "more than": a qform of NaN differs too.
    if not shift_mm <= _FORMS_APART_MM:
        return sform, [f'sform and qform are up to {shift_mm:.1f} mm apart; the sform is used']
    return sform, []


def _shift_mm(difference: np.ndarray, shape: Shape) -> float:
    """How far a voxel, a corner, moves at most between affines with this (4, 4) difference."""
    corners = np.array(np.meshgrid(*((0, length - 1) for length in shape))).reshape(3, -1)
    shifts = difference[:3, :3] @ corners + difference[:3, 3:]
    return float(np.linalg.norm(shifts, axis=0).max())


def _read_qform(header: nibabel.Nifti1Header) -> tuple[np.ndarray, list[str]]:
    """The qform as ITK and the NIfTI library read it, and notes of what they settle by rule.

    Raises:
        ValueError, HeaderDataError: it is no rotation.
    """
    notes = []
    qfac = float(header['pixdim'][0])
    if qfac not in (1, -1):
        header['pixdim'][0] = -1 if qfac < 0 else 1
        if qfac != 0:  # the NIfTI-1 standard: 0 is 1
            taken = int(header['pixdim'][0])
            notes.append(f'its qfac (pixdim[0]) is {qfac:g}, not 1 or -1; {taken} is used')
    names = ('quatern_b', 'quatern_c', 'quatern_d')
    quaternion = [float(header[name]) for name in names]
    excess = float(np.square(quaternion).sum()) - 1
    if not float(header.quaternion_threshold) < excess <= _ROUNDED_EXCESS:
        return np.asarray(header.get_qform(), np.float64), notes
    # Half a turn, whose first part is 0, but for rounding; quat2mat divides by the length.
    qform = np.eye(4)
    spacing = np.asarray(header['pixdim'][1:4], np.float64) * (1, 1, header['pixdim'][0])
    qform[:3, :3] = nibabel.quaternions.quat2mat([0.0, *quaternion]) * spacing
    qform[:3, 3] = [float(header[f'qoffset_{axis}']) for axis in 'xyz']
    notes.append(f'its quaternion has the length {(1 + excess) ** 0.5:.7g}, which is taken for 1')
    return qform, notes


def _checked_scaling(
    path: pathlib.Path, header: nibabel.Nifti1Header
) -> tuple[float, float] | None:
    """Slope and intercept, or None where the header scales nothing."""
    slope, inter = float(header['scl_slope']), float(header['scl_inter'])
    scales = slope != 0 and not np.isnan(slope)
    if np.isinf(slope) or (scales and np.isinf(inter)):
        fault = f'voxels are scaled by {slope:g} and {inter:g}'
        raise FileFault(path, fault, 'correct scl_slope and scl_inter')
    inter = 0.0 if np.isnan(inter) else inter
    return (slope, inter) if scales and (slope, inter) != (1.0, 0.0) else None


def _scale(data: np.ndarray, scaling: tuple[float, float] | None) -> np.ndarray:
    if scaling is None and data.dtype.type in _KEPT_TYPES:
        return data.astype(data.dtype.newbyteorder('='), copy=False)
    with np.errstate(over='ignore'):  # what leaves float32 becomes infinite, and is refused as such
        scaled = data.astype(np.float32, copy=scaling is not None)
        if scaling is not None:
            scaled *= scaling[0]
            scaled += scaling[1]
    return scaled


def _times(shape: tuple[int, ...]) -> str:
    return ' × '.join(str(length) for length in shape)
