"""The arrays that the published project shares: many prepared studies in one .npy file.

LungImages.npy, LungMask.npy and InfectionMasks.npy, each (N, D, H, W), the images windowed to
[0, 1] and 0 outside the lungs. Nothing says where the voxels lie or how large they are.
"""

import os
import pathlib
import tokenize

import numpy as np
from isal import isal_zlib

from covseg_jax.errors import FileFault
from covseg_jax.imaging.volume import Volume

IMAGES, LUNGS, LESIONS = 'LungImages.npy', 'LungMask.npy', 'InfectionMasks.npy'
WINDOW_HU = (-1000.0, 400.0)  # of the stored 0 and 1
# Lungs of usual size, 260 mm high and 280 mm wide, fill (32, 128, 128) voxels of this size (z, y,
# x): the figures in ml and mm are nominal.
NOMINAL_SPACING_MM = (8.125, 2.1875, 2.1875)
_NOTE = 'has no geometry: a voxel is taken for {} × {} × {} mm, so figures in ml and mm are nominal'


def open_array(path: str | os.PathLike) -> np.ndarray:
    """(N, D, H, W), memory-mapped.

    Raises:
        FileFault: no array, cut short, or of another number of axes or type.
    """
    path = pathlib.Path(path)
    try:
        array = np.load(path, mmap_mode='r', allow_pickle=False)
    except FileNotFoundError as error:
        raise FileFault(path, f'no such file in {path.parent}', 'check the path') from error
    except (OSError, ValueError, EOFError, SyntaxError, tokenize.TokenError) as error:
        fault = f'not a whole .npy array of numbers ({" ".join(str(error).split())[:120]})'
        raise FileFault(path, fault, 'download it again') from error
    # A memory map takes what it needs of a file and says nothing of the rest.
    if not isinstance(array, np.memmap) or path.stat().st_size != array.offset + array.nbytes:
        raise FileFault(path, 'header and length of the file disagree', 'download it again')
    if array.ndim != 4 or min(array.shape) < 1:
        fault = f'an array of shape {array.shape}, not (N, depth, height, width)'
        raise FileFault(path, fault, 'give the published arrays')
    if array.dtype.kind not in 'biuf' or array.dtype.itemsize > 8:
        raise FileFault(path, f'an array of {array.dtype}', 'give numbers')
    return array


def array_crc32(path: str | os.PathLike, index: int) -> int:
    """CRC-32 of one study's voxels.

    Raises:
        FileFault: as open_array.
    """
    return isal_zlib.crc32(np.ascontiguousarray(open_array(path)[index]))


def read_array(path: str | os.PathLike, index: int) -> Volume:
    """One study of the array, in the values that it stores: (X, Y, Z) float32.

    Raises:
        FileFault: as open_array, or voxels that are not finite.
    """
    stored = open_array(path)[index]
    array = np.asarray(stored, np.float32)
    if not np.isfinite(array).all():
        raise FileFault(path, f'voxels of study {index} are not finite', 'replace them')
    array.flags.writeable = False
    depth, height, width = NOMINAL_SPACING_MM
    return Volume(
        array=array,
        # To Left, Posterior and Superior, as canonical arrays are.
        affine=np.diag([-width, -height, depth, 1.0]),
        crc32=array_crc32(path, index),
        notes=(_NOTE.format(*NOMINAL_SPACING_MM),),
    )
