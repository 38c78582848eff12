"""The healthy chest of a phantom: outlines, tissues, bones and lung parenchyma, in millimetres.

Every outline is an implicit function of position whose value is roughly a signed distance in mm, so
that one subject can be sampled on any grid. Arrays are (Z, Y, X): z to Superior, y to Anterior, x
to the patient's Left, with the origin in the middle of the field of view. Sizes and HU are those of
anatomy textbooks, rounded; percentiles of lung HU were compared with a real scan.
"""

import dataclasses

import numpy as np

# Variance of a field interpolated with cubic B-splines from unit normal nodes, per axis: the
# integral of the squared spline, 151/315.
_SPLINE_VARIANCE = 151 / 315


@dataclasses.dataclass(frozen=True)
class Grid:
    """Voxel centres in mm, ready to broadcast: x (1, 1, X), y (1, Y, 1), z (Z, 1, 1)."""

    x: np.ndarray
    y: np.ndarray
    z: np.ndarray
    spacing_mm: tuple[float, float, float]  # (x, y, z)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.z.size, self.y.size, self.x.size

    @property
    def extent_mm(self) -> tuple[float, float, float]:
        return tuple(n * s for n, s in zip(self.shape, self.spacing_mm[::-1], strict=True))

    @property
    def pixel_mm(self) -> float:
        return max(self.spacing_mm[:2])


def make_grid(shape: tuple[int, int, int], spacing_mm: tuple[float, float, float]) -> Grid:
    """Grid of a volume of shape (X, Y, Z) with spacings (x, y, z) in mm, centred on the origin."""
    x, y, z = (
        ((np.arange(n) - (n - 1) / 2) * s).astype(np.float32)
        for n, s in zip(shape, spacing_mm, strict=True)
    )
    return Grid(x[None, None, :], y[None, :, None], z[:, None, None], tuple(spacing_mm))


def _interpolate_axis(values: np.ndarray, points: np.ndarray, step_mm: float, axis: int):
    """Cubic B-splines along one axis, the nodes being step_mm apart around the origin."""
    place = points.ravel() / step_mm + (values.shape[axis] - 1) / 2
    first = np.floor(place).astype(int) - 1
    u = place - np.floor(place)
    weights = (1 - u) ** 3, 3 * u**3 - 6 * u**2 + 4, -3 * u**3 + 3 * u**2 + 3 * u + 1, u**3
    shape = [-1 if i == axis else 1 for i in range(values.ndim)]
    total = np.float32(0)
    for tap, weight in enumerate(weights):
        weight = (weight / 6).astype(np.float32).reshape(shape)
        total = total + np.take(values, first + tap, axis=axis) * weight
    return total


def interpolate(nodes: np.ndarray, grid: Grid, step_mm: float) -> np.ndarray:
    """Values (Z, Y, X) float32 of a lattice of nodes (nz, ny, nx), step_mm apart, by B-splines."""
    # Sums of four taps, not matrices: BLAS threads of several workers would block each other, and
    # their sums depend on the machine. y comes last because whole rows are quick to take.
    values = nodes.astype(np.float32)
    for axis, points in ((0, grid.z), (2, grid.x), (1, grid.y)):
        values = _interpolate_axis(values, points, step_mm, axis)
    return values


def lattice_shape(grid: Grid, step_mm: float) -> tuple[int, int, int]:
    """Shape (nz, ny, nx) of the lattice of nodes that covers the grid, with one beyond each end."""
    return tuple(int(np.ceil(extent / step_mm)) + 4 for extent in grid.extent_mm)


def smooth_field(rng: np.random.Generator, grid: Grid, length_mm: float) -> np.ndarray:
    """A smooth Gaussian random field (Z, Y, X) float32: mean 0, deviation 1, grain length_mm."""
    nodes = rng.standard_normal(lattice_shape(grid, length_mm), dtype=np.float32)
    return interpolate(nodes / _SPLINE_VARIANCE**1.5, grid, length_mm)


def ramp(distance_mm: np.ndarray, width_mm: float | np.ndarray) -> np.ndarray:
    """Soft inside indicator in [0, 1]: 0.5 where the signed distance is 0, linear over width_mm."""
    return np.clip(distance_mm / np.float32(width_mm) + np.float32(0.5), 0, 1)


def blend(image: np.ndarray, share: np.ndarray, value: float | np.ndarray) -> None:
    """Mixes value into image in place: image + share * (value - image)."""
    image += share * (value - image)


@dataclasses.dataclass(frozen=True)
class Subject:
    """Sizes of one subject; lengths in mm, attenuation in HU."""

    half_width: float  # of the thoracic cavity
    half_depth: float
    fat: float  # thickness at the side
    muscle: float
    lung_low: float  # z of the deepest recess
    lung_high: float  # z of the apex
    dome: float  # height of the right diaphragm above lung_low
    dome_drop: float  # the left one is that much lower
    heart: float  # scale, 1 = usual
    mediastinum: float  # scale, 1 = usual
    rib_phase: float
    lung_hu: float
    gravity_hu: float  # posterior minus anterior parenchyma
    dependent_hu: float  # opacity along the posterior pleura; 0 in half of them
    mosaic_hu: float  # deviation of patches of ventilation
    has_emphysema: bool
    num_nodules: int
    num_bands: int
    noise_hu: float
    motion_mm: float
    scale: float  # of in-plane sizes that are not fields above

    @property
    def height(self) -> float:
        return self.lung_high - self.lung_low


def draw_subject(rng: np.random.Generator, grid: Grid) -> Subject:
    """Draws a subject that fits into the field of view, smaller where the field is small."""
    fov_z, fov_y, fov_x = grid.extent_mm
    half_width, half_depth = rng.uniform(118, 138), rng.uniform(80, 97)
    fat, muscle = rng.uniform(6, 20), rng.uniform(13, 20)
    side = half_width + fat + muscle
    scale = min(1.0, 0.49 * fov_x / side, 0.46 * fov_y / (half_depth + 1.3 * fat + muscle + 8))
    height = min(rng.uniform(215, 262), 0.86 * fov_z)
    lung_low = -fov_z / 2 + (fov_z - height) * rng.uniform(0.4, 0.6)
    return Subject(
        half_width=half_width * scale,
        half_depth=half_depth * scale,
        fat=fat * scale,
        muscle=muscle * scale,
        lung_low=lung_low,
        lung_high=lung_low + height,
        dome=height * rng.uniform(0.30, 0.42),
        dome_drop=height * rng.uniform(0.03, 0.08),
        heart=rng.uniform(0.85, 1.12),
        mediastinum=rng.uniform(0.85, 1.15),
        rib_phase=rng.uniform(0, 26),
        lung_hu=rng.uniform(-885, -815),
        gravity_hu=rng.uniform(25, 90),
        dependent_hu=rng.uniform(80, 160) if rng.random() < 0.5 else 0.0,
        mosaic_hu=rng.uniform(8, 38),
        has_emphysema=rng.random() < 0.2,
        num_nodules=int(rng.integers(1, 4)) if rng.random() < 0.3 else 0,
        num_bands=int(rng.integers(1, 4)) if rng.random() < 0.3 else 0,
        noise_hu=rng.uniform(15, 40),
        motion_mm=rng.uniform(3, 13),
        scale=scale,
    )


@dataclasses.dataclass(frozen=True)
class Outlines:
    """Signed distances in mm, positive inside, and soft shares in [0, 1]; all (Z, Y, X)."""

    body: np.ndarray
    cavity: np.ndarray
    heart: np.ndarray
    diaphragm: np.ndarray  # positive above it
    lungs: np.ndarray  # share of lung in the voxel; the lung mask is lungs >= 0.5
    level: np.ndarray  # (Z, 1, 1) 0 at the deepest recess, 1 at the apex
    spine_y: float


def _cavity_distance(grid: Grid, subject: Subject, level: np.ndarray) -> np.ndarray:
    # Every slice is a kidney-like ellipse; the cap above rounds each lung's own apex, so that there
    # are two tips once the mediastinum is cut out.
    rise = np.clip((level - 0.35) / 0.65, 0, 1)
    taper = np.sqrt(np.clip(1 - rise**2.6, 1e-3, None)).astype(np.float32)
    flat = 0.2 * subject.half_width
    wide = (subject.half_width - flat) * taper * (0.9 + 0.1 * np.clip(level / 0.3, 0, 1))
    deep = subject.half_depth * taper**0.9
    side = np.abs(grid.x) / subject.half_width
    gutter = 9 * subject.scale * (1 - (2 * side - 1) ** 2)
    across = (np.maximum(np.abs(grid.x) - flat, 0) / wide) ** 2.1
    along = (np.abs(grid.y + 12 * level**2 * subject.scale + gutter) / deep) ** 2.1
    distance = (1 - (across + along) ** np.float32(1 / 2.1)) * np.minimum(wide, deep)
    tip_x, tip_y = np.abs(grid.x) - 0.36 * subject.half_width, grid.y + 10 * subject.scale
    tip = subject.lung_high - grid.z - (tip_x**2 / 65 + tip_y**2 / 110) / subject.scale
    return np.minimum(distance, tip)


def _heart_distance(grid: Grid, subject: Subject, level: np.ndarray) -> np.ndarray:
    size = subject.heart * subject.scale
    x, y = grid.x - 20 * size, grid.y - 18 * size
    # The long axis points to the left and forward.
    u, v = (0.85 * x + 0.5 * y) / (66 * size), (-0.5 * x + 0.85 * y) / (47 * size)
    w = (level - 0.36) / 0.27
    # Great vessels leave upwards: the top of the heart is a narrowing trunk, not a dome.
    radius = np.sqrt(u * u + v * v + w * w)
    trunk_x = grid.x - 4 * size * (1 - level)
    trunk_y = grid.y - 12 * size
    trunk = np.sqrt((trunk_x / (30 * size)) ** 2 + (trunk_y / (27 * size)) ** 2)
    trunk = np.where((level > 0.4) & (level < 0.74), (1 - trunk) * 27 * size, np.float32(-99))
    return np.maximum((1 - radius) * 50 * size, trunk)


def _diaphragm_distance(grid: Grid, subject: Subject) -> np.ndarray:
    side = (np.abs(grid.x) - 0.42 * subject.half_width) / (0.6 * subject.half_width)
    y = grid.y / subject.half_depth - 0.1
    left = 1 / (1 + np.exp(-grid.x / 12))
    fall = np.where(side > 0, 0.95, 0.35) * side * side
    fall = fall + np.where(y > 0, 0.35, 0.85) * y * y
    dome = subject.dome - subject.dome_drop * left
    return (grid.z - subject.lung_low - dome * (1 - fall)) * np.float32(0.75)


def _middle_distance(grid: Grid, subject: Subject, level: np.ndarray, spine_y: float):
    """Distance outside of mediastinum, spine and descending aorta, in mm."""
    s = subject.scale
    belly = np.exp(-(((grid.y + 2) / (34 * s)) ** 2))
    hilum = np.exp(-(((level - 0.56) / 0.09) ** 2) - ((grid.y + 8 * s) / (20 * s)) ** 2)
    # Fat beside the heart fills the corner in front, above the diaphragm.
    corner = 90 * np.clip(0.42 - level, 0, 1) * np.clip(grid.y / (30 * s), 0, 1)
    half = 5 + 22 * belly + 14 * hilum + 8 * np.clip(level - 0.75, 0, 1) + corner
    half = half * s * subject.mediastinum
    mediastinum = np.abs(grid.x - 3 * s) - half
    behind = spine_y - grid.y
    spine = np.hypot(grid.x, np.maximum(-behind, 0)) - (23 * s + 0.6 * np.maximum(behind, 0))
    aorta_y = spine_y + 14 * s
    aorta = np.hypot(grid.x - 25 * s, grid.y - aorta_y) - 12.5 * s + 200 * (level > 0.72)
    arch_z = (level - 0.72) * subject.height
    arch = np.sqrt((grid.x - 24 * s) ** 2 + ((grid.y + 6 * s) / 1.7) ** 2 + arch_z**2) - 15 * s
    return np.minimum(np.minimum(mediastinum, spine), np.minimum(aorta, arch))


def draw_outlines(rng: np.random.Generator, grid: Grid, subject: Subject) -> Outlines:
    """Outlines of body, cavity, heart, diaphragm and lungs of a subject on a grid."""
    level = (grid.z - subject.lung_low) / np.float32(subject.height)
    wall = subject.fat + subject.muscle
    shoulder = 1 + 0.10 * np.clip((level - 0.7) / 0.3, 0, 1)
    wide = np.minimum((subject.half_width + wall) * shoulder, 0.495 * np.ptp(grid.x))
    deep = (subject.half_depth + subject.muscle + 1.2 * subject.fat + 8) * (2 - shoulder)
    across, along = (np.abs(grid.x) / wide) ** 2.3, (np.abs(grid.y + 5) / deep) ** 2.3
    body = (1 - (across + along) ** np.float32(1 / 2.3)) * deep

    uneven = smooth_field(rng, grid, 45)
    spine_y = -subject.half_depth + 20 * subject.scale
    cavity = _cavity_distance(grid, subject, level) + 2 * uneven
    heart = _heart_distance(grid, subject, level) + 2.5 * uneven
    diaphragm = _diaphragm_distance(grid, subject) + 4 * uneven[:, ::-1]
    middle = _middle_distance(grid, subject, level, spine_y) - 2.5 * uneven
    edge = 1.2 * grid.pixel_mm
    lungs = ramp(cavity, edge)
    np.minimum(lungs, ramp(middle, edge), out=lungs)
    # Heartbeat and breathing smear only these two borders.
    np.minimum(lungs, ramp(-heart, edge + 0.6 * subject.motion_mm), out=lungs)
    np.minimum(lungs, ramp(diaphragm, edge + subject.motion_mm), out=lungs)
    return Outlines(body, cavity, heart, diaphragm, lungs, level, spine_y)


def _ribs(grid: Grid, subject: Subject, outlines: Outlines) -> np.ndarray:
    """Share of rib: periodic bands just outside the cavity that slope down towards the front."""
    pitch, s = 26.0, subject.scale
    slope = 0.55 * grid.y + 0.45 * np.abs(grid.x) + subject.rib_phase
    phase = np.mod(grid.z + slope, pitch) - pitch / 2
    radial = (outlines.cavity + 7 * s) / (4.2 * s)
    inside = 1 - np.sqrt(radial * radial + (phase / 6.0) ** 2)
    inside = np.where((outlines.level < 0.97) & (np.abs(grid.x) > 12 * s), inside, -1)
    return ramp(inside * 4 * s, 1.5 * grid.pixel_mm)


def _paint_bones(image: np.ndarray, grid: Grid, subject: Subject, outlines: Outlines) -> None:
    s, edge = subject.scale, grid.pixel_mm
    front = np.clip((grid.y - 0.55 * subject.half_depth) / (15 * s), 0, 1)
    cartilage = front * (np.abs(grid.x) < 0.6 * subject.half_width)
    blend(image, _ribs(grid, subject, outlines), 420 - 300 * cartilage)
    y = grid.y - outlines.spine_y + 4 * s
    disc = np.mod(grid.z, 25) < 5
    vertebra = (1 - np.sqrt((grid.x / (19 * s)) ** 2 + (y / (15 * s)) ** 2)) * 16 * s
    blend(image, ramp(vertebra, edge), np.where(disc, 90, np.where(vertebra < 2.5, 420, 190)))
    arch = np.hypot(grid.x, y + 24 * s)
    blend(image, ramp(4 * s - np.abs(arch - 12 * s), edge), 330)
    blend(image, ramp(8 * s - arch, edge), 25)
    process = np.maximum(np.abs(grid.x) - 3 * s, np.abs(y + 44 * s) - 11 * s)
    process = np.minimum(-process, 6 - np.abs(np.mod(grid.z, 25) - 12))
    blend(image, ramp(process, edge), 350)
    breast = subject.half_depth + 6 * s - 12 * outlines.level**2 * s
    plate = np.maximum(np.abs(grid.x) / 20 * 6, np.abs(grid.y - breast)) - 5.5 * s
    plate = np.where((outlines.level > 0.35) & (outlines.level < 0.85), plate, np.float32(9))
    blend(image, ramp(-plate, edge), 230)
    blade_x = np.abs(grid.x) - 0.78 * subject.half_width
    blade_y = grid.y + 0.72 * subject.half_depth + 14 * s
    thin = np.abs(0.75 * blade_x - 0.65 * blade_y) - 3.5 * s
    blade = np.maximum(thin, np.abs(0.65 * blade_x + 0.75 * blade_y) - 32 * s)
    blade = np.where((outlines.level > 0.5) & (outlines.cavity < -14 * s), blade, np.float32(9))
    blend(image, ramp(-blade, edge), 380)


def paint_body(rng: np.random.Generator, grid: Grid, subject: Subject, outlines: Outlines):
    """Image (Z, Y, X) float32 HU of everything but the lungs' content, without noise."""
    s, edge = subject.scale, grid.pixel_mm
    image = np.full(grid.shape, -1000, np.float32)
    bed = np.abs(grid.y + np.abs(grid.y).max() * 0.93 - grid.x**2 / 700) - 2
    blend(image, ramp(-bed, 2 * edge), -550)
    streaks = smooth_field(rng, grid, 14)
    blend(image, ramp(outlines.body, edge), -105 + 6 * streaks)
    # Skin, then muscle with fat planes in it.
    blend(image, ramp(1.5 - np.abs(outlines.body - 1.5), edge), 10)
    back = np.where(grid.y < 0, 1.5, 1.0) * subject.muscle
    muscle = np.minimum(outlines.cavity + back + 3 * s * streaks, outlines.body - 0.6 * subject.fat)
    planes = ramp(np.abs(streaks) - 0.12, 0.2)
    blend(image, ramp(muscle, edge) * planes, 50)
    inside = ramp(outlines.cavity + 2, edge)
    blend(image, inside, -30 + 45 * np.clip(streaks + 0.6, -1, 1))
    blend(image, inside * ramp(outlines.heart + 4 * s, edge), -80)
    blend(image, inside * ramp(outlines.heart, 2 * edge), 42)
    belly = ramp(-outlines.diaphragm, edge) * ramp(outlines.cavity + 1.2 * subject.muscle, edge)
    blend(image, belly, np.where(grid.x < 25 * s, 58, 45 + 12 * np.sign(streaks)))
    stomach = np.sqrt(
        ((grid.x - 68 * s) / 32) ** 2
        + ((grid.y - 30 * s) / 26) ** 2
        + ((grid.z - subject.lung_low - 0.05 * subject.height) / 40) ** 2
    )
    blend(image, ramp((1 - stomach) * 26, edge) * ramp(-outlines.diaphragm - 9, edge), -930)
    _paint_bones(image, grid, subject, outlines)
    return image


def paint_parenchyma(rng: np.random.Generator, grid: Grid, subject: Subject, outlines: Outlines):
    """HU (Z, Y, X) float32 of lung tissue without vessels, airways, lesions and noise."""
    y = grid.y / np.float32(subject.half_depth)
    mosaic = smooth_field(rng, grid, 26)
    tissue = subject.lung_hu - 0.5 * subject.gravity_hu * y + subject.mosaic_hu * mosaic
    tissue += 20 * np.clip(0.4 - outlines.level, 0, 1)
    lobule = smooth_field(rng, grid, 5)
    tissue += 16 * lobule
    if subject.dependent_hu:
        depth = np.maximum(outlines.cavity, 0)
        share = np.exp(-depth / 9) * np.clip(-1.6 * y - 0.35, 0, 1)
        tissue += subject.dependent_hu * share * np.clip(1.3 + 0.8 * mosaic, 0.2, 2.6)
    for height, slope, right_only in ((0.42, 1.05, False), (0.60, 0.06, True)):
        fissure = (outlines.level - height) * subject.height - slope * grid.y + 4 * mosaic
        fissure = fissure / np.float32(np.hypot(1, slope))
        faint = 90 * np.exp(-((fissure / (0.8 + 0.4 * grid.pixel_mm)) ** 2))
        tissue += faint * (grid.x < 0) * (grid.y > -20) if right_only else faint
    if subject.has_emphysema:
        bubbles = smooth_field(rng, grid, 9) + 0.8 * (outlines.level - 0.6)
        blend(tissue, ramp(bubbles - 0.9, 0.3), -975)
    return tissue
