"""A chest that is quick to draw, and studies of it on disk."""

import numpy as np

from covseg_jax.imaging import nifti
from covseg_jax.imaging.geometry import to_canonical

AFFINE = np.diag([-4.0, 4.0, 8.0, 1.0])
SHAPE = (80, 64, 28)  # (X, Y, Z): LAS, 320 × 256 × 224 mm


def write_stored(path, data, affine, *new_file):
    """Writes an array (X, Y, Z) in the file's own axis order."""
    nifti.write_volume(path, to_canonical(data, affine), affine, *new_file)


def _grid_mm():
    return np.meshgrid(
        *((np.arange(n) - n / 2 + 0.5) * s for n, s in zip(SHAPE, (4, 4, 8), strict=True)),
        indexing='ij',
        sparse=True,
    )


def draw_chest(name, *, opacity_hu=-500):
    """(image in HU, opacity): a trunk with two lungs and an opacity of 40 mm diameter in the lung
    at low x. No two names give the same voxels: one of two such studies would be set aside."""
    x, y, z = _grid_mm()
    image = np.full(SHAPE, -1000, np.int16)
    image[np.broadcast_to((x / 140) ** 2 + (y / 100) ** 2 < 1, SHAPE)] = 40
    for side in (-1, 1):
        image[((x - side * 65) / 50) ** 2 + (y / 75) ** 2 + (z / 95) ** 2 < 1] = -850
    opacity = (x + 65) ** 2 + (y - 10) ** 2 + z**2 < 20**2
    image[opacity] = opacity_hu
    image[0, 0] = np.frombuffer(name.encode().ljust(SHAPE[2]), np.uint8) - np.int16(1024)
    return image, opacity


def write_study(folder, name, *, lesion=True, opacity_hu=-500):
    """Writes NAME.nii.gz and, where wanted, NAME_mask.nii.gz."""
    image, opacity = draw_chest(name, opacity_hu=opacity_hu)
    write_stored(folder / f'{name}.nii.gz', image, AFFINE)
    if lesion:
        write_stored(folder / f'{name}_mask.nii.gz', opacity, AFFINE)
