"""A lung mask by threshold and morphology, and by a network where lungs are dense.

Consolidation is as dense as the chest wall, so a threshold loses it exactly where COVID-19 puts
it: at the pleura, lateral and posterior. Two closings bring back what leaves a dent: a small one
everywhere (vessels, fissures), and a wide one on the side of the ribs alone, where a healthy lung's
outline is convex. Medially, heart, spine and liver dent it. Where all the lung under some ribs is
dense, there is no dent, and `pleura` finds it by the ribs, or `lung_network` by all that a slice
shows.
"""

import cc3d
import numpy as np
from scipy import ndimage

from covseg_jax.imaging.geometry import SpacingMm
from covseg_jax.prepare.dense_lung import find_dense_lung
from covseg_jax.prepare.field_of_view import EDGE_VOXELS, find_border
from covseg_jax.prepare.lung_network import LungNetwork
from covseg_jax.prepare.pleura import TISSUE_HU, lung_under_ribs
from covseg_jax.prepare.slicewise import (
    between_lung,
    close_in_plane,
    components_at,
    dilate_in_plane,
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
from covseg_jax.prepare.two_lungs import SMALLER_LUNG, is_right, separate_lungs
from covseg_jax.prepare.working_grid import AIR_HU, from_working_grid, to_working_grid

GAS_HU = -960  # free air (room, stomach, trachea) lies below, parenchyma above
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
    coarse, coarse_mm, padding = to_working_grid(image_hu, spacing_mm)
    voxel_ml = float(np.prod(coarse_mm)) / 1000.0
    lungs = np.zeros(coarse.shape, bool)
    for lung in separate_lungs(_find_parenchyma(coarse, coarse_mm, padding), coarse_mm):
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
    return from_working_grid(lungs, image_hu.shape)


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


def _complete_lung(lung: np.ndarray, coarse: np.ndarray, spacing_mm: SpacingMm) -> np.ndarray:
    """One lung with what the threshold lost: vessels, holes, consolidation at the pleura."""
    box = find_box(lung)
    part, hu = lung[box], coarse[box]
    closed = _fill_holes(close_in_plane(part, CLOSING_MM, spacing_mm), spacing_mm)
    wide = close_in_plane(closed, RIB_SIDE_CLOSING_MM, spacing_mm)
    # The outline is straighter from top to bottom than round the chest: voxels with lung above and
    # below reach further out than the wide closing.
    lost = (wide & has_lung_below(closed, spacing_mm)) | between_lung(closed)
    lost &= _on_rib_side(closed, is_right=is_right(box, lung))
    # Bone is never lung.
    added = lost & ~closed & (hu < TISSUE_HU) & ~touches_border(lung)[box[0], None, None]
    added = dilate_in_plane(erode_in_plane(added))
    complete = _fill_holes(close_in_plane(closed | added, CLOSING_MM, spacing_mm), spacing_mm)
    rib_side = _on_rib_side(complete, is_right=is_right(box, lung))
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
