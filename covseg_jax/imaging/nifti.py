"""One verified NIfTI volume in, one volume out.

nibabel loads a .nii.gz with a flipped bit, and allocates whatever a header claims, without a word.
Here the whole file is read and its gzip CRC checked, and the header is held against the length
that is really there before any voxel array exists.
"""

import os
import pathlib
import struct
import zlib
from dataclasses import dataclass

import nibabel
import numpy as np
from isal import igzip, isal_zlib

from covseg_jax import atomic
from covseg_jax.errors import InputError

SUFFIXES = ('.nii', '.nii.gz')
_HEADER_CLASSES = {348: nibabel.Nifti1Header, 540: nibabel.Nifti2Header}
_KEPT_TYPES = (np.uint8, np.int16)
_WRITTEN_TYPES = (np.uint8, np.int16, np.float32)


@dataclass(frozen=True)
class Volume:
    """A 3D volume as its file holds it.

    Attributes:
        data: (X, Y, Z) in the file's own axis order, read-only; uint8 and int16 stay as they are
            where the header scales nothing, everything else is float32.
        affine: (4, 4) float64, voxel indices to mm, axes to Right, Anterior, Superior.
        crc32: CRC-32 of the file's content, as `source_crc32` gives it.
    """

    data: np.ndarray
    affine: np.ndarray
    crc32: int

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between voxel centres along the file's axes (x, y, z), mm."""
        return tuple(float(length) for length in np.linalg.norm(self.affine[:3, :3], axis=0))

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel, ml (1000 mm³)."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000.0


def is_nifti(path: str | os.PathLike) -> bool:
    """Whether the file name ends in .nii or .nii.gz."""
    return pathlib.Path(path).name.lower().endswith(SUFFIXES)


def strip_suffix(path: str | os.PathLike) -> str:
    """The file's name without .nii or .nii.gz: 'a/study_0042.nii.gz' -> 'study_0042'."""
    name = pathlib.Path(path).name
    for suffix in ('.nii.gz', '.nii'):
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def source_crc32(path: str | os.PathLike) -> int:
    """CRC-32 of a volume's file: of the content, from the gzip trailer, or computed for .nii.

    Reading the trailer costs nothing; it tells whether a file changed, not whether it is whole.

    Raises:
        InputError: the file is missing or cannot be read.
    """
    path = pathlib.Path(path)
    if path.name.lower().endswith('.gz'):
        return _trailer_crc32(_read_bytes(path, last=8))
    return isal_zlib.crc32(_read_bytes(path))


def read_volume(path: str | os.PathLike) -> Volume:
    """Reads a .nii or .nii.gz file (NIfTI-1 or -2, either byte order) and verifies all of it.

    scl_slope 0 or NaN means that nothing is scaled, as the NIfTI-1 standard says of 0 and MosMed
    writes NaN. The affine is the sform where its code is positive, else the qform; a file with
    neither is refused, because its left and right, front and back would be guesses. A fourth
    axis of length 1 is dropped.

    Args:
        path: the file.

    Returns:
        The volume, (X, Y, Z).

    Raises:
        InputError: the file is missing, damaged, cut short, not a 3D NIfTI volume, of a type or
            an orientation that cannot be used, or holds voxels that are not finite.
    """
    path = pathlib.Path(path)
    content = _read_content(path)
    header = _parse_header(path, content)
    shape = _checked_shape(path, header)
    dtype = _checked_type(path, header)
    offset = _checked_offset(path, header, shape, dtype, len(content))
    affine = _checked_affine(path, header)
    data = np.frombuffer(content, dtype, count=int(np.prod(shape)), offset=offset)
    data = _scale(data.reshape(shape, order='F'), header)
    if data.dtype == np.float32 and not np.isfinite(data).all():
        raise InputError(
            f'{path.name}: holds voxels that are not finite (NaN or infinity); replace them'
        )
    data.flags.writeable = False
    # igzip has verified the trailer by now, so it is the content's own CRC.
    return Volume(data=data, affine=affine, crc32=source_crc32(path))


def write_volume(path: str | os.PathLike, data: np.ndarray, affine: np.ndarray) -> None:
    """Writes a NIfTI-1 file atomically; the same input gives the same bytes.

    sform and qform codes are 1, units mm, scl_slope and scl_inter NaN (nothing is scaled), as in
    MosMed's own files. The gzip header carries no time.

    Args:
        path: ends in .nii or .nii.gz.
        data: (X, Y, Z), uint8, int16 or float32 (bool is written as uint8).
        affine: (4, 4), voxel indices to mm, axes to Right, Anterior, Superior.

    Raises:
        ValueError: another suffix, another type, or an array that is not 3D.
    """
    path = pathlib.Path(path)
    data = data.view(np.uint8) if data.dtype == bool else data
    if not is_nifti(path):
        raise ValueError(f'{path.name}: a volume is written to .nii or .nii.gz')
    if data.dtype.type not in _WRITTEN_TYPES or data.ndim != 3:
        raise ValueError(f'{path.name}: cannot write {data.ndim}D {data.dtype}')
    header = nibabel.Nifti1Header(endianness='<')
    header.set_data_dtype(data.dtype.type)
    header.set_data_shape(data.shape)
    header.set_qform(affine, code=1)
    header.set_sform(affine, code=1)
    header.set_xyzt_units('mm')
    header['magic'], header['vox_offset'] = b'n+1', 352
    header['scl_slope'] = header['scl_inter'] = np.nan
    # Four zero bytes after the header: no extensions follow.
    content = header.binaryblock + bytes(4) + data.astype(data.dtype.newbyteorder('<')).tobytes('F')
    if path.name.lower().endswith('.gz'):
        content = igzip.compress(content, compresslevel=2, mtime=0)
    with atomic.new_file(path) as temporary:
        temporary.write_bytes(content)


def _read_bytes(path: pathlib.Path, last: int | None = None) -> bytes:
    try:
        with path.open('rb') as file:
            if last is not None:
                file.seek(max(0, path.stat().st_size - last))
            return file.read()
    except FileNotFoundError as error:
        raise InputError(f'{path}: no such file; check the path') from error
    except IsADirectoryError as error:
        raise InputError(f'{path}: is a folder, not a NIfTI file; name the file in it') from error
    except OSError as error:
        raise InputError(f'{path}: cannot be read ({error.strerror}); check the disk') from error


def _trailer_crc32(trailer: bytes) -> int:
    # RFC 1952: the last eight bytes are CRC-32 and length, little endian.
    return struct.unpack('<I', trailer[:4])[0] if len(trailer) == 8 else 0


def _read_content(path: pathlib.Path) -> bytes:
    content = _read_bytes(path)
    if not content:
        raise InputError(f'{path.name}: the file is empty; download it again')
    if content[:2] != b'\x1f\x8b':
        if path.name.lower().endswith('.gz'):
            raise InputError(
                f'{path.name}: not gzip data, whatever its name; rename or download it'
            )
        return content
    try:
        return igzip.decompress(content)
    except EOFError as error:
        raise InputError(f'{path.name}: the file is cut short; download it again') from error
    except (igzip.BadGzipFile, isal_zlib.error, zlib.error) as error:
        if 'crc' in str(error).lower():
            raise InputError(
                f'{path.name}: gzip CRC does not match (file damaged on disk or in transfer); '
                'download it again'
            ) from error
        raise InputError(
            f'{path.name}: gzip data is damaged ({error}); download it again'
        ) from error


def _parse_header(path: pathlib.Path, content: bytes) -> nibabel.Nifti1Header:
    if len(content) >= 4:
        for order in '<>':
            length = struct.unpack(order + 'i', content[:4])[0]
            if length in _HEADER_CLASSES and len(content) >= length + 4:
                break
        else:
            raise InputError(f'{path.name}: not a NIfTI file; convert it to .nii.gz')
        header = _HEADER_CLASSES[length](content[:length], endianness=order, check=False)
        magic = bytes(header['magic'])[:3]
        if magic in (b'n+1', b'n+2'):
            return header
        if magic in (b'ni1', b'ni2'):
            raise InputError(f'{path.name}: header without voxels (.hdr/.img); convert to .nii.gz')
    raise InputError(f'{path.name}: not a NIfTI file; convert it to .nii.gz')


def _checked_shape(path: pathlib.Path, header: nibabel.Nifti1Header) -> tuple[int, int, int]:
    num_axes = int(header['dim'][0])
    if not 1 <= num_axes <= 7:
        raise InputError(f'{path.name}: header names {num_axes} axes; download it again')
    shape = tuple(int(length) for length in header['dim'][1 : num_axes + 1])
    if min(shape) < 1:
        raise InputError(f'{path.name}: header gives the shape {shape}; download it again')
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3 or min(shape) < 2:
        num_axes = len(shape) if len(shape) != 3 else sum(length > 1 for length in shape)
        text = ' × '.join(str(length) for length in shape)
        raise InputError(f'{path.name}: {num_axes}D image ({text}); give one 3D volume a file')
    return shape


def _checked_type(path: pathlib.Path, header: nibabel.Nifti1Header) -> np.dtype:
    try:
        dtype = header.get_data_dtype()
    except (KeyError, nibabel.spatialimages.HeaderDataError) as error:
        raise InputError(
            f'{path.name}: unknown voxel type {int(header["datatype"])}; download it again'
        ) from error
    if dtype.kind not in 'iuf' or dtype.itemsize > 8:
        raise InputError(f'{path.name}: voxels of type {dtype} are not CT; save int16 or float32')
    if int(header['bitpix']) not in (0, 8 * dtype.itemsize):
        raise InputError(
            f'{path.name}: header gives {int(header["bitpix"])} bits for {dtype}; download it again'
        )
    return dtype


def _checked_offset(
    path: pathlib.Path,
    header: nibabel.Nifti1Header,
    shape: tuple[int, int, int],
    dtype: np.dtype,
    content_length: int,
) -> int:
    offset = float(header['vox_offset'])
    if not np.isfinite(offset) or not 0 <= offset < 2**31 or offset != int(offset):
        raise InputError(f'{path.name}: voxels start at byte {offset}?; download it again')
    # Some writers leave 0 and mean the first byte after header and extension flag.
    offset = max(int(offset), int(header['sizeof_hdr']) + 4)
    num_bytes = dtype.itemsize
    for length in shape:  # Python integers: no overflow
        num_bytes *= length
    if content_length != offset + num_bytes:
        text = ' × '.join(str(length) for length in shape)
        raise InputError(
            f'{path.name}: header promises {text} voxels of {dtype.itemsize} bytes '
            f'({num_bytes} bytes), the file holds {max(0, content_length - offset)}; '
            'download it again'
        )
    return offset


def _checked_affine(path: pathlib.Path, header: nibabel.Nifti1Header) -> np.ndarray:
    pixdim = np.asarray(header['pixdim'][1:4], np.float64)
    if not (np.isfinite(pixdim).all() and (pixdim > 0).all()):
        raise InputError(
            f'{path.name}: voxel size {pixdim.tolist()} mm is not positive; correct pixdim'
        )
    if header['sform_code'] > 0:
        affine = header.get_sform()
    elif header['qform_code'] > 0:
        affine = _qform(path, header)
    else:
        raise InputError(
            f'{path.name}: no orientation (sform and qform codes are 0); '
            'convert it from DICOM again, with orientation'
        )
    affine = np.asarray(affine, np.float64)
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    # |det| over the product of the column lengths is 1 for a grid with right angles; gantry tilt
    # takes it to 0.87 at 30 degrees. A collapsed axis gives 0.
    volume = abs(np.linalg.det(affine[:3, :3])) if np.isfinite(affine).all() else 0.0
    if not volume > 0.5 * np.prod(lengths) > 0:
        raise InputError(f'{path.name}: affine cannot be inverted; correct the sform or qform')
    return affine


def _qform(path: pathlib.Path, header: nibabel.Nifti1Header) -> np.ndarray:
    try:
        return header.get_qform()
    except (ValueError, nibabel.spatialimages.HeaderDataError) as error:
        raise InputError(f'{path.name}: qform is no rotation; correct it') from error


def _scale(data: np.ndarray, header: nibabel.Nifti1Header) -> np.ndarray:
    slope, inter = float(header['scl_slope']), float(header['scl_inter'])
    inter = inter if np.isfinite(inter) else 0.0
    if not np.isfinite(slope) or slope == 0 or (slope, inter) == (1.0, 0.0):
        if data.dtype.type in _KEPT_TYPES:
            return data.astype(data.dtype.newbyteorder('='), copy=False)
        return data.astype(np.float32)
    return (data * slope + inter).astype(np.float32)
