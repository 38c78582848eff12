"""Study grid <-> model grid, there and back.

Two steps. The file's axis order and flips are undone exactly: canonical arrays are (Z, Y, X) with
z to Superior, y to Posterior and x to Left, so that `array[z]` shown as an image is the
radiological view. Then the box around the lungs is mapped onto the model's grid by small
matrices, one an axis, in millimetres: in plane one scale for both axes, the shorter side padded.
"""

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
from nibabel import orientations

_CANONICAL = orientations.axcodes2ornt(('L', 'P', 'S'))


def to_canonical(data: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Turns a file's array (X, Y, Z) into the canonical view (Z, Y, X); nothing is copied.

    Oblique grids take the closest axes (nibabel's io_orientation); nothing is interpolated.

    Raises:
        ValueError: an array that is not 3D.
    """
    _require_3d(data)
    turn = orientations.ornt_transform(orientations.io_orientation(affine), _CANONICAL)
    return orientations.apply_orientation(data, turn).T


def from_canonical(array: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """The inverse of `to_canonical`: (Z, Y, X) back to the file's axis order (X, Y, Z), a view.

    Raises:
        ValueError: an array that is not 3D.
    """
    _require_3d(array)
    turn = orientations.ornt_transform(_CANONICAL, orientations.io_orientation(affine))
    return orientations.apply_orientation(array.T, turn)


def canonical_spacing(affine: np.ndarray) -> tuple[float, float, float]:
    """Voxel spacing (z, y, x) in mm of the canonical array that belongs to `affine` (4, 4)."""
    affine = np.asarray(affine, np.float64)
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    # io_orientation()[i] names the world axis (0 right-left, 1, 2) of the file's axis i.
    world_axes = orientations.io_orientation(affine)[:, 0].astype(int)
    x, y, z = lengths[np.argsort(world_axes)]
    return float(z), float(y), float(x)


@dataclass(frozen=True)
class Geometry:
    """How a study's grid and a model grid belong together.

    Attributes:
        source_shape: (X, Y, Z) of the file's array.
        affine: the file's (4, 4) affine, as tuples.
        box: ((z0, z1), (y0, y1), (x0, x1)), half-open, canonical voxels: the lungs and a margin.
        grid: (D, H, W) of the model.
    """

    source_shape: tuple[int, int, int]
    affine: tuple[tuple[float, ...], ...]
    box: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    grid: tuple[int, int, int]

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Spacing (z, y, x) of the canonical study array, mm."""
        return canonical_spacing(self.affine)

    @property
    def canonical_shape(self) -> tuple[int, int, int]:
        """(Z, Y, X) of the canonical study array."""
        world_axes = orientations.io_orientation(self.affine)[:, 0].astype(int)
        x, y, z = np.asarray(self.source_shape)[np.argsort(world_axes)]
        return int(z), int(y), int(x)

    @property
    def model_spacing_mm(self) -> tuple[float, float, float]:
        """Spacing (d, h, w) of the model grid, mm; h and w are equal.

        The box's slices fill the depth; in plane the longer side in mm fills its axis.
        """
        depth, height, width = (
            (stop - start) * spacing
            for (start, stop), spacing in zip(self.box, self.spacing_mm, strict=True)
        )
        in_plane = max(height / self.grid[1], width / self.grid[2])
        return depth / self.grid[0], in_plane, in_plane

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel of the model grid, ml."""
        return math.prod(self.model_spacing_mm) / 1000.0

    @property
    def study_voxel_ml(self) -> float:
        """Volume of one voxel of the study's own grid, ml."""
        return float(abs(np.linalg.det(np.asarray(self.affine)[:3, :3]))) / 1000.0

    def to_json(self) -> dict:
        """A dict of plain numbers and lists, for json.dump."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict) -> 'Geometry':
        """The Geometry that `to_json` described; json's lists are taken as the tuples they were.

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
    source_shape: tuple[int, int, int],
    affine: np.ndarray,
    grid: tuple[int, int, int],
    margin_mm: float = 4.0,
) -> Geometry:
    """The geometry that maps the box around the lungs onto the model's grid.

    Args:
        lungs: bool (Z, Y, X), canonical.
        source_shape: (X, Y, Z) of the file's array.
        affine: (4, 4) of the file.
        grid: (D, H, W) of the model.
        margin_mm: added on every side of the lungs, in whole voxels rounded down, and cut off
            at the volume's edge; with 8 mm slices the default adds none.

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
    array: np.ndarray, geometry: Geometry, weights: np.ndarray | None = None
) -> np.ndarray:
    """Resamples a canonical study array onto the model's grid.

    Linear interpolation, its triangle widened to the coarser of the two spacings, which is the
    anti-aliasing filter; weights are non-negative and sum to 1, so no value leaves the range of
    the input. Outside the box, 0.

    Args:
        array: (Z, Y, X), canonical, any real type or bool.
        geometry: from `fit_geometry`.
        weights: None, or (Z, Y, X) in [0, 1], such as the lungs: then the result is the
            normalised convolution resample(array · weights) / resample(weights), and 0 where
            resample(weights) < 0.5, so that no chest wall bleeds into the lungs' edge
            (Knutsson and Westin, CVPR 1993).

    Returns:
        float32 (D, H, W).

    Raises:
        ValueError: the array's shape is not the geometry's canonical shape.
    """
    matrices = _model_matrices(geometry)
    box = _box_slices(array, geometry)
    if weights is None:
        return apply_matrices(array[box].astype(np.float32), matrices)
    weights = weights[_box_slices(weights, geometry)].astype(np.float32)
    total = apply_matrices(array[box] * weights, matrices)
    weight = apply_matrices(weights, matrices)
    return np.divide(total, weight, out=np.zeros_like(total), where=weight >= 0.5)


def to_study_grid(array: np.ndarray, geometry: Geometry, order: str = 'linear') -> np.ndarray:
    """Brings a model array back onto the study's whole canonical grid.

    Args:
        array: (D, H, W), any real type or bool.
        geometry: from `fit_geometry`.
        order: 'linear'; 'deblurred' for masks and probabilities that are to be cut: linear, and
            then what the way to the model's grid would still differ by is added back, four times
            (iterative back-projection; Irani and Peleg, CVGIP 53:231, 1991), so that a lesion of
            few slices does not shrink.

    Returns:
        float32 (Z, Y, X), 0 outside the box, in the range of the array.

    Raises:
        ValueError: the array's shape is not the geometry's grid, or another order.
    """
    if array.shape != geometry.grid:
        raise ValueError(f'array of shape {array.shape} for the model grid {geometry.grid}')
    if order not in ('linear', 'deblurred'):
        raise ValueError(f"order {order!r}: 'linear' or 'deblurred'")
    matrices = []
    for axis, forward in enumerate(_model_matrices(geometry)):
        centres_mm, spacing = _centres_in_box(geometry, axis)
        linear = resampling_matrix(_box_centres(geometry, axis), centres_mm, spacing)
        matrix = linear
        if order == 'deblurred':
            for _ in range(4):
                matrix = matrix + linear @ (
                    np.eye(len(forward), dtype=np.float32) - forward @ matrix
                )
        matrices.append(matrix)
    result = np.zeros(geometry.canonical_shape, np.float32)
    array = array.astype(np.float32)
    resampled = apply_matrices(array, matrices)
    result[_box_slices(result, geometry)] = np.clip(resampled, array.min(), array.max())
    return result


def resampling_matrix(
    targets_mm: np.ndarray, sources_mm: np.ndarray, spacing_mm: float
) -> np.ndarray:
    """Rows of triangle weights that take samples at `sources_mm` to `targets_mm` along one axis.

    Args:
        targets_mm: (T,) evenly spaced centres.
        sources_mm: (S,) evenly spaced centres.
        spacing_mm: spacing of the sources.

    Returns:
        float32 (T, S), non-negative; a row sums to 1 where its target lies between the outer
        edges of the first and last source voxel, and is all 0 elsewhere.
    """
    step = abs(targets_mm[1] - targets_mm[0]) if len(targets_mm) > 1 else spacing_mm
    distance = np.abs(targets_mm[:, None] - sources_mm[None, :]) / max(step, spacing_mm)
    weights = np.maximum(0.0, 1.0 - distance)
    edge = spacing_mm / 2 * (1 + 1e-6)
    inside = (targets_mm > sources_mm[0] - edge) & (targets_mm < sources_mm[-1] + edge)
    weights /= np.maximum(weights.sum(axis=1, keepdims=True), 1e-12)
    return (weights * inside[:, None]).astype(np.float32)


def apply_matrices(array: np.ndarray, matrices: list[np.ndarray]) -> np.ndarray:
    """Resamples a float32 (Z, Y, X) array by one (target, source) matrix an axis.

    The axis that shrinks most goes first: less is left for the others.
    """
    for axis in sorted(range(3), key=lambda axis: matrices[axis].shape[0] / array.shape[axis]):
        matrix = matrices[axis]
        if axis == 2:
            array = array @ matrix.T
        elif axis == 1:
            array = matrix @ array
        else:
            rows = matrix @ array.reshape(array.shape[0], -1)
            array = rows.reshape(len(matrix), *array.shape[1:])
    return array


def _box_centres(geometry: Geometry, axis: int) -> np.ndarray:
    # Voxel centres of the box, mm from the box's first edge.
    start, stop = geometry.box[axis]
    return (np.arange(stop - start) + 0.5) * geometry.spacing_mm[axis]


def _centres_in_box(geometry: Geometry, axis: int) -> tuple[np.ndarray, float]:
    # Centres of the model's voxels on the same ruler; box and grid share their middle.
    start, stop = geometry.box[axis]
    length_mm = (stop - start) * geometry.spacing_mm[axis]
    spacing = geometry.model_spacing_mm[axis]
    first = (length_mm - geometry.grid[axis] * spacing) / 2
    return first + (np.arange(geometry.grid[axis]) + 0.5) * spacing, spacing


def _model_matrices(geometry: Geometry) -> list[np.ndarray]:
    return [
        resampling_matrix(
            _centres_in_box(geometry, axis)[0],
            _box_centres(geometry, axis),
            geometry.spacing_mm[axis],
        )
        for axis in range(3)
    ]


def _box_slices(array: np.ndarray, geometry: Geometry) -> tuple[slice, slice, slice]:
    if array.shape != geometry.canonical_shape:
        raise ValueError(
            f'array of shape {array.shape} for the canonical grid {geometry.canonical_shape}'
        )
    return tuple(slice(start, stop) for start, stop in geometry.box)


def _require_3d(array: np.ndarray) -> None:
    if array.ndim != 3:
        raise ValueError(f'a 3D array is wanted, not one of shape {array.shape}')
