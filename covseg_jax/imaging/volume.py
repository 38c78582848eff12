"""A 3D image and where it lies in the patient."""

from dataclasses import dataclass

import numpy as np

AFFINE_TOLERANCE = 1e-3  # mm


@dataclass(frozen=True)
class Volume:
    """A 3D volume as its file, or its series of files, holds it.

    Attributes:
        data: (X, Y, Z) in the file's own axis order, read-only; uint8, int16 or float32.
        affine: (4, 4) float64, voxel indices to mm, axes to Right, Anterior, Superior.
        crc32: CRC-32 of the file's content.
        notes: what was not plain in the file and settled by rule, one sentence each.
    """

    data: np.ndarray
    affine: np.ndarray
    crc32: int
    notes: tuple[str, ...] = ()

    def lies_on_grid_of(self, other: 'Volume') -> bool:
        """Whether voxel (i, j, k) of both is the same place: shape and affine are equal, the latter
        to a thousandth of a mm."""
        return self.data.shape == other.data.shape and np.allclose(
            self.affine, other.affine, rtol=0, atol=AFFINE_TOLERANCE
        )

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between voxel centres along the file's axes (x, y, z), mm."""
        return tuple(float(length) for length in np.linalg.norm(self.affine[:3, :3], axis=0))

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel, ml (1000 mm³)."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000.0
