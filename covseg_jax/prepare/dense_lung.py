"""What a network adds to lungs that were found by threshold: lung that is as dense as the chest
wall, and the edge of what is dense.

The network takes muscle, spleen, liver and stomach for dense lung, too. So what it sees counts
where such lung can be: with lung below, below the shoulders. Elsewhere it counts where it is
likely, beside lung, and no larger than the lung beside it.
"""

import cc3d
import numpy as np

from covseg_jax.imaging.geometry import SpacingMm
from covseg_jax.prepare.lung_network import LungNetwork, to_grid
from covseg_jax.prepare.pleura import SHOULDER, TISSUE_HU, local_lung_hu
from covseg_jax.prepare.slicewise import (
    between_lung,
    components_at,
    dilate_by_disk,
    dilate_in_plane,
    has_lung_below,
    label_in_plane,
    open_in_plane,
    volumes_and_means,
)

LUNG = 0.4  # probability from which the network's lung counts
LEAST_MM = 3.0  # radius of what it may add: thinner is the chest wall's edge
ALONE, ALONE_ML = 0.85, 5.0  # mean probability and volume of lung apart from all that has air
LIKELY = 0.8  # mean probability of lung, in a slice, where the place speaks against it
BESIDE_MM = 3.0  # from such lung to other lung of its slice, at most
FEW_SLICES_MM = 60.0  # from the lowest to the highest
# Denser lung, ground glass, has an edge that the threshold puts too far inside, or none: there the
# network's lung counts however thin it is, as far as EDGE_VOXELS. Healthy lungs have -900 to -700.
EDGE_HU = -600
EDGE_VOXELS = 2


def find_dense_lung(
    network: LungNetwork,
    image_hu: np.ndarray,
    spacing_mm: SpacingMm,
    lungs: np.ndarray,
    coarse: np.ndarray,
    coarse_mm: SpacingMm,
) -> np.ndarray:
    """What to add to the lungs, of what the network sees in their slices; bone is never lung.

    Args:
        network: the lung network.
        image_hu: (Z, Y, X) canonical, HU.
        spacing_mm: its (z, y, x).
        lungs: bool (z, y, x), not empty, over the same extent.
        coarse: (z, y, x), the image on their grid.
        coarse_mm: its spacing.

    Returns:
        bool (z, y, x).
    """
    first, last = np.flatnonzero(lungs.any(axis=(1, 2)))[[0, -1]]
    part = slice(first, last + 1)
    inside, hu = lungs[part], coarse[part]
    # It looks at these slices alone, which is what takes its time.
    ratio = image_hu.shape[0] / lungs.shape[0]  # at least 1
    looked_at = image_hu[round(first * ratio) : round((last + 1) * ratio)]
    probability = to_grid(network.probability(looked_at, spacing_mm), inside.shape)
    seen = (probability > LUNG) & (hu < TISSUE_HU)
    # Of a scan of a few slices nobody knows what lies below.
    has_few = lungs.shape[0] * coarse_mm[0] < FEW_SLICES_MM
    shoulder = inside.shape[0] if has_few else max(1, round(SHOULDER * (last - first)))
    if has_few:
        expected = np.ones_like(inside)
    else:
        expected = has_lung_below(inside, coarse_mm) | between_lung(inside)
        expected[shoulder:] = False
    added = open_in_plane(seen & expected & ~inside, LEAST_MM, coarse_mm)
    elsewhere = open_in_plane(seen & ~inside & ~added, LEAST_MM, coarse_mm)
    elsewhere = _likely_beside(elsewhere, inside, inside | added, probability, coarse_mm)
    # A lobe without air need not touch any lung with air.
    labels = cc3d.connected_components(added | elsewhere, connectivity=6)
    volumes, means = volumes_and_means(labels, probability)
    alone = (means > ALONE) & (volumes * np.prod(coarse_mm) / 1000 > ALONE_ML)
    found = inside | components_at(labels, dilate_in_plane(inside)) | alone[labels]
    expected |= elsewhere
    expected[shoulder:] = True  # at the edge of lung no muscle is taken for it
    for _ in range(EDGE_VOXELS):
        edge = dilate_in_plane(found) & seen & expected
        found |= edge & (local_lung_hu(found, hu) > EDGE_HU)
    result = np.zeros_like(lungs)
    result[part] = found & ~inside
    return result


def _likely_beside(
    seen: np.ndarray,
    aerated: np.ndarray,
    lungs: np.ndarray,
    probability: np.ndarray,
    spacing_mm: SpacingMm,
) -> np.ndarray:
    """Parts of a slice that are likely, beside lung, and no larger than what is aerated on their
    side: a liver, a spleen and the muscles of a shoulder are larger than the lung beside them."""
    labels = label_in_plane(seen)
    areas, means = volumes_and_means(labels, probability)
    z, _, x = np.nonzero(seen)
    at = labels[seen]
    middle = int(np.flatnonzero(aerated.any(axis=(0, 1))).mean())
    halves = np.stack([half.sum(axis=(1, 2)) for half in np.split(aerated, [middle], axis=2)])
    side = np.bincount(at, x, len(areas)) / np.maximum(areas, 1) >= middle
    slices = np.zeros(len(areas), int)
    slices[at] = z
    chosen = (means > LIKELY) & (areas <= halves[side.astype(int), slices])
    chosen[0] = False
    beside = components_at(labels, dilate_by_disk(lungs, BESIDE_MM, spacing_mm))
    return beside & chosen[labels]
