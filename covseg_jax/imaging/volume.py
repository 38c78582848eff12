"""A 3D image and where it lies in the patient."""

from dataclasses import dataclass

import numpy as np

from covseg_jax.imaging.geometry import (
    SpacingMm,
    canonical_spacing,
    from_canonical,
    voxel_volume_ml,
)

AFFINE_TOLERANCE = 1e-3  # mm
GRID_TOLERANCE = 0.01  # voxels


@dataclass(frozen=True)
class Volume:
    """A 3D volume in canonical orientation, and the way back to its file's axes.

    Attributes:
        array: (Z, Y, X) canonical, z to Superior, y to Posterior, x to Left; read-only; uint8,
            int16 or float32.
        affine: (4, 4) float64, voxel indices *of the file* to mm, axes to Right, Anterior,
            Superior.
        crc32: CRC-32 of the file's content.
        notes: what the file left open and a rule decided, one sentence each.
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
        """Whether voxel (i, j, k) is the same place in both files: they have the same shape, and
        the same affine to a thousandth of a mm, or no voxel is a hundredth of a voxel off."""
        if self.as_stored.shape != other.as_stored.shape:
            return False
        if np.allclose(self.affine, other.affine, rtol=0, atol=AFFINE_TOLERANCE):
            return True
        in_voxels = np.linalg.solve(other.affine[:3, :3], self._corner_shifts(other))
        return bool(np.abs(in_voxels).max() < GRID_TOLERANCE)

    def distance_mm(self, other: 'Volume') -> float:
        """The largest distance between the places of a voxel (i, j, k) in two volumes of one
        shape."""
        return float(np.linalg.norm(self._corner_shifts(other), axis=0).max())

    def _corner_shifts(self, other: 'Volume') -> np.ndarray:
        # Affine maps differ most at a corner.
        corners = np.meshgrid(*((0, length - 1) for length in self.as_stored.shape))
        shift = self.affine - other.affine
        return shift[:3, :3] @ np.reshape(corners, (3, -1)) + shift[:3, 3:]

    @property
    def spacing_mm(self) -> SpacingMm:
        """Distance between voxel centres."""
        return canonical_spacing(self.affine)

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel, ml."""
        return voxel_volume_ml(self.affine)
