"""The grid of about 2 mm that lungs are found on, and the way back to the study's own."""

import numpy as np

from covseg_jax.imaging.geometry import Shape, SpacingMm, enlarge, shrink, stretching_matrix
from covseg_jax.prepare.field_of_view import find_padding
from covseg_jax.prepare.slicewise import dilate_in_plane, find_box

WORKING_MM = 2.0
CLIP_HU = (-1024, 400)
AIR_HU = -320  # between parenchyma and soft tissue; the common threshold for lungs


def to_working_grid(
    image_hu: np.ndarray, spacing_mm: SpacingMm
) -> tuple[np.ndarray, SpacingMm, np.ndarray]:
    """The image, its spacing, and its padding, which has the density of air."""
    shape, coarse_mm = working_grid(image_hu.shape, spacing_mm)
    matrices = [stretching_matrix(*lengths) for lengths in zip(shape, image_hu.shape, strict=True)]
    # Metal and padding must not pull their neighbours' mean.
    coarse = shrink(image_hu, matrices, clip=CLIP_HU)
    nearest = image_hu[nearest_voxels(shape, image_hu.shape)]
    padding = find_padding(nearest)
    if padding.any():
        # A mean of lung and padding is neither.
        rim = dilate_in_plane(padding)
        coarse[rim] = np.clip(nearest[rim], *CLIP_HU)
        coarse[padding] = np.where(nearest[padding] < AIR_HU, CLIP_HU[0], 0)
    return coarse, coarse_mm, padding


def working_grid(
    shape: Shape, spacing_mm: SpacingMm, step_mm: float = WORKING_MM
) -> tuple[Shape, SpacingMm]:
    """Shape and spacing, never finer than the scan: an axis of 8 mm slices stays as it is."""
    extents = list(zip(shape, spacing_mm, strict=True))
    coarse = tuple(min(n, max(1, round(n * step / step_mm))) for n, step in extents)
    return coarse, tuple(step * n / m for (n, step), m in zip(extents, coarse, strict=True))


def from_working_grid(mask: np.ndarray, shape: Shape) -> np.ndarray:
    box = find_box(mask)
    matrices, target = [], []
    for axis, side in enumerate(box):
        matrix = stretching_matrix(shape[axis], mask.shape[axis])[:, side]
        rows = np.flatnonzero(matrix.any(axis=1))
        target.append(slice(rows[0], rows[-1] + 1))
        matrices.append(matrix[target[-1]])
    result = np.zeros(shape, bool)
    part = result[tuple(target)]
    for slices, values in enlarge(mask[box], matrices):
        part[slices] = values >= 0.5
    return result


def nearest_voxels(targets: Shape, sources: Shape) -> tuple[np.ndarray, ...]:
    """Indices that bring an array of the shape `sources` to `targets`, both of one extent."""
    lengths = zip(targets, sources, strict=True)
    return np.ix_(
        *((2 * np.arange(target) + 1) * source // (2 * target) for target, source in lengths)
    )
