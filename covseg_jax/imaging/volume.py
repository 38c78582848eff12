"""A 3D image and where it lies in the patient."""

from dataclasses import dataclass

import numpy as np

from covseg_jax.imaging.geometry import canonical_spacing, from_canonical

AFFINE_TOLERANCE = 1e-3  # mm


@dataclass(frozen=True)
class Volume:
    """A 3D volume, turned as all code here expects it, and the way back to its file's axes.

    Attributes:
        array: (Z, Y, X) canonical, z to Superior, y to Posterior, x to Left; read-only; uint8,
            int16 or float32.
        affine: (4, 4) float64, voxel indices *of the file* to mm, axes to Right, Anterior,
            Superior.
        crc32: CRC-32 of the file's content.
        notes: what was not plain in the file and settled by rule, one sentence each.
    """

    array: np.ndarray
    affine: np.ndarray
    crc32: int
    notes: tuple[str, ...] = ()

    @property
    def as_stored(self) -> np.ndarray:
        """(X, Y, Z) in the file's own axis order, a view."""
        return from_canonical(self.array, self.affine)

    def lies_on_grid_of(self, other: 'Volume') -> bool:
        """Whether voxel (i, j, k) of both files is the same place: shape and affine are equal, the
        latter to a thousandth of a mm."""
        is_near = np.allclose(self.affine, other.affine, rtol=0, atol=AFFINE_TOLERANCE)
        return is_near and self.as_stored.shape == other.as_stored.shape

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between voxel centres along z, y and x, mm."""
        return canonical_spacing(self.affine)

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel, ml (1000 mm³)."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000.0
