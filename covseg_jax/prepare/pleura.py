"""Where the pleura must be by the ribs, and the lung under it that is too dense to be seen.

A consolidation as broad as a lobe leaves a lung that is smaller but as convex as before, so no
closing brings it back. The ribs have not moved: their inner surface, less the thickness of the
chest wall, is the outline of the lung.

All is done in polar coordinates round the middle of the chest: (Z, DIRECTIONS) arrays of radii in
mm; direction 0 is the patient's left, and a quarter of the circle further is the back.
"""

from typing import NamedTuple

import numpy as np
from scipy import ndimage

from covseg_jax.imaging.geometry import SpacingMm
from covseg_jax.prepare.slicewise import (
    between_lung,
    dilate_in_plane,
    erode_in_plane,
    has_lung_below,
    open_in_plane,
    touches_border,
)

DIRECTIONS = 180
BONE_HU = 200
TISSUE_HU = 150  # consolidation and soft tissue lie below, bone above
SOFT_TISSUE_HU = 40
CONSOLIDATED_HU = -450  # lung that is denser over LOCAL_VOXELS hides its edge
LOCAL_VOXELS = 5
# Ribs are seen in some directions of some slices, and their surface is smooth in between. These are
# the deviations of the Gaussian that fills it in, and the least sum of its weights to be trusted.
RIB_GAP_MM = 12.0
RIB_GAP_DEGREES = 6.0
LEAST_WEIGHT = 0.2
SECOND_LAYER_MM = 12.0  # bone this much further out than the bone around it is no rib
# Directions, in degrees from the front, in which the heart and not the lung lies under the ribs.
FRONT_DEGREES = 40.0
MIDDLE_MM = 30.0  # spine, and what lies beside it
SHOULDER = 0.85  # of the lungs' height: above, shoulder blades and collar bones look like ribs
# The wall's thickness is this percentile, over the directions, of the distance from lung to ribs:
# in directions with consolidation it is larger. Healthy chests have 2 to 5 mm.
WALL_PERCENTILE = 10
WALL_MM = (2.0, 6.0)
LEAST_RADIUS_MM = 5.0  # a shell thinner than twice this is fat, muscle or fluid, not lost lung


class _Polar(NamedTuple):
    radius_mm: np.ndarray  # (Y, X) of each pixel
    direction: np.ndarray  # (Y, X) its index
    x_mm: np.ndarray  # (1, X) from the middle


def lung_under_ribs(lungs: np.ndarray, image_hu: np.ndarray, spacing_mm: SpacingMm) -> np.ndarray:
    """What to add to a lung mask: dense lung between it and the ribs, and its half-filled edge.

    Args:
        lungs: bool (Z, Y, X), both lungs as far as they are aerated or enclosed.
        image_hu: (Z, Y, X), HU.
        spacing_mm: (z, y, x).

    Returns:
        bool (Z, Y, X).
    """
    polar = _make_polar(lungs, spacing_mm)
    reach = _furthest(lungs, polar)
    pleura = _find_pleura(reach, image_hu, polar, spacing_mm)
    slices = np.flatnonzero(lungs.any(axis=(1, 2)))
    shoulder = slices[0] + SHOULDER * (slices[-1] - slices[0])
    seen = ~touches_border(lungs) & (np.arange(lungs.shape[0]) < shoulder)
    pleura[~seen] = 0.0
    # Nothing further out is added, and density is judged within half of LOCAL_VOXELS around.
    reached = polar.radius_mm <= max(reach.max(), pleura.max())
    box = (
        slice(slices[0], slices[-1] + 1),
        *(_span(reached.any(axis), LOCAL_VOXELS) for axis in (1, 0)),
    )
    added = np.zeros_like(lungs)
    _, rows, columns = box
    around = _Polar(
        polar.radius_mm[rows, columns], polar.direction[rows, columns], polar.x_mm[:, columns]
    )
    added[box] = _lost_lung(
        lungs[box], image_hu[box], spacing_mm, around, reach[box[0]], pleura[box[0]]
    )
    return added


def _span(mask: np.ndarray, margin: int) -> slice:
    inside = np.flatnonzero(mask)
    return slice(max(0, inside[0] - margin), inside[-1] + 1 + margin)


def _lost_lung(
    lungs: np.ndarray,
    image_hu: np.ndarray,
    spacing_mm: SpacingMm,
    polar: _Polar,
    reach: np.ndarray,
    pleura: np.ndarray,
) -> np.ndarray:
    # Outward of the lung nothing aerated lies further out in the same direction.
    last = ndimage.maximum_filter1d(reach, 3, axis=1, mode='wrap')
    least = np.where(last > 0, last - spacing_mm[1], np.inf)[:, polar.direction]
    degrees = np.arange(DIRECTIONS) * 360 / DIRECTIONS
    is_side = (np.abs(degrees - 270) > FRONT_DEGREES)[polar.direction]
    is_side &= np.abs(polar.x_mm) > MIDDLE_MM
    outward = (polar.radius_mm > least) & is_side & ~lungs & (image_hu < TISSUE_HU)
    inside = outward & (polar.radius_mm < pleura[:, polar.direction])
    inside &= has_lung_below(lungs, spacing_mm) | between_lung(lungs)
    shell = open_in_plane(inside, LEAST_RADIUS_MM, spacing_mm)
    found = lungs | shell
    lung_hu = local_lung_hu(found, image_hu)
    beside = dilate_in_plane(found) & ~found
    # More than half of the voxel is lung, judged by the density of the lung beside it: a single
    # threshold would put the edge of ground glass too far inside.
    edge = beside & outward & (image_hu < (lung_hu + SOFT_TISSUE_HU) / 2)
    # Consolidation hides its own edge: what was found of it ends where aerated lung was seen.
    dense = (lung_hu > CONSOLIDATED_HU) & (image_hu < TISSUE_HU)
    return shell | edge | (dense & (beside | inside))


def _make_polar(lungs: np.ndarray, spacing_mm: SpacingMm) -> _Polar:
    rows = np.flatnonzero(lungs.any(axis=(0, 2)))
    columns = np.flatnonzero(lungs.any(axis=(0, 1)))
    y_mm = (np.arange(lungs.shape[1])[:, None] - rows.mean()) * spacing_mm[1]
    x_mm = (np.arange(lungs.shape[2])[None, :] - columns.mean()) * spacing_mm[2]
    turn = np.arctan2(y_mm, x_mm) / (2 * np.pi)
    direction = np.floor((turn % 1) * DIRECTIONS).astype(int) % DIRECTIONS
    return _Polar(np.hypot(y_mm, x_mm), direction, x_mm)


def _furthest(lungs: np.ndarray, polar: _Polar) -> np.ndarray:
    # (Z, DIRECTIONS) mm from the middle to the last voxel of the lungs; 0 where there is none
    reach = np.zeros((lungs.shape[0], DIRECTIONS))
    z, y, x = np.nonzero(lungs)
    np.maximum.at(reach, (z, polar.direction[y, x]), polar.radius_mm[y, x])
    return reach


def _find_pleura(
    reach: np.ndarray,
    image_hu: np.ndarray,
    polar: _Polar,
    spacing_mm: SpacingMm,
) -> np.ndarray:
    """(Z, DIRECTIONS) mm from the middle to the outline the lungs have in health; 0 if not known"""
    # Bone within the lungs' outline is no rib but spine, or calcified or contrasted vessels.
    outline = ndimage.grey_closing(reach, (1, DIRECTIONS * 42 // 360), mode='wrap')
    z, y, x = np.nonzero(image_hu > BONE_HU)
    beyond = polar.radius_mm[y, x] > outline[z, polar.direction[y, x]] - spacing_mm[1]
    z, y, x = z[beyond], y[beyond], x[beyond]
    ribs = np.full(reach.shape, np.inf)
    np.minimum.at(ribs, (z, polar.direction[y, x]), polar.radius_mm[y, x])

    sigma = (RIB_GAP_MM / spacing_mm[0], RIB_GAP_DEGREES * DIRECTIONS / 360)
    # Shoulder blades lie behind ribs, in the slice or a little above or below it.
    window = [2 * int(np.ceil(2 * size)) + 1 for size in sigma]
    nearest = ndimage.minimum_filter(ribs, window, mode=('nearest', 'wrap'))
    ribs[ribs > nearest + SECOND_LAYER_MM] = np.inf

    def spread(values):
        return ndimage.gaussian_filter(values, sigma, mode=('nearest', 'wrap'), truncate=3)

    seen = np.isfinite(ribs)
    weight = spread(seen.astype(np.float64))
    surface = spread(np.where(seen, ribs, 0.0)) / np.maximum(weight, 1e-9)
    known = weight >= LEAST_WEIGHT
    walls = (surface - reach)[known & (reach > 0)]
    if not walls.size:
        return np.zeros(reach.shape)
    return np.where(known, surface - np.clip(np.percentile(walls, WALL_PERCENTILE), *WALL_MM), 0.0)


def local_lung_hu(lungs: np.ndarray, image_hu: np.ndarray) -> np.ndarray:
    """Mean density of the lung within a few voxels in the slice; -1024 where there is none."""
    core = erode_in_plane(lungs)

    def local_mean(values):
        return ndimage.uniform_filter(values.astype(np.float32), (1, LOCAL_VOXELS, LOCAL_VOXELS))

    share = local_mean(core)
    mean_hu = local_mean(np.where(core, image_hu, 0)) / np.maximum(share, 1e-6)
    return np.where(share > 1e-3, mean_hu, -1024)
