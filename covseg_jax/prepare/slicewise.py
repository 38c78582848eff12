"""Morphology of lung masks slice by slice, and what lies above and below in the same column.

Array axes: 0 z to Superior, 1 y to Posterior, 2 x to Left.
"""

import cc3d
import edt
import numpy as np

from covseg_jax.imaging.geometry import SpacingMm

OUT_OF_REACH_MM = 200.0
BELOW_MM = 10.0


def find_box(mask: np.ndarray, margin: int = 0) -> tuple[slice, slice, slice]:
    """The box round a mask that is not empty, with as many voxels more where the array has them."""
    box = []
    rows = mask.any(axis=0)
    for inside in (mask.any(axis=(1, 2)), rows.any(axis=1), rows.any(axis=0)):
        indices = np.flatnonzero(inside)
        box.append(slice(max(0, indices[0] - margin), indices[-1] + 1 + margin))
    return tuple(box)


def distance_in_plane(mask: np.ndarray, spacing_mm: SpacingMm) -> np.ndarray:
    """Distance in mm, up to 200, to the nearest voxel outside the mask in the same slice."""
    depth = np.empty(mask.shape, np.float32)
    for z, pixels in enumerate(mask):
        depth[z] = edt.edt(pixels, anisotropy=spacing_mm[1:])
    return np.minimum(depth, OUT_OF_REACH_MM)


def dilate_by_disk(mask: np.ndarray, radius_mm: float, spacing_mm: SpacingMm) -> np.ndarray:
    """Voxels at most radius_mm from the mask in their slice."""
    # Row by row of the disk: a few shifts of bytes, where a distance transform takes ten times as
    # long. `row` is the mask widened to both sides, by more from row to row.
    row, dilated, width = mask.copy(), np.zeros_like(mask), 0
    for offset in range(int(radius_mm / spacing_mm[1]), -1, -1):
        reach_mm = np.sqrt(max(radius_mm**2 - (offset * spacing_mm[1]) ** 2, 0.0))
        while width < int(reach_mm / spacing_mm[2]):
            width += 1
            _add_shifted(row, mask, width, axis=2)
        _add_shifted(dilated, row, offset, axis=1)
    return dilated


def _add_shifted(target: np.ndarray, mask: np.ndarray, voxels: int, axis: int) -> None:
    """Adds to a mask another one, moved by as many voxels along an axis in either direction."""
    if voxels < mask.shape[axis]:
        target, mask = np.moveaxis(target, axis, 0), np.moveaxis(mask, axis, 0)
        length = len(mask) - voxels
        target[voxels:] |= mask[:length]
        target[:length] |= mask[voxels:]


def close_in_plane(mask: np.ndarray, radius_mm: float, spacing_mm: SpacingMm) -> np.ndarray:
    """Closing by a disk of radius_mm."""
    pad = [(0, 0)] + [(int(radius_mm / spacing) + 2,) * 2 for spacing in spacing_mm[1:]]
    inner = (slice(None), *(slice(before, -before) for before, _ in pad[1:]))
    dilated = dilate_by_disk(np.pad(mask, pad), radius_mm, spacing_mm)
    return mask | ~dilate_by_disk(~dilated, radius_mm, spacing_mm)[inner]


def open_in_plane(mask: np.ndarray, radius_mm: float, spacing_mm: SpacingMm) -> np.ndarray:
    """Opening by a disk of radius_mm; what lies beyond the border counts as mask."""
    eroded = ~dilate_by_disk(~mask, radius_mm, spacing_mm)
    return mask & dilate_by_disk(eroded, radius_mm, spacing_mm)


def erode_in_plane(mask: np.ndarray, times: int = 1) -> np.ndarray:
    """Erosion by a voxel and its four neighbours in the slice; beyond the border there is none."""
    for _ in range(times):
        eroded = np.zeros_like(mask)
        inner = eroded[:, 1:-1, 1:-1]
        np.logical_and(mask[:, :-2, 1:-1], mask[:, 2:, 1:-1], out=inner)
        inner &= mask[:, 1:-1, :-2]
        inner &= mask[:, 1:-1, 2:]
        inner &= mask[:, 1:-1, 1:-1]
        mask = eroded
    return mask


def dilate_in_plane(
    mask: np.ndarray, times: int = 1, within: np.ndarray | None = None
) -> np.ndarray:
    """Dilation by a voxel and its four neighbours in the slice, each time `within` a mask that
    holds all of this one."""
    for _ in range(times):
        dilated = mask.copy()
        dilated[:, 1:] |= mask[:, :-1]
        dilated[:, :-1] |= mask[:, 1:]
        dilated[:, :, 1:] |= mask[:, :, :-1]
        dilated[:, :, :-1] |= mask[:, :, 1:]
        if within is not None:
            dilated &= within
        mask = dilated
    return mask


def label_in_plane(mask: np.ndarray) -> np.ndarray:
    """Components of each slice by itself, 4-connected: their labels, 0 where the mask is 0. Voxels
    of different values, where the mask has such, are of different components."""
    depth, height, width = mask.shape
    # One image of all slices, with an empty row between two.
    rows = np.zeros((depth, height + 1, width), mask.dtype)
    rows[:, :height] = mask
    labels = cc3d.connected_components(rows.reshape(-1, width), connectivity=4)
    return labels.reshape(rows.shape)[:, :height]


def fill_cavities(mask: np.ndarray) -> np.ndarray:
    """The mask, and what does not reach the border of the volume without crossing it."""
    labels = cc3d.connected_components(~mask, connectivity=6)
    closed = np.ones(int(labels.max()) + 1, bool)
    for axis in range(3):
        closed[labels.take([0, -1], axis)] = False
    closed[0] = True  # the mask itself
    return closed[labels]


def touches_border(lung: np.ndarray) -> np.ndarray:
    """(Z,): slices where the image's border cuts the lung off, so that its ribs are not seen."""
    return lung[:, [0, -1], :].any(axis=(1, 2)) | lung[:, :, [0, -1]].any(axis=(1, 2))


def has_lung_below(lung: np.ndarray, spacing_mm: SpacingMm) -> np.ndarray:
    """Voxels with lung in their slice, or below it, at most 10 mm off to the side.

    Liver, spleen and stomach have none under them; a consolidation at the ribs has the recess under
    it, or close by.
    """
    return dilate_by_disk(sweep(lung, 0), BELOW_MM, spacing_mm)


def between_lung(lung: np.ndarray) -> np.ndarray:
    """Voxels with lung somewhere above and somewhere below them, in the same column."""
    return sweep(lung, 0, backwards=True) & sweep(lung, 0)


def sweep(mask: np.ndarray, axis: int, *, backwards: bool = False) -> np.ndarray:
    """Voxels with the mask at or before them along an axis, or at or after them."""
    if backwards:
        return np.flip(sweep(np.flip(mask, axis), axis), axis)
    index = np.arange(mask.shape[axis], dtype=np.int16).reshape(np.roll((-1, 1, 1), axis))
    first = np.expand_dims(mask.argmax(axis).astype(np.int16), axis)
    first[~mask.any(axis, keepdims=True)] = mask.shape[axis]
    return index >= first


def components_at(labels: np.ndarray, where: np.ndarray | tuple) -> np.ndarray:
    """Voxels of the labelled components that have a voxel in `where`, a mask or an index."""
    chosen = np.zeros(int(labels.max()) + 1, bool)
    chosen[labels[where]] = True
    chosen[0] = False
    return chosen[labels]


def volumes_and_means(components: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each label, in voxels and in the values' unit; the background, label 0, has volume 0."""
    inside = components > 0
    labels = components[inside]
    volumes = np.bincount(labels, minlength=1)
    return volumes, np.bincount(labels, values[inside], len(volumes)) / np.maximum(volumes, 1)
