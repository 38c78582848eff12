"""Which of what was found is the right lung and which the left, also where they touch."""

import cc3d
import edt
import numpy as np

from covseg_jax.imaging.geometry import SpacingMm
from covseg_jax.prepare.slicewise import distance_in_plane, find_box, volumes_and_means
from covseg_jax.prepare.working_grid import nearest_voxels, working_grid

SMALLER_LUNG = 0.1  # of the larger lung: the least that a collapsed lung keeps
EROSIONS_MM = (2.0, 4.0, 7.0, 11.0, 16.0, 22.0)
ACROSS_WEIGHT = 3.0  # of the distance across, when a piece is given to a lung
BESIDE_MM = 30.0  # the other lung's centroid lies further to the side, a piece of the same less far

# Array axes: 0 z to Superior, 1 y to Posterior, 2 x to Left.


def split_lungs(lungs: np.ndarray, spacing_mm: SpacingMm) -> tuple[np.ndarray, np.ndarray]:
    """Right and left lung of a finished mask, whether they touch or are in many pieces.

    A piece belongs to the nearer lung. Where there is one lung alone, the half of the image that it
    lies in says which, and the other is empty.

    Args:
        lungs: bool (Z, Y, X), canonical.
        spacing_mm: (z, y, x).

    Returns:
        (right, left), bool (Z, Y, X): disjoint, together the mask.
    """
    right, left = np.zeros_like(lungs), np.zeros_like(lungs)
    if not lungs.any():
        return right, left
    around = find_box(lungs, 8)  # with a margin, because the border of an array is not eroded
    part = lungs[around]
    coarse_shape, coarse_mm = working_grid(part.shape, spacing_mm)
    coarse = part[nearest_voxels(coarse_shape, part.shape)]
    cores = _find_cores(coarse, coarse_mm, (0.0, *EROSIONS_MM))
    if cores is None:
        (right if is_right(find_box(lungs), lungs) else left)[around] = part
        return right, left
    cores = sorted(cores, key=lambda core: np.flatnonzero(core.any(axis=(0, 1))).mean())
    on_right = _assign_pieces(coarse, *cores, coarse_mm)
    on_right = on_right[nearest_voxels(part.shape, coarse_shape)]
    right[around], left[around] = part & on_right, part & ~on_right
    return right, left


def separate_lungs(parenchyma: np.ndarray, spacing_mm: SpacingMm) -> list[np.ndarray]:
    """Right and left lung, also where they touch in front of or behind the heart."""
    components, number = cc3d.connected_components(parenchyma, connectivity=6, return_N=True)
    if number != 1:
        return [components == label for label in range(1, number + 1)]
    around = find_box(parenchyma, 1)  # with a margin, because the border of an array is not eroded
    cores = _find_cores(parenchyma[around], spacing_mm, EROSIONS_MM)
    if cores is None:
        return [parenchyma]
    first = np.zeros_like(parenchyma)
    first[around] = parenchyma[around] & _is_nearer(*cores, spacing_mm)
    return [first, parenchyma & ~first]


def _find_cores(
    mask: np.ndarray, spacing_mm: SpacingMm, erosions_mm: tuple[float, ...]
) -> tuple[np.ndarray, np.ndarray] | None:
    """What remains of each lung after the least in-plane erosion that separates them: the largest
    part that lies beside the largest of all, and the latter. None for one lung alone, or where no
    erosion separates them."""
    depth = distance_in_plane(mask, spacing_mm)
    for erosion_mm in erosions_mm:
        parts = cc3d.connected_components(depth > erosion_mm, connectivity=6)
        statistics = cc3d.statistics(parts)
        volumes = statistics['voxel_counts'].astype(np.int64)
        volumes[0] = 0
        first = int(volumes.argmax())
        across = statistics['bounding_boxes'][first][2]
        x = statistics['centroids'][:, 2]
        beside_mm = np.maximum(across.start - x, x - across.stop) * spacing_mm[2]
        others = np.where(beside_mm > BESIDE_MM, volumes, 0)
        second = int(others.argmax())
        if others[second] > SMALLER_LUNG * volumes[first]:
            return parts == second, parts == first
    return None


def _is_nearer(first: np.ndarray, second: np.ndarray, spacing_mm: SpacingMm) -> np.ndarray:
    """Voxels at least as near to the first mask as to the second."""
    return edt.edt(~first, anisotropy=spacing_mm) <= edt.edt(~second, anisotropy=spacing_mm)


def _assign_pieces(
    mask: np.ndarray, right: np.ndarray, left: np.ndarray, spacing_mm: SpacingMm
) -> np.ndarray:
    """Voxels, in the mask and around it, of the right lung, given a core of each lung."""
    # A piece cut off above or below is as near to the other lung's medial edge as to its own lung.
    weighted_mm = (*spacing_mm[:2], ACROSS_WEIGHT * spacing_mm[2])
    on_right = _is_nearer(right, left, weighted_mm)
    pieces = cc3d.connected_components(mask, connectivity=6)
    _, right_part = volumes_and_means(pieces, on_right)
    shared = np.intersect1d(pieces[right], pieces[left])  # the piece where the lungs touch
    whole = mask & ~np.isin(pieces, shared)
    on_right = np.where(whole, (right_part > 0.5)[pieces], on_right)
    # A voxel of the study that is outside the coarse mask goes with the nearest one inside.
    return _is_nearer(mask & on_right, mask & ~on_right, spacing_mm)


def is_right(box: tuple[slice, ...], lung: np.ndarray) -> bool:
    # x grows to the patient's left.
    return (box[2].start + box[2].stop) / 2 < lung.shape[2] / 2
