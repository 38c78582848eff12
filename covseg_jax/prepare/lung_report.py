"""What a study's lungs amount to, and what is doubtful about them or their scan."""

import math
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from covseg_jax.imaging.geometry import SpacingMm
from covseg_jax.prepare.field_of_view import find_border, find_padding
from covseg_jax.prepare.lungs import ADULT_ML
from covseg_jax.prepare.slicewise import (
    dilate_in_plane,
    erode_in_plane,
    label_in_plane,
    volumes_and_means,
)
from covseg_jax.prepare.two_lungs import split_lungs
from covseg_jax.prepare.working_grid import nearest_voxels, working_grid

REPORT_MM = 4.0  # voxels that tell all of this, in a tenth of the time of 2 mm
MOST_ML = 9000.0  # together: the largest adults hold about as much
SMALLER_SHARE = 0.2  # of the larger lung
SLICE_CM2 = 1.0  # of lung on the first or last slice; less is noise
CUT_SHARE = 0.05  # of the lungs' outline, at the edge of the field of view
THICKEST_MM = 10.0
# Of the darkest percent of a scan. A crop may hold no free air but in small bronchi, and lungs
# alone have about -850.
AIR_HU = (-1150.0, -750.0)
# Of the trachea and the main bronchi in a slice: density, area, distance from the middle of both
# lungs.
AIRWAY_HU = -700
AIRWAY_CM2 = (0.6, 8.0)
AIRWAY_MM = 30.0
LEAST_HEIGHT_MM = 60.0  # of lungs whose upper and lower third differ
# Slices of a third of the lungs in which they are seen. In the upper one 0.1 to 1 of 18 upright
# scans and phantoms, in the lower one up to 0.13; of 8 scans that are upside down 0, and 0.4 to 1.
WITH_AIRWAYS, WITHOUT_AIRWAYS = 0.3, 0.05
_MASK = 'look at the mask, or give a lung mask with prepare.lungs_source=file'


@dataclass(frozen=True)
class LungReport:
    """Volumes of either lung, and a note of one line for each thing that is doubtful: the fault,
    and what to do."""

    right_ml: float
    left_ml: float
    notes: tuple[str, ...]


def describe_lungs(
    lungs: np.ndarray, image_hu: np.ndarray, spacing_mm: SpacingMm, voxel_ml: float | None = None
) -> LungReport:
    """Volumes and doubts of a study's lungs, whatever found them.

    Args:
        lungs: bool (Z, Y, X), canonical, not empty.
        image_hu: (Z, Y, X), HU.
        spacing_mm: (z, y, x).
        voxel_ml: volume of a voxel, less than the product of spacing_mm where a scan is tilted;
            None is that product.
    """
    if voxel_ml is None:
        voxel_ml = math.prod(spacing_mm) / 1000.0
    right_ml, left_ml = measure_lungs(lungs, spacing_mm, voxel_ml)
    shape, coarse_mm = working_grid(lungs.shape, spacing_mm, REPORT_MM)
    nearest = nearest_voxels(shape, lungs.shape)
    coarse, image = lungs[nearest], image_hu[nearest]
    padding = find_padding(image)
    notes = (
        *_note_volumes(right_ml, left_ml),
        *_note_limits(coarse, padding, coarse_mm),
        *_note_orientation(coarse, image, coarse_mm),
        *_note_scan(image, padding, spacing_mm),
    )
    return LungReport(right_ml, left_ml, notes)


def measure_lungs(lungs: np.ndarray, spacing_mm: SpacingMm, voxel_ml: float) -> tuple[float, float]:
    """Volumes of the right and the left lung, ml. Their sum is exact, and either is to about 1 %.

    Args:
        lungs: bool (Z, Y, X), canonical.
        spacing_mm: (z, y, x).
        voxel_ml: volume of a voxel.
    """
    shape, coarse_mm = working_grid(lungs.shape, spacing_mm, REPORT_MM)
    right, left = split_lungs(lungs[nearest_voxels(shape, lungs.shape)], coarse_mm)
    share = np.count_nonzero(right) / max(1, np.count_nonzero(right) + np.count_nonzero(left))
    total_ml = float(np.count_nonzero(lungs)) * voxel_ml
    return float(total_ml * share), float(total_ml * (1 - share))


def _note_volumes(right_ml: float, left_ml: float) -> list[str]:
    notes = []
    (small_ml, small), (large_ml, large) = sorted([(right_ml, 'right'), (left_ml, 'left')])
    if small_ml == 0:
        notes.append(f'no {small} lung was found; {_MASK}')
    elif small_ml < SMALLER_SHARE * large_ml:
        notes.append(
            f'the {small} lung has {small_ml:.0f} ml, the {large} one {large_ml:.0f} ml; {_MASK}'
        )
    total_ml = right_ml + left_ml
    if total_ml < ADULT_ML:
        notes.append(
            f'the lungs have {total_ml:.0f} ml, fewer than {ADULT_ML:.0f} ml; good for a child or '
            f'a few slices alone: else {_MASK}'
        )
    if total_ml > MOST_ML:
        notes.append(
            f'the lungs have {total_ml:.0f} ml, more than any; check the voxel size in the header, '
            f'and {_MASK}'
        )
    return notes


def _note_limits(lungs: np.ndarray, padding: np.ndarray, spacing_mm: SpacingMm) -> list[str]:
    """What the scan's ends and its field of view cut off."""
    notes = []
    scanned = np.flatnonzero(~padding.all(axis=(1, 2)))
    areas_cm2 = lungs.sum(axis=(1, 2)) * spacing_mm[1] * spacing_mm[2] / 100.0
    ends = {'lowest': areas_cm2[scanned[0]], 'highest': areas_cm2[scanned[-1]]}
    reached = [name for name, area_cm2 in ends.items() if area_cm2 >= SLICE_CM2]
    if reached:
        notes.append(
            f'the lungs reach the {" and the ".join(reached)} slice; what lies beyond was not '
            'scanned, and volumes leave it out'
        )
    outline = lungs & ~erode_in_plane(lungs)
    edge = dilate_in_plane(padding) | find_border(padding.shape)
    share = np.count_nonzero(outline & edge) / max(1, np.count_nonzero(outline))
    if share > CUT_SHARE:
        notes.append(
            f'the field of view cuts off {100 * share:.0f} % of the outline of the lungs; '
            'reconstruct the scan with a larger one, or expect volumes that leave that part out'
        )
    return notes


def _note_orientation(lungs: np.ndarray, image_hu: np.ndarray, spacing_mm: SpacingMm) -> list[str]:
    """Whether the trachea lies at the lower end of the lungs."""
    if not lungs.any():  # fewer voxels than the coarse grid shows
        return []
    ends = [np.flatnonzero(lungs.any(axis=axes))[[0, -1]] for axes in ((1, 2), (0, 2), (0, 1))]
    first, last = ends[0]
    if (last + 1 - first) * spacing_mm[0] < LEAST_HEIGHT_MM:
        return []
    part = slice(first, last + 1)
    labels = label_in_plane((image_hu[part] < AIRWAY_HU) & ~lungs[part])
    _, rows, columns = np.ogrid[tuple(slice(length) for length in labels.shape)]
    areas, row = volumes_and_means(labels, np.broadcast_to(rows, labels.shape))
    _, column = volumes_and_means(labels, np.broadcast_to(columns, labels.shape))
    areas_cm2 = areas * spacing_mm[1] * spacing_mm[2] / 100.0
    is_airway = (areas_cm2 >= AIRWAY_CM2[0]) & (areas_cm2 <= AIRWAY_CM2[1])
    is_airway &= (row > ends[1][0]) & (row < ends[1][1])
    is_airway &= np.abs(column - ends[2].mean()) * spacing_mm[2] <= AIRWAY_MM
    is_airway[0] = False
    seen = is_airway[labels].any(axis=(1, 2))
    third = len(seen) // 3
    if third < 1:
        return []
    if seen[:third].mean() < WITH_AIRWAYS or seen[len(seen) - third :].mean() > WITHOUT_AIRWAYS:
        return []
    return [
        'the trachea lies at the lower end of the lungs, as if feet and head were swapped; correct '
        'the orientation in the header: dense lung is found by what lies below it'
    ]


def _note_scan(image_hu: np.ndarray, padding: np.ndarray, spacing_mm: SpacingMm) -> list[str]:
    notes = []
    if spacing_mm[0] > THICKEST_MM:
        notes.append(
            f'slices of {spacing_mm[0]:.3g} mm, thicker than {THICKEST_MM:.0f} mm, hide small '
            'lesions; take thinner ones where there are such'
        )
    # The mean of nine voxels: of single ones the darkest percent are noise.
    mean_hu = ndimage.uniform_filter(image_hu.astype(np.float32), (1, 3, 3))
    seen = mean_hu[~dilate_in_plane(padding)]
    air_hu = float(np.percentile(seen, 1)) if seen.size else 0.0
    if not AIR_HU[0] <= air_hu <= AIR_HU[1]:
        notes.append(
            f'air has {air_hu:.0f} HU, where about -1000 is expected: the values are shifted, '
            'scaled or clipped; give the original CT in HU'
        )
    return notes
