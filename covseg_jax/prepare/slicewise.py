"""Morphology of lung masks slice by slice, and what lies above and below in the same column.

Array axes: 0 z to Superior, 1 y to Posterior, 2 x to Left.
"""

import edt
import numpy as np
from scipy import ndimage

from covseg_jax.imaging.geometry import SpacingMm

IN_PLANE = np.zeros((3, 3, 3), bool)  # structuring element: a voxel and its four neighbours
IN_PLANE[1] = ndimage.generate_binary_structure(2, 1)

OUT_OF_REACH_MM = 200.0
BELOW_MM = 10.0


def distance_in_plane(mask: np.ndarray, spacing_mm: SpacingMm) -> np.ndarray:
    """Distance in mm, up to 200, to the nearest voxel outside the mask in the same slice."""
    # Far enough that no neighbouring slice counts, and no further, because edt squares in float32.
    return edt.edt(mask, anisotropy=(OUT_OF_REACH_MM, spacing_mm[1], spacing_mm[2]))


def close_in_plane(mask: np.ndarray, radius_mm: float, spacing_mm: SpacingMm) -> np.ndarray:
    """Closing by a disk of radius_mm, as two distance transforms."""
    pad = [(0, 0)] + [(int(radius_mm / spacing) + 2,) * 2 for spacing in spacing_mm[1:]]
    inner = (slice(None), *(slice(before, -before) for before, _ in pad[1:]))
    dilated = distance_in_plane(~np.pad(mask, pad), spacing_mm) <= radius_mm
    return mask | (distance_in_plane(dilated, spacing_mm)[inner] > radius_mm)


def open_in_plane(mask: np.ndarray, radius_mm: float, spacing_mm: SpacingMm) -> np.ndarray:
    """Opening by a disk of radius_mm, as two distance transforms."""
    eroded = distance_in_plane(mask, spacing_mm) > radius_mm
    return mask & (distance_in_plane(~eroded, spacing_mm) <= radius_mm)


def touches_border(lung: np.ndarray) -> np.ndarray:
    """(Z,): slices where the image's border cuts the lung off, so that its ribs are not seen."""
    return lung[:, [0, -1], :].any(axis=(1, 2)) | lung[:, :, [0, -1]].any(axis=(1, 2))


def has_lung_below(lung: np.ndarray, spacing_mm: SpacingMm) -> np.ndarray:
    """Voxels with lung in their slice, or below it, at most 10 mm off to the side.

    Liver, spleen and stomach have none under them; a consolidation at the ribs has the recess under
    it, or close by.
    """
    return distance_in_plane(~sweep(lung, 0), spacing_mm) <= BELOW_MM


def between_lung(lung: np.ndarray) -> np.ndarray:
    """Voxels with lung somewhere above and somewhere below them, in the same column."""
    return sweep(lung, 0, backwards=True) & sweep(lung, 0)


def sweep(mask: np.ndarray, axis: int, *, backwards: bool = False) -> np.ndarray:
    """Voxels with the mask at or before them along an axis, or at or after them."""
    if backwards:
        return np.flip(sweep(np.flip(mask, axis), axis), axis)
    return np.logical_or.accumulate(mask, axis=axis)


def components_at(labels: np.ndarray, where: np.ndarray | tuple) -> np.ndarray:
    """Voxels of the labelled components that have a voxel in `where`, a mask or an index."""
    chosen = np.zeros(int(labels.max()) + 1, bool)
    chosen[labels[where]] = True
    chosen[0] = False
    return chosen[labels]
