"""From a study's grid to the model's grid and back.

Two steps. First the file's axis order and flips are undone exactly: canonical arrays are (Z, Y, X),
with z to Superior, y to Posterior and x to Left, so `array[z]` is the radiological view. Then the
box around the lungs is mapped onto the model's grid in millimetres, by one small matrix per axis.
In plane both axes have the same scale, and the shorter side is padded.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from nibabel import orientations

Shape = tuple[int, int, int]
SpacingMm = tuple[float, float, float]  # along z, y and x
_TIMES_DEBLURRED = (1, 2, 2)  # along z, y, x
_SLAB_VOXELS = 2**22  # that are resampled at a time: 16 MB of float32
_BAND_TARGETS = 32  # more multiply more zeros, fewer make products that are slow for their size
_CANONICAL = orientations.axcodes2ornt(('L', 'P', 'S'))


def to_canonical(data: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Turns a file's array (X, Y, Z) into the canonical view (Z, Y, X); nothing is copied.

    Oblique grids take the closest axes (nibabel's io_orientation); nothing is interpolated.
    """
    turn = orientations.ornt_transform(orientations.io_orientation(affine), _CANONICAL)
    return orientations.apply_orientation(data, turn).T


def from_canonical(array: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """The inverse of `to_canonical`: (Z, Y, X) back to the file's axis order (X, Y, Z), a view."""
    turn = orientations.ornt_transform(_CANONICAL, orientations.io_orientation(affine))
    return orientations.apply_orientation(array.T, turn)


def _canonical_axes(affine: np.ndarray) -> np.ndarray:
    """The file's axes that run along z, y and x."""
    # io_orientation()[i] names the world axis (0 right-left, 1, 2) of the file's axis i.
    return np.argsort(orientations.io_orientation(affine)[:, 0])[::-1]


def canonical_spacing(affine: np.ndarray) -> SpacingMm:
    """Voxel spacing of the canonical array that belongs to `affine` (4, 4)."""
    lengths = np.linalg.norm(np.asarray(affine, np.float64)[:3, :3], axis=0)
    return tuple(lengths[_canonical_axes(affine)].tolist())


def voxel_volume_ml(affine: np.ndarray) -> float:
    """Volume of one voxel of a file with this (4, 4) affine, in ml (1000 mm³)."""
    return float(abs(np.linalg.det(np.asarray(affine)[:3, :3]))) / 1000.0


def right_angle_share(affine: np.ndarray) -> float:
    """|det| of an affine's axes over the product of their lengths: 1 for a grid with right angles,
    0.87 for a gantry tilt of 30 degrees, 0 for a collapsed axis or values that are not finite."""
    axes = np.asarray(affine, np.float64)[:3, :3]
    if not np.isfinite(affine).all():
        return 0.0
    lengths = float(np.prod(np.linalg.norm(axes, axis=0)))
    return float(abs(np.linalg.det(axes))) / lengths if lengths > 0 else 0.0


def describe_tilt(affine: np.ndarray) -> list[str]:
    """The note of a grid whose axes are not at right angles; none of any other."""
    if right_angle_share(affine) >= 0.999:
        return []
    return ['its axes are not at right angles (gantry tilt); distances follow the grid']


@dataclass(frozen=True)
class Geometry:
    """How a study's grid and a model grid belong together.

    Attributes:
        source_shape: (X, Y, Z) of the file's array.
        affine: the file's (4, 4) affine, as tuples.
        box: ((z0, z1), (y0, y1), (x0, x1)), half-open, canonical voxels: the lungs and a margin.
        grid: (D, H, W) of the model.
    """

    source_shape: Shape
    affine: tuple[tuple[float, ...], ...]
    box: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    grid: Shape

    @property
    def spacing_mm(self) -> SpacingMm:
        """Spacing of the canonical study array."""
        return canonical_spacing(self.affine)

    @property
    def canonical_shape(self) -> Shape:
        """(Z, Y, X) of the canonical study array."""
        return tuple(np.asarray(self.source_shape)[_canonical_axes(self.affine)].tolist())

    @property
    def model_spacing_mm(self) -> SpacingMm:
        """Spacing of the model grid. The box's slices fill the depth; in plane, where both axes
        have the same spacing, the longer side in mm fills its axis."""
        depth, height, width = (
            (stop - start) * spacing
            for (start, stop), spacing in zip(self.box, self.spacing_mm, strict=True)
        )
        in_plane = max(height / self.grid[1], width / self.grid[2])
        return depth / self.grid[0], in_plane, in_plane

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel of the model grid, ml, which is tilted as the study's is."""
        share = right_angle_share(self.affine) if describe_tilt(self.affine) else 1.0
        return share * math.prod(self.model_spacing_mm) / 1000.0

    @property
    def study_voxel_ml(self) -> float:
        """Volume of one voxel of the study's own grid, ml."""
        return voxel_volume_ml(self.affine)

    def to_json(self) -> dict:
        """A dict of plain numbers and lists, for json.dump."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict) -> 'Geometry':
        """The Geometry that `to_json` described: JSON's lists become the tuples that they were.

        Raises:
            KeyError: a field is missing.
        """
        return cls(
            source_shape=tuple(values['source_shape']),
            affine=tuple(tuple(row) for row in values['affine']),
            box=tuple(tuple(side) for side in values['box']),
            grid=tuple(values['grid']),
        )


def fit_geometry(
    lungs: np.ndarray,
    source_shape: Shape,
    affine: np.ndarray,
    grid: Shape,
    margin_mm: float = 4.0,
) -> Geometry:
    """The geometry that maps the box around the lungs onto the model's grid.

    Args:
        lungs: bool (Z, Y, X), canonical.
        source_shape: (X, Y, Z) of the file's array.
        affine: (4, 4) of the file.
        grid: (D, H, W) of the model.
        margin_mm: added on every side of the lungs, rounded down to whole voxels and cut off at
            the volume's edge; with 8 mm slices the default adds no slice.

    Raises:
        ValueError: no lung voxel at all.
    """
    box = []
    for axis, spacing in enumerate(canonical_spacing(affine)):
        others = tuple(other for other in range(3) if other != axis)
        inside = np.flatnonzero(lungs.any(axis=others))
        if not inside.size:
            raise ValueError('no lung voxel: there is no box to fit')
        margin = int(margin_mm / spacing)
        start = max(0, int(inside[0]) - margin)
        box.append((start, min(lungs.shape[axis], int(inside[-1]) + 1 + margin)))
    return Geometry(
        source_shape=tuple(int(length) for length in source_shape),
        affine=tuple(tuple(float(value) for value in row) for row in np.asarray(affine)),
        box=tuple(box),
        grid=tuple(int(length) for length in grid),
    )


def to_model_grid(
    array: np.ndarray,
    geometry: Geometry,
    weights: np.ndarray | None = None,
    clip: tuple[float, float] | None = None,
) -> np.ndarray:
    """Resamples a canonical study array onto the model's grid; outside the box it is 0.

    Linear interpolation. Its triangle is widened to the coarser of the two spacings, against
    aliasing. Weights are non-negative and sum to 1, so no value leaves the range of the input.

    Args:
        array: (Z, Y, X), canonical, any real type or bool.
        geometry: from `fit_geometry`.
        weights: None, or (Z, Y, X) in [0, 1], such as the lungs. The result is then the normalised
            convolution resample(array · weights) / resample(weights), and 0 where
            resample(weights) < 0.5: the chest wall does not bleed into the lungs' edge
            (Knutsson and Westin, CVPR 1993).
        clip: the lowest and highest value that are taken, before anything is weighed.

    Returns:
        float32 (D, H, W).

    Raises:
        ValueError: the array's shape is not the geometry's canonical shape.
    """
    matrices = _model_matrices(geometry)
    box = array[_box_slices(array, geometry)]
    if weights is None:
        return shrink(box, matrices, clip=clip)
    weights = weights[_box_slices(weights, geometry)]
    total = shrink(box, matrices, clip=clip, weights=weights)
    weight = shrink(weights, matrices)
    return np.divide(total, weight, out=np.zeros_like(total), where=weight >= 0.5)


def to_study_grid(
    array: np.ndarray,
    geometry: Geometry,
    *,
    deblur: bool = False,
    threshold: float | None = None,
) -> np.ndarray:
    """Brings a model array back onto the study's whole canonical grid, linearly.

    Args:
        array: (D, H, W), any real type or bool.
        geometry: from `fit_geometry`.
        deblur: for masks and probabilities that are to be thresholded. What the result would still
            lose on the way to the model's grid is added back (iterative back-projection; Irani and
            Peleg, CVGIP 53:231, 1991), so that a small lesion does not shrink: twice in plane, and
            once along depth, where more often lifts what one slice alone shows, and with it false
            marks (docs/results.md).
        threshold: for a mask of what reaches it, a quarter of the memory.

    Returns:
        float32 (Z, Y, X), 0 outside the box, in the range of the array; or with a threshold bool,
        False outside the box.

    Raises:
        ValueError: the array's shape is not the geometry's grid.
    """
    if array.shape != geometry.grid:
        raise ValueError(f'array of shape {array.shape} for the model grid {geometry.grid}')
    matrices = []
    for axis, forward in enumerate(_model_matrices(geometry)):
        model_mm, box_mm, spacing = _centres_mm(geometry, axis)
        linear = matrix = resampling_matrix(box_mm, model_mm, spacing)
        for _ in range(_TIMES_DEBLURRED[axis] if deblur else 0):
            matrix = matrix + linear @ (np.eye(len(forward), dtype=np.float32) - forward @ matrix)
        matrices.append(matrix)
    is_mask = threshold is not None
    result = np.zeros(geometry.canonical_shape, bool if is_mask else np.float32)
    box = result[_box_slices(result, geometry)]
    low, high = float(array.min()), float(array.max())
    for slices, values in enlarge(array, matrices):
        np.clip(values, low, high, out=values)
        box[slices] = values >= threshold if is_mask else values
    return result


def stretching_matrix(num_targets: int, num_sources: int) -> np.ndarray:
    """`resampling_matrix` between two grids over the same length, whatever its unit."""
    targets = (np.arange(num_targets) + 0.5) * num_sources / num_targets
    return resampling_matrix(targets, np.arange(num_sources) + 0.5, 1.0)


def resampling_matrix(
    targets_mm: np.ndarray, sources_mm: np.ndarray, spacing_mm: float
) -> np.ndarray:
    """Triangle weights that take samples from `sources_mm` to `targets_mm` along one axis.

    Args:
        targets_mm: (T,) evenly spaced centres.
        sources_mm: (S,) evenly spaced centres.
        spacing_mm: spacing of the sources.

    Returns:
        float32 (T, S), non-negative. A row sums to 1 where its target lies between the outer edges
        of the first and last source voxel, and is all 0 elsewhere.
    """
    step = abs(targets_mm[1] - targets_mm[0]) if len(targets_mm) > 1 else spacing_mm
    distance = np.abs(targets_mm[:, None] - sources_mm[None, :]) / max(step, spacing_mm)
    weights = np.maximum(0.0, 1.0 - distance)
    edge = spacing_mm / 2 * (1 + 1e-6)
    inside = (targets_mm > sources_mm[0] - edge) & (targets_mm < sources_mm[-1] + edge)
    weights /= np.maximum(weights.sum(axis=1, keepdims=True), 1e-12)
    return (weights * inside[:, None]).astype(np.float32)


def shrink(
    array: np.ndarray,
    matrices: list[np.ndarray],
    *,
    clip: tuple[float, float] | None = None,
    weights: np.ndarray | None = None,
) -> np.ndarray:
    """Resamples a (Z, Y, X) array of a study by one (target, source) matrix per axis, in the
    plane first and a few slices at a time: the study is never there as float32.

    `clip` bounds the values, `weights` (Z, Y, X) then multiply them. Returns float32.
    """
    depth, rows, columns = matrices
    planes = np.empty((array.shape[0], len(rows), len(columns)), np.float32)
    for slices in _slabs(array.shape):
        slab = array[slices].astype(np.float32)
        if clip is not None:
            np.clip(slab, *clip, out=slab)
        if weights is not None:
            slab *= weights[slices]
        planes[slices] = _in_plane(slab, rows, columns)
    return _in_depth(planes, depth)


def enlarge(array: np.ndarray, matrices: list[np.ndarray]) -> Iterator[tuple[slice, np.ndarray]]:
    """Resamples a (D, H, W) array to a study's grid by one (target, source) matrix per axis, in
    depth first. Yields a few slices of the result at a time: which, and their float32 values."""
    depth, rows, columns = matrices
    planes = _in_depth(array.astype(np.float32), depth)
    for slices in _slabs((len(depth), len(rows), len(columns))):
        yield slices, _in_plane(planes[slices], rows, columns)


def _slabs(shape: Shape) -> Iterator[slice]:
    """Neighbouring slices of such an array, as many at a time as _SLAB_VOXELS allow."""
    count = max(1, _SLAB_VOXELS // math.prod(shape[1:]))
    return (slice(start, start + count) for start in range(0, shape[0], count))


def _in_depth(array: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    flat = matrix @ array.reshape(array.shape[0], -1)
    return flat.reshape(len(matrix), *array.shape[1:])


def _in_plane(array: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    # The axis that shrinks most goes first, which leaves less for the other.
    if len(rows) * array.shape[2] < len(columns) * array.shape[1]:
        return _along_columns(_along_rows(array, rows), columns)
    return _along_rows(_along_columns(array, columns), rows)


def _along_rows(array: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    result = np.empty((array.shape[0], len(matrix), array.shape[2]), np.float32)
    for targets, sources in _bands(matrix):
        result[:, targets] = matrix[targets, sources] @ array[:, sources]
    return result


def _along_columns(array: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    result = np.empty((*array.shape[:2], len(matrix)), np.float32)
    for targets, sources in _bands(matrix):
        result[:, :, targets] = array[:, :, sources] @ matrix[targets, sources].T
    return result


def _bands(matrix: np.ndarray) -> Iterator[tuple[slice, slice]]:
    """Blocks of a (target, source) matrix outside of which it is 0: a target takes few sources."""
    for start in range(0, len(matrix), _BAND_TARGETS):
        targets = slice(start, min(start + _BAND_TARGETS, len(matrix)))
        used = np.flatnonzero(matrix[targets].any(axis=0))
        yield targets, slice(used[0], used[-1] + 1) if used.size else slice(0, 0)


def _centres_mm(geometry: Geometry, axis: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Voxel centres of the model's grid and of the box, in mm from the box's first edge, and the
    spacing of the former. Grid and box have the same middle."""
    length, study_spacing = np.diff(geometry.box[axis])[0], geometry.spacing_mm[axis]
    spacing = geometry.model_spacing_mm[axis]
    first = (length * study_spacing - geometry.grid[axis] * spacing) / 2
    model_mm = first + (np.arange(geometry.grid[axis]) + 0.5) * spacing
    return model_mm, (np.arange(length) + 0.5) * study_spacing, spacing


def _model_matrices(geometry: Geometry) -> list[np.ndarray]:
    return [
        resampling_matrix(*_centres_mm(geometry, axis)[:2], geometry.spacing_mm[axis])
        for axis in range(3)
    ]


def _box_slices(array: np.ndarray, geometry: Geometry) -> tuple[slice, ...]:
    if array.shape != geometry.canonical_shape:
        raise ValueError(
            f'array of shape {array.shape} for the canonical grid {geometry.canonical_shape}'
        )
    return tuple(slice(start, stop) for start, stop in geometry.box)
