"""Branching vessels and airways of a phantom, and the drawing of tubes on a grid.

A tree is grown by halving a cloud of target points: from where it stands, a branch goes part of the
way to the centre of its targets, splits them in two along their widest axis, and goes on until one
target is left. Radii follow Murray's law: the parent's radius to the power 2.7 is the sum of the
children's (Murray 1926 has 3; 2.7 suits lungs better).
"""

import numpy as np

from covseg_jax.phantom import anatomy

_MURRAY = 2.7


def grow_tree(
    rng: np.random.Generator, root: np.ndarray, targets: np.ndarray, tip_mm: float, stop: int = 1
) -> np.ndarray:
    """Grows a tree from root (3,) to targets (N, 3), all (x, y, z) in mm.

    Returns:
        Segments (M, 7): start, end, radius in mm. Branches that feed fewer than `stop` targets are
        left out; the radius of one that feeds n is tip_mm * n^(1 / 2.7).
    """
    segments = []
    stack = [(np.asarray(root, float), np.asarray(targets, float))]
    while stack:
        start, cloud = stack.pop()
        count = len(cloud)
        if count < max(stop, 1):
            continue
        centre = cloud.mean(axis=0)
        reach = 1.0 if count == 1 else rng.uniform(0.35, 0.55)
        end = start + reach * (centre - start)
        length = np.linalg.norm(end - start)
        # A bend in the middle: straight vessels look drawn.
        middle = (start + end) / 2 + rng.normal(0, 0.05 * length, 3)
        radius = tip_mm * count ** (1 / _MURRAY)
        segments.append((*start, *middle, radius))
        segments.append((*middle, *end, radius))
        if count > 1:
            axis = int(np.argmax(np.ptp(cloud, axis=0)))
            order = np.argsort(cloud[:, axis], kind='stable')
            cut = int(np.clip(round(count * rng.uniform(0.3, 0.7)), 1, count - 1))
            stack += [(end, cloud[order[:cut]]), (end, cloud[order[cut:]])]
    return np.array(segments, np.float32).reshape(-1, 7)


def _slice_windows(segments: np.ndarray, grid: anatomy.Grid):
    """Pairs (segment, slice) that meet, with the centre and half size in mm of the footprint."""
    sx, sy, sz = grid.spacing_mm
    start, end, radius = segments[:, :3], segments[:, 3:6], segments[:, 6]
    soft = radius + max(sx, sy)
    low = np.minimum(start[:, 2], end[:, 2]) - soft
    high = np.maximum(start[:, 2], end[:, 2]) + soft
    z0 = float(grid.z[0, 0, 0])
    first = np.clip(np.ceil((low - z0) / sz), 0, grid.z.size).astype(int)
    last = np.clip(np.floor((high - z0) / sz), -1, grid.z.size - 1).astype(int)
    counts = np.maximum(last - first + 1, 0)
    segment = np.repeat(np.arange(len(segments)), counts)
    offset = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    index = first[segment] + offset
    start, along, soft = start[segment], (end - start)[segment], soft[segment]
    # The stretch of the axis that is within reach of the slice.
    rise = np.where(np.abs(along[:, 2]) < 1e-3, 1e-3, along[:, 2])
    gap = z0 + index * sz - start[:, 2]
    near, far = (gap - soft) / rise, (gap + soft) / rise
    t0, t1 = (np.clip(each(near, far), 0, 1) for each in (np.minimum, np.maximum))
    centre = start[:, :2] + along[:, :2] * ((t0 + t1) / 2)[:, None]
    half = np.abs(along[:, :2]).max(axis=1) * (t1 - t0) / 2 + soft
    return segment, index, centre, half


def _draw_batch(share, segments, index, centre, reach, grid) -> None:
    """Draws (segment, slice) pairs that share one window of (2 reach + 1)² pixels."""
    sx, sy, _ = grid.spacing_mm
    steps = np.arange(-reach, reach + 1)
    x0, y0 = float(grid.x[0, 0, 0]), float(grid.y[0, 0, 0])
    ix = np.rint((centre[:, 0] - x0) / sx).astype(int)[:, None] + steps
    iy = np.rint((centre[:, 1] - y0) / sy).astype(int)[:, None] + steps
    start, along = segments[:, :3], segments[:, 3:6] - segments[:, :3]
    dx = (x0 + ix * sx - start[:, :1]).astype(np.float32)[:, None, :]
    dy = (y0 + iy * sy - start[:, 1:2]).astype(np.float32)[:, :, None]
    dz = (grid.z[index, 0, 0] - start[:, 2]).astype(np.float32)[:, None, None]
    ax, ay, az = (along[:, i, None, None] for i in range(3))
    t = (dx * ax + dy * ay + dz * az) / (ax * ax + ay * ay + az * az + np.float32(1e-6))
    np.clip(t, 0, 1, out=t)
    square = (dx - t * ax) ** 2 + (dy - t * ay) ** 2 + (dz - t * az) ** 2
    radius = segments[:, 6, None, None]
    pixel = np.float32(grid.pixel_mm)
    # A vessel thinner than a pixel fills it in part: as the diameter where it runs in the slice, as
    # the diameter squared where it stands on it.
    upright = np.abs(az) / np.sqrt(ax * ax + ay * ay + az * az + np.float32(1e-6))
    full = np.minimum(1, 2 * radius / pixel) ** (1 + upright)
    blurred = np.maximum(radius, pixel / 2)
    cover = full * np.clip((blurred - np.sqrt(square)) / pixel + np.float32(0.5), 0, 1)
    inside_x, inside_y = (ix >= 0) & (ix < grid.x.size), (iy >= 0) & (iy < grid.y.size)
    chosen = np.nonzero(inside_y[:, :, None] & inside_x[:, None, :] & (cover > 0))
    place = (index[chosen[0]], iy[chosen[0], chosen[1]], ix[chosen[0], chosen[2]])
    np.maximum.at(share.reshape(-1), np.ravel_multi_index(place, share.shape), cover[chosen])


def draw_tubes(segments: np.ndarray, grid: anatomy.Grid) -> np.ndarray:
    """Share of tube (Z, Y, X) float32 in [0, 1] of segments (M, 7): start, end, radius in mm.

    Slices are sampled thin, as in MosMed, where every tenth of the thin slices was kept.
    """
    share = np.zeros(grid.shape, np.float32)
    if not len(segments):
        return share
    segment, index, centre, half = _slice_windows(segments, grid)
    reach = np.ceil(half / min(grid.spacing_mm[:2])).astype(int) + 1
    # Windows of like size go together, so that small vessels do not pay for large ones.
    size = np.ceil(np.log2(reach) * 2).astype(int)
    for group in np.unique(size):
        members = np.nonzero(size == group)[0]
        window = int(reach[members].max())
        step = max(1, 2_000_000 // (2 * window + 1) ** 2)
        for begin in range(0, len(members), step):
            part = members[begin : begin + step]
            _draw_batch(share, segments[segment[part]], index[part], centre[part], window, grid)
    return share
