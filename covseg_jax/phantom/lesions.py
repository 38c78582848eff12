"""COVID lesions of a phantom: where they lie, what they look like, and their true mask.

A smooth score is the sum of an envelope of foci, which prefer the pleura and the back, and Gaussian
random fields that make borders irregular and throw off satellites. The lesion is the part of the
lungs with the highest score, as much of it as the drawn volume asks for.
"""

import dataclasses

import numpy as np

from covseg_jax.phantom import anatomy
from covseg_jax.phantom.anatomy import Grid, Outlines

# Infected share of the lungs by class (Morozov et al. 2020, MosMedData, arXiv 2005.06465).
_INFECTION = {'CT-2': (0.25, 0.5), 'CT-3': (0.5, 0.75), 'CT-4': (0.75, 0.9)}
CATEGORIES = ('CT-0', 'CT-1', *_INFECTION)
# Mean density of a study's ground glass; patches spread it over −700 to −300 HU.
GROUND_GLASS_HU = (-640, -460)


@dataclasses.dataclass(frozen=True)
class Lesions:
    """The true mask, and how far (0 to 1) and to which HU tissue is raised; all (Z, Y, X)."""

    mask: np.ndarray
    opacity: np.ndarray
    target_hu: np.ndarray


def draw_volume_ml(rng: np.random.Generator, category: str, lungs_ml: float) -> float:
    """Lesion volume of a study in ml.

    CT-1 follows MosMed's 50 masks: log-normal around a median of 66 ml, with the longer tail
    towards small, within 0.4 to 500 ml and below a quarter of the lungs.
    """
    if category in _INFECTION:
        return lungs_ml * rng.uniform(*_INFECTION[category])
    normal = rng.standard_normal()
    volume = 66 * np.exp(normal * (1.6 if normal < 0 else 1.0))
    return float(np.clip(volume, 0.4, min(500.0, 0.24 * lungs_ml)))


def _draw_foci(rng, grid, outlines, lungs, volume_ml: float, count: int) -> np.ndarray:
    """Centres (count, 3) as (z, y, x) in mm: nearer the pleura, the back and a level of its own."""
    inside = np.flatnonzero(lungs)
    sample = inside[rng.integers(0, inside.size, 600)]
    iz, iy, ix = np.unravel_index(sample, lungs.shape)
    depth = outlines.cavity.reshape(-1)[sample]
    back = -grid.y[0, iy, 0] / np.abs(grid.y).max()
    # Disease gathers around some height, mostly in the lower half, and leaves whole slices free.
    level = outlines.level[iz, 0, 0] - rng.triangular(0.1, 0.35, 0.85)
    spread = rng.uniform(0.04, 0.12) + min(volume_ml / 1200, 0.2)
    weight = np.exp(-np.maximum(depth, 0) / 12 + 2.2 * back - level**2 / (2 * spread**2))
    chosen = rng.choice(sample.size, size=count, p=weight / weight.sum())
    return np.stack([grid.z[iz, 0, 0], grid.y[0, iy, 0], grid.x[0, 0, ix]], axis=1)[chosen]


def _envelope(rng, grid, outlines, lungs, volume_ml: float) -> np.ndarray:
    """Smooth score of the foci (Z, Y, X), about 1 in the largest and 0 far from all."""
    count = int(rng.integers(10, 40) + min(volume_ml / 5, 80))
    foci = _draw_foci(rng, grid, outlines, lungs, volume_ml, count)
    # A few large beside many small, which together come near the drawn volume.
    radius = 10 * (3 * volume_ml / (4 * np.pi)) ** (1 / 3) * count**-0.3
    radii = np.clip(radius * rng.uniform(0.25, 1.2, count) ** 1.5, 4, 60)
    heights = rng.uniform(0.75, 1.15, count)
    step = 7.0
    shape = anatomy.lattice_shape(grid, step)
    axes = ((np.arange(n) - (n - 1) / 2) * step for n in shape)
    z, y, x = np.meshgrid(*axes, indexing='ij', sparse=True)
    nodes = np.zeros(shape, np.float32)
    for (fz, fy, fx), size, height in zip(foci, radii, heights, strict=True):
        square = ((z - fz) / 1.25) ** 2 + (y - fy) ** 2 + (x - fx) ** 2
        np.maximum(nodes, height * np.exp(-square / (2 * size**2)), out=nodes)
    return anatomy.interpolate(nodes, grid, step)


def draw_lesions(
    rng: np.random.Generator, grid: Grid, outlines: Outlines, lungs: np.ndarray, volume_ml: float
) -> Lesions:
    """Draws lesions of volume_ml inside lungs (Z, Y, X) bool.

    The opacity rises from 0 to 1 across the border; the true mask is where it is at least 0.5, so
    its volume is volume_ml to within a voxel.
    """
    score = _envelope(rng, grid, outlines, lungs, volume_ml)
    # Weighted by the envelope: satellites stay near their focus.
    rough = 0.25 * anatomy.smooth_field(rng, grid, 22)
    rough += 0.25 * anatomy.smooth_field(rng, grid, 10)
    score += rough * (0.2 + score)
    score -= 0.012 * np.clip(outlines.cavity, 0, 40)
    voxel_ml = float(np.prod(grid.spacing_mm)) / 1000
    inside = score[lungs]
    count = int(np.clip(round(volume_ml / voxel_ml), 1, inside.size))
    level = np.partition(inside, inside.size - count)[inside.size - count]
    mask = lungs & (score >= level)
    score -= level
    softness = np.float32(rng.uniform(0.1, 0.28))
    opacity = np.clip(np.float32(0.5) + score / softness, 0, 1)
    opacity *= opacity * (3 - 2 * opacity)  # smooth step: 0.5 stays 0.5

    patchy = anatomy.smooth_field(rng, grid, 26)
    grain = anatomy.smooth_field(rng, grid, 6)
    target = rng.uniform(*GROUND_GLASS_HU) + 90 * patchy + 30 * grain
    if rng.random() < 0.35:  # crazy paving: thickened septa within ground glass
        target += 160 * np.exp(-((grain / 0.25) ** 2))
    np.clip(target, -700, -300, out=target)
    if rng.random() < 0.4:
        dense = anatomy.ramp(score - rng.uniform(0.1, 0.4) + 0.2 * patchy, 0.25)
        anatomy.blend(target, dense, rng.uniform(-100, 60))
    return Lesions(mask, opacity, target)
