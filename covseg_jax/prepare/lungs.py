"""A lung mask by threshold and morphology, and by a network where lungs are dense.

Consolidation is as dense as the chest wall, so a threshold loses it exactly where COVID-19 puts
it: at the pleura, lateral and posterior. Two closings bring back what leaves a dent: a small one
everywhere (vessels, fissures), and a wide one on the side of the ribs alone, where a healthy lung's
outline is convex. Medially, heart, spine and liver dent it. Where all the lung under some ribs is
dense, there is no dent, and `pleura` finds it by the ribs, or `lung_network` by all that a slice
shows.
"""

import cc3d
import edt
import numpy as np
from scipy import ndimage

from covseg_jax.imaging.geometry import Shape, SpacingMm, enlarge, shrink, stretching_matrix
from covseg_jax.prepare.dense_lung import find_dense_lung
from covseg_jax.prepare.field_of_view import EDGE_VOXELS, find_border, find_padding
from covseg_jax.prepare.lung_network import LungNetwork
from covseg_jax.prepare.pleura import TISSUE_HU, lung_under_ribs
from covseg_jax.prepare.slicewise import (
    between_lung,
    close_in_plane,
    components_at,
    dilate_in_plane,
    distance_in_plane,
    erode_in_plane,
    fill_cavities,
    find_box,
    has_lung_below,
    label_in_plane,
    open_in_plane,
    sweep,
    touches_border,
    volumes_and_means,
)

AIR_HU = -320  # between parenchyma and soft tissue; the common threshold for lungs
GAS_HU = -960  # free air (room, stomach, trachea) lies below, parenchyma above
WORKING_MM = 2.0
CLIP_HU = (-1024, 400)
ADULT_ML = 300.0  # of both lungs: fewer are a child's, or a part of the lungs
# Lungs of fewer ml, a child's or those of a few slices, have at least this share of the patient in
# their slices: 0.08 to 0.5 of it; the bowel gas of an abdomen less.
LEAST_SHARE = 0.05
CLOSING_MM = 10.0
RIB_SIDE_CLOSING_MM = 50.0
DENSE_HU = -150  # soft tissue and consolidation lie above, ground glass below
MAXIMUM_HOLE_CM2 = 20.0
TRACHEA_CM2 = 8.0
TRACHEA_HU = -910
GAS_SHARE = 0.25  # of the air in a corner of the room lies below GAS_HU
# Free gas that touches a lung, smoothed, in the mean, its radius and volume. Emphysema has about
# -965 in the mean.
DARK_HU, STOMACH_HU, STOMACH_MM, STOMACH_ML = -950, -975, 6.0, 20.0
RIM_VOXELS = 3
EMPHYSEMA_SHARE = 0.5  # of a lung lies below it, at most
# Of a lung that the circle cuts into lies between parts of the body: 0.31 to 1 in three scans and
# three circles; of the air under the back 0 to 0.25, beside the arms up to 0.5.
BETWEEN_SHARE = 0.3
# The same of a lung in the corner of a cropped scan: 0.05 at least; under the back at most 0.02.
CORNER_SHARE = 0.03
WALL_VOXELS = 10
SMALLER_LUNG = 0.1  # of the larger lung: the least that a collapsed lung keeps
EROSIONS_MM = (2.0, 4.0, 7.0, 11.0, 16.0, 22.0)
ACROSS_WEIGHT = 3.0  # of the distance across, when a piece is given to a lung
BESIDE_MM = 30.0  # the other lung's centroid lies further to the side, a piece of the same less far

# Array axes: 0 z to Superior, 1 y to Posterior, 2 x to Left.


def find_lungs(
    image_hu: np.ndarray, spacing_mm: SpacingMm, network: LungNetwork | None = None
) -> np.ndarray:
    """Both lungs with their vessels, ground glass and, at the pleura, consolidation.

    Works at about 2 mm and returns the study's own grid. Lungs that touch the border of the image
    (a cropped scan) are kept: density tells them from what lies outside the body.

    Args:
        image_hu: (Z, Y, X) canonical, HU; padding may be below -1024.
        spacing_mm: (z, y, x).
        network: adds lung that is dense, where it sees some beside what was found without it.

    Returns:
        bool (Z, Y, X).

    Raises:
        ValueError: no lungs found, or less than 300 ml together that are less than 5 % of the
            patient in their slices.
    """
    coarse, coarse_mm, padding = _to_working_grid(image_hu, spacing_mm)
    voxel_ml = float(np.prod(coarse_mm)) / 1000.0
    lungs = np.zeros(coarse.shape, bool)
    for lung in _separate_lungs(_find_parenchyma(coarse, coarse_mm, padding), coarse_mm):
        lungs |= _complete_lung(lung, coarse, coarse_mm)
    if lungs.any():
        lungs |= lung_under_ribs(lungs, coarse, coarse_mm)
    if lungs.any() and network is not None:
        lungs |= find_dense_lung(network, image_hu, spacing_mm, lungs, coarse, coarse_mm)
    lungs &= ~padding
    volume_ml = lungs.sum() * voxel_ml
    slices = lungs.any(axis=(1, 2))
    tissue_ml = (coarse[slices] >= AIR_HU)[~padding[slices]].sum() * voxel_ml
    share = volume_ml / max(volume_ml + tissue_ml, voxel_ml)
    if volume_ml == 0 or (volume_ml < ADULT_ML and share < LEAST_SHARE):
        raise ValueError(
            f'no lungs found ({volume_ml:.0f} ml of lung-like voxels, {100 * share:.0f} % of their '
            f'slices; at least {ADULT_ML:.0f} ml or {100 * LEAST_SHARE:.0f} % are expected)'
        )
    return _to_study_grid(lungs, image_hu.shape)


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
        (right if _is_right(find_box(lungs), lungs) else left)[around] = part
        return right, left
    cores = sorted(cores, key=lambda core: np.flatnonzero(core.any(axis=(0, 1))).mean())
    on_right = _assign_pieces(coarse, *cores, coarse_mm)
    on_right = on_right[nearest_voxels(part.shape, coarse_shape)]
    right[around], left[around] = part & on_right, part & ~on_right
    return right, left


def find_lungs_by_lungmask(image_hu: np.ndarray) -> np.ndarray:
    """Both lungs, bool (Z, Y, X), by the R231 network of the `lungmask` package (Hofmanninger et
    al., 2020), which fetches its weights on first use. The image is as for `find_lungs`.

    Raises:
        ModuleNotFoundError: the package is not installed.
        ValueError: it finds no lungs.
    """
    from lungmask import LMInferer

    lungs = LMInferer(modelname='R231', tqdm_disable=True).apply(np.ascontiguousarray(image_hu)) > 0
    if not lungs.any():
        raise ValueError('no lungs found (by lungmask)')
    return lungs


def _to_working_grid(
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


def _to_study_grid(mask: np.ndarray, shape: Shape) -> np.ndarray:
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


def _find_parenchyma(coarse: np.ndarray, spacing_mm: SpacingMm, padding: np.ndarray) -> np.ndarray:
    """The one or two largest components of air inside the body that are not free gas."""
    air = coarse < AIR_HU
    # What a mixture with dense padding is, is not known.
    tissue = ~air & ~dilate_in_plane(padding & ~air, EDGE_VOXELS)
    # Without the table's shell, but with the walls that the edge of view leaves thin, and those of
    # a single slice, which nothing above or below holds together.
    body = _largest_component(dilate_in_plane(erode_in_plane(~air, 2), 2)) & tissue
    body = dilate_in_plane(body, WALL_VOXELS, within=tissue)
    air &= ~padding
    # A lung sees the body on four sides, in the corner of a cropped scan still on two; the air
    # under the back sees it in front only.
    right, left, front, back = _look_around(body)
    enclosed = _sum_masks(right, left, front, back) >= 2
    # Under a round back it sees the body on two sides, but not on opposite ones.
    between = (right & left) | (front & back)
    inside = {0.5: enclosed, CORNER_SHARE: between}
    air &= ~_outside_body(coarse, air, inside, find_border(air.shape), GAS_SHARE)
    if padding.any():
        at_padding = dilate_in_plane(padding, EDGE_VOXELS)
        inside = {0.5: enclosed, BETWEEN_SHARE: between}
        air &= ~_outside_body(coarse, air, inside, at_padding, EMPHYSEMA_SHARE)
    air &= ~_trachea(coarse, air, spacing_mm)
    air &= ~_stomach(coarse, air, spacing_mm)
    components = cc3d.connected_components(air, connectivity=6)
    return _choose_lungs(components, coarse, enclosed)


def _stomach(coarse: np.ndarray, air: np.ndarray, spacing_mm: SpacingMm) -> np.ndarray:
    """Gas under a lung that a thin wall does not part from it: stomach or bowel. Bullae, as dark,
    have lung below."""
    least = STOMACH_ML * 1000 / np.prod(spacing_mm)
    gas, stomach = np.zeros_like(air), np.zeros_like(air)
    if not air.any():
        return stomach
    box = find_box(air)
    smooth = ndimage.uniform_filter(coarse[box].astype(np.float32), (1, 3, 3))
    dark = air[box] & (smooth < DARK_HU)
    if np.count_nonzero(dark) < least:
        return stomach
    gas[box] = open_in_plane(dark, STOMACH_MM, spacing_mm)
    labels = cc3d.connected_components(gas, connectivity=6)
    volumes, means = volumes_and_means(labels, coarse)
    for label in np.flatnonzero((volumes >= least) & (means < STOMACH_HU)):
        part = labels == label
        # Its rim is mixed with its wall, in the slice, above and below.
        around = part.copy()
        around[:-1] |= part[1:]
        around[1:] |= part[:-1]
        around = dilate_in_plane(around, RIM_VOXELS)
        others = cc3d.connected_components(air & ~around, connectivity=6)
        is_larger = np.bincount(others.ravel()) > volumes[label]  # lung, and no other bowel
        is_larger[0] = False
        if _is_under(part, is_larger[others]):
            stomach |= around
    return stomach & air


def _choose_lungs(components: np.ndarray, coarse: np.ndarray, enclosed: np.ndarray) -> np.ndarray:
    volumes, means = volumes_and_means(components, coarse)
    chosen = []
    for label in np.argsort(volumes)[::-1][:8]:
        # Bowel gas may compete with the other lung, but most of it is smaller.
        if volumes[label] == 0 or (chosen and volumes[label] < SMALLER_LUNG * volumes[chosen[0]]):
            break
        part = components == label
        # Blankets and foam in the table have the density of lung, but no body around them. The rim
        # of gas is partial volume: the median tells gas where the mean does not.
        is_gas = min(means[label], np.median(coarse[part])) <= GAS_HU
        if is_gas or enclosed[part].mean() <= 0.5:
            continue
        # Both lungs may be one component; what lies under it is stomach or bowel.
        if chosen and _is_under(part, components == chosen[0]):
            continue
        chosen.append(label)
        if len(chosen) == 2:
            break
    is_lung = np.zeros(len(volumes), bool)
    is_lung[chosen] = True
    return is_lung[components]


def _is_under(part: np.ndarray, lungs: np.ndarray) -> bool:
    """Whether most of a part has lung above it, and next to nothing of it lung below."""
    above, below = sweep(lungs, 0, backwards=True), sweep(lungs, 0)
    return above[part].mean() > 0.5 and below[part].mean() < 0.1


def _largest_component(mask: np.ndarray) -> np.ndarray:
    components = cc3d.connected_components(mask, connectivity=6)
    volumes = np.bincount(components.ravel())
    volumes[0] = 0
    is_largest = np.zeros(len(volumes), bool)
    is_largest[volumes.argmax()] = volumes.any()
    return is_largest[components]


def _look_around(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Voxels that see the mask in their slice to the right, to the left, in front and behind."""
    return (
        sweep(mask, 2),
        sweep(mask, 2, backwards=True),
        sweep(mask, 1),
        sweep(mask, 1, backwards=True),
    )


def _sum_masks(*masks: np.ndarray) -> np.ndarray:
    return sum(mask.view(np.uint8) for mask in masks)


def _outside_body(
    coarse: np.ndarray,
    air: np.ndarray,
    inside: dict[float, np.ndarray],
    edge: np.ndarray,
    gas_share: float,
) -> np.ndarray:
    """Parts of the air, in a slice, that reach the edge, and of which more than a share is free gas
    or no more than another share lies in the mask `inside` that belongs to it."""
    # Slice by slice, because the trachea of a scan that ends in the neck would join both. In a crop
    # a lung may touch the border too, and a corner of the room sees the body on two sides: neither
    # tells alone.
    components = label_in_plane(air)
    is_outside = volumes_and_means(components, coarse < GAS_HU)[1] > gas_share
    for share, mask in inside.items():
        is_outside |= volumes_and_means(components, mask)[1] <= share
    return components_at(components, edge) & is_outside[components]


def _trachea(coarse: np.ndarray, air: np.ndarray, spacing_mm: SpacingMm) -> np.ndarray:
    # Trachea and main bronchi: in a slice, small spots of gas apart from the lungs.
    components = label_in_plane(air)
    areas_cm2 = np.bincount(components.ravel()) * spacing_mm[1] * spacing_mm[2] / 100.0
    is_small = areas_cm2 < TRACHEA_CM2
    is_small[0] = False
    z, y, x = np.nonzero(is_small[components])
    # Of two voxels by two: noise alone is less dark.
    above, left = np.maximum(y - 1, 0), np.maximum(x - 1, 0)
    hu = (coarse[z, y, x] + coarse[z, above, x] + coarse[z, y, left] + coarse[z, above, left]) / 4
    # The minimum, not the mean: the rim of a small tube is partial volume.
    darkest = np.full(len(is_small), np.inf)
    np.minimum.at(darkest, components[z, y, x], hu)
    return (darkest < TRACHEA_HU)[components]


def _separate_lungs(parenchyma: np.ndarray, spacing_mm: SpacingMm) -> list[np.ndarray]:
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


def _complete_lung(lung: np.ndarray, coarse: np.ndarray, spacing_mm: SpacingMm) -> np.ndarray:
    """One lung with what the threshold lost: vessels, holes, consolidation at the pleura."""
    box = find_box(lung)
    part, hu = lung[box], coarse[box]
    closed = _fill_holes(close_in_plane(part, CLOSING_MM, spacing_mm), spacing_mm)
    wide = close_in_plane(closed, RIB_SIDE_CLOSING_MM, spacing_mm)
    # The outline is straighter from top to bottom than round the chest: voxels with lung above and
    # below reach further out than the wide closing.
    lost = (wide & has_lung_below(closed, spacing_mm)) | between_lung(closed)
    lost &= _on_rib_side(closed, is_right=_is_right(box, lung))
    # Bone is never lung.
    added = lost & ~closed & (hu < TISSUE_HU) & ~touches_border(lung)[box[0], None, None]
    added = dilate_in_plane(erode_in_plane(added))
    complete = _fill_holes(close_in_plane(closed | added, CLOSING_MM, spacing_mm), spacing_mm)
    rib_side = _on_rib_side(complete, is_right=_is_right(box, lung))
    result = np.zeros_like(lung)
    result[box] = complete & ~_mediastinal(complete, hu, rib_side)
    return result


def _mediastinal(lung: np.ndarray, hu: np.ndarray, rib_side: np.ndarray) -> np.ndarray:
    """What the closings took from heart, aorta and hilum: dense, thick, and connected in its slice
    to dense tissue outside the lung, away from the ribs."""
    dense = hu > DENSE_HU
    thick = dilate_in_plane(erode_in_plane(dense & lung, 2), 2)
    thick = dilate_in_plane(thick, 2, within=dense & lung)
    return components_at(label_in_plane(thick), dilate_in_plane(dense & ~lung & ~rib_side))


def _is_right(box: tuple[slice, ...], lung: np.ndarray) -> bool:
    # x grows to the patient's left.
    return (box[2].start + box[2].stop) / 2 < lung.shape[2] / 2


def _on_rib_side(lung: np.ndarray, *, is_right: bool) -> np.ndarray:
    """Voxels with this lung medial to them and none lateral, or in front of them and none behind.

    The second rule holds for the posterior half of the slice's lung alone, because the liver lies
    behind the anterior recess too.
    """
    # x grows to the patient's left.
    medial, lateral = sweep(lung, 2, backwards=is_right), sweep(lung, 2, backwards=not is_right)
    in_front, behind = sweep(lung, 1), sweep(lung, 1, backwards=True)
    rows = np.arange(lung.shape[1])[None, :]
    areas = lung.sum(axis=2)
    centre = (areas * rows).sum(axis=1) / np.maximum(areas.sum(axis=1), 1)
    posterior = rows > centre[:, None]
    return (medial & ~lateral) | (in_front & ~behind & posterior[:, :, None])


def _fill_holes(mask: np.ndarray, spacing_mm: SpacingMm) -> np.ndarray:
    """Fills closed cavities, and, up to 20 cm² a slice, what sees the lung on all four sides in its
    slice and below it.

    That need not be a closed hole: the rim of lung between a consolidation and the pleura may be
    too thin to see. The liver's dome has no lung below.
    """
    filled = fill_cavities(mask)
    surrounded = ~filled & np.logical_and.reduce(_look_around(filled)) & sweep(filled, 0)
    holes = label_in_plane(surrounded)
    areas_cm2 = np.bincount(holes.ravel()) * spacing_mm[1] * spacing_mm[2] / 100.0
    fill = areas_cm2 < MAXIMUM_HOLE_CM2
    fill[0] = False
    return filled | fill[holes]
