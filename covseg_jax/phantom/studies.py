"""Synthetic chest CT studies with true masks, in MosMed's layout.

They stand in for MosMedData in tests and wherever the data set is not at hand. They are as hard as
real scans: vessels, airway walls, fissures, dependent opacities, bands and nodules have the
attenuation of lesions, so that a threshold inside the lungs does not find them.
"""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Sequence

import numpy as np
import openpyxl
import scipy.ndimage
import tqdm

from covseg_jax import atomic, errors
from covseg_jax.imaging import nifti
from covseg_jax.imaging.workers import map_in_processes
from covseg_jax.phantom import anatomy, lesions, vessels

_VESSEL_HU = 45.0
_AIR_HU = -990.0
_COLUMNS = ('study_id', 'category', 'study_file', 'mask_file')
# Of CT-2, CT-3 and CT-4: MosMed's CT-1 to CT-4 have 684, 125, 45 and 2 studies.
_SEVERE_SHARES = (125 / 856, 45 / 856, 2 / 856)
_SETTINGS_FILE = '.phantom.json'
_REGISTRY_FILE = 'dataset_registry.xlsx'


@dataclasses.dataclass(frozen=True)
class Phantom:
    """One synthetic study; arrays (Z, Y, X) canonical.

    `lungs` is 1 inside the lungs' outline: lesions, vessels and bronchi within it included; hilum,
    main bronchi, trachea and mediastinum excluded.
    """

    image: np.ndarray  # int16 HU
    lesion: np.ndarray  # uint8, 1 where the opacity is at least half of its full strength
    lungs: np.ndarray  # uint8
    affine: np.ndarray  # (4, 4) of the file, whose axes run to Left, Anterior and Superior


def _sample_points(rng, grid, lungs, count: int, *, left: bool) -> np.ndarray:
    """Random points (count, 3) as (x, y, z) mm in one lung."""
    inside = np.flatnonzero(lungs & ((grid.x > 0) == left))
    if not inside.size:
        return np.zeros((0, 3))
    iz, iy, ix = np.unravel_index(inside[rng.integers(0, inside.size, count)], lungs.shape)
    points = np.stack([grid.x[0, 0, ix], grid.y[0, iy, 0], grid.z[iz, 0, 0]], axis=1)
    return points + rng.uniform(-0.5, 0.5, points.shape) * grid.spacing_mm


def _draw_vessels_and_airways(rng, grid, subject, lungs):
    """Shares (Z, Y, X) of vessel, airway wall and airway lumen."""
    s = subject.scale

    def place(x, y, level):
        return np.array([x * s, y * s, subject.lung_low + level * subject.height])

    carina, top = place(2, -14, 0.66), place(0, -8, 1.35)
    trees, airways = [], [np.array([[*carina, *top, 8.5 * s]], np.float32)]
    for left in (False, True):
        sign = 1 if left else -1
        hilum = place(sign * 36, -12, 0.57 + 0.03 * left)
        for count, tip, shift in ((560, 0.62, (0, 4, 6)), (360, 0.62, (0, 8, -12))):
            targets = _sample_points(rng, grid, lungs, count, left=left)
            trees.append(vessels.grow_tree(rng, hilum + shift, targets, tip * s + 0.05))
        main = np.array([[*carina, *hilum, 5.5 * s]], np.float32)
        targets = _sample_points(rng, grid, lungs, 120, left=left)
        airways += [main, vessels.grow_tree(rng, hilum, targets, 0.6 * s, stop=4)]
    lumen = np.concatenate(airways)
    wall = lumen.copy()
    wall[:, 6] += np.maximum(0.8, 0.15 * lumen[:, 6])
    return [vessels.draw_tubes(each, grid) for each in (np.concatenate(trees), wall, lumen)]


def _draw_findings(rng, grid, subject, lungs, image) -> None:
    """Calcified nodules and plate atelectases: bright, and not COVID."""
    points = _sample_points(rng, grid, lungs, subject.num_nodules, left=bool(rng.random() < 0.5))
    radii = rng.uniform(2, 4.5, (len(points), 1))
    nodules = np.hstack([points, points + 0.5, radii]).astype(np.float32)
    anatomy.blend(image, vessels.draw_tubes(nodules, grid), 320)
    low = lungs & (grid.z < subject.lung_low + 0.4 * subject.height)
    points = _sample_points(rng, grid, low, subject.num_bands, left=bool(rng.random() < 0.5))
    lengths = rng.normal(0, 1, (len(points), 3)) * (20, 14, 3)
    radii = rng.uniform(1.2, 3, (len(points), 1))
    bands = np.hstack([points - lengths, points + lengths, radii]).astype(np.float32)
    share = vessels.draw_tubes(bands, grid) * lungs
    anatomy.blend(image, share, np.maximum(image, -40))


def _noise(rng, grid, subject) -> np.ndarray:
    """Noise (Z, Y, X) of a smooth reconstruction kernel, independent between slices, in HU."""
    white = rng.standard_normal(grid.shape, dtype=np.float32)
    sigma = [0, *(max(0.5, 0.75 / s) for s in grid.spacing_mm[1::-1])]
    smooth = scipy.ndimage.gaussian_filter(white, sigma, truncate=3, output=np.float32)
    return smooth * (subject.noise_hu / max(float(smooth.std()), 1e-6))


def make_phantom(
    seed: int | tuple[int, ...],
    category: str = 'CT-1',
    shape: tuple[int, int, int] = (192, 192, 40),
    spacing_mm: tuple[float, float, float] = (1.75, 1.75, 8.0),
) -> Phantom:
    """Makes one study; equal arguments give equal arrays, bit for bit.

    The same seed in another category is the same chest with other lesions, noise included: 'CT-0'
    is the true healthy version of every other. Chests shrink to fit a small field of view.

    Args:
        seed: not negative; a tuple of such numbers is a seed too.
        category: 'CT-0' (healthy) to 'CT-4', MosMed's classes by infected share of the lungs.
        shape, spacing_mm: of the file, (X, Y, Z); at least 16 × 16 × 4 voxels.

    Raises:
        ValueError: unknown category, or a shape or spacing that is out of range.
    """
    if category not in lesions.CATEGORIES:
        raise ValueError(f'category {category!r} is not one of {lesions.CATEGORIES}')
    if min(shape[:2]) < 16 or shape[2] < 4 or min(spacing_mm) <= 0:
        raise ValueError(f'shape {shape} with spacing {spacing_mm} mm cannot hold a chest')
    streams = np.random.SeedSequence(seed).spawn(5)
    subject_rng, body_rng, tree_rng, lesion_rng, noise_rng = map(np.random.default_rng, streams)
    grid = anatomy.make_grid(shape, spacing_mm)
    subject = anatomy.draw_subject(subject_rng, grid)
    outlines = anatomy.draw_outlines(body_rng, grid, subject)
    lungs = outlines.lungs >= 0.5
    image = anatomy.paint_body(body_rng, grid, subject, outlines)
    tissue = anatomy.paint_parenchyma(body_rng, grid, subject, outlines)

    core = lungs & (outlines.cavity > 5)  # the last millimetres under the pleura have no vessels
    lesion = np.zeros(grid.shape, np.uint8)
    if category != 'CT-0':
        lungs_ml = float(lungs.sum() * np.prod(spacing_mm)) / 1000
        volume_ml = lesions.draw_volume_ml(lesion_rng, category, lungs_ml)
        drawn = lesions.draw_lesions(lesion_rng, grid, outlines, lungs, volume_ml)
        lesion[drawn.mask] = 1
        # Opacities only add to tissue; vessels are laid over them and stay visible.
        tissue += drawn.opacity * np.maximum(drawn.target_hu - tissue, 0)

    anatomy.blend(image, outlines.lungs, tissue)
    vessel, wall, lumen = _draw_vessels_and_airways(tree_rng, grid, subject, core)
    anatomy.blend(image, wall, np.maximum(image, 0))
    anatomy.blend(image, vessel, np.maximum(image, _VESSEL_HU))
    anatomy.blend(image, lumen, np.minimum(image, _AIR_HU))
    _draw_findings(tree_rng, grid, subject, lungs, image)
    image += _noise(noise_rng, grid, subject)
    np.clip(np.rint(image, out=image), -1024, 3071, out=image)
    affine = np.diag([-spacing_mm[0], spacing_mm[1], spacing_mm[2], 1.0])
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    volumes = (image.astype(np.int16), lesion, lungs.astype(np.uint8))
    # The grid's y runs to Anterior, a canonical array's to Posterior.
    return Phantom(*(volume[:, ::-1] for volume in volumes), affine)


@dataclasses.dataclass(frozen=True)
class _Order:
    """One study to make: its registry row and what make_phantom needs."""

    study_id: str
    category: str
    seed: tuple[int, int]
    image: str  # file in the data set
    mask: str | None


def _list_orders(
    num_healthy: int, num_covid: int, num_masked: int, severe_shares: Sequence[float], seed: int
) -> list[_Order]:
    severe = lesions.CATEGORIES[2:]
    counts = {c: round(num_covid * share) for c, share in zip(severe, severe_shares, strict=True)}
    counts['CT-1'] = num_covid - sum(counts.values())
    counts['CT-0'] = num_healthy
    if not 0 <= num_masked <= num_covid or min(num_healthy, num_covid) < 0:
        raise ValueError(
            f'{num_healthy} healthy and {num_covid} COVID studies: cannot give {num_masked} of '
            'them masks'
        )
    categories = [c for c in lesions.CATEGORIES for _ in range(counts[c])]
    orders = []
    for index, category in enumerate(categories):
        name, is_masked = f'study_{index + 1:04d}', 0 <= index - num_healthy < num_masked
        image = f'studies/{category}/{name}.nii.gz'
        mask = f'masks/{name}_mask.nii.gz' if is_masked else None
        orders.append(_Order(name, category, (seed, index), image, mask))
    return orders


def _write_study(folder: pathlib.Path, order: _Order, shape, spacing_mm) -> None:
    phantom = make_phantom(order.seed, order.category, shape, spacing_mm)
    if order.mask:
        nifti.write_volume(folder / order.mask, phantom.lesion, phantom.affine)
    # Last, so that a study whose image is there has its mask too.
    nifti.write_volume(folder / order.image, phantom.image, phantom.affine)


def _write_registry(folder: pathlib.Path, orders: list[_Order]) -> None:
    book = openpyxl.Workbook()
    sheet = book.active
    sheet.append(_COLUMNS)
    for order in orders:
        mask = f'/{order.mask}' if order.mask else None
        sheet.append((order.study_id, order.category, f'/{order.image}', mask))
    with atomic.new_file(folder / _REGISTRY_FILE) as temporary:
        book.save(temporary)


def _claim_folder(folder: pathlib.Path, settings: dict) -> None:
    """Notes the settings in the folder, or checks them against those noted there before."""
    text, note = json.dumps(settings, indent=1), folder / _SETTINGS_FILE
    if note.is_file():
        if note.read_text(encoding='utf-8') != text:
            raise errors.InputError(
                f'{folder}: holds phantoms of other settings; delete it or name another folder'
            )
    elif folder.is_dir() and any(folder.iterdir()):
        raise errors.InputError(
            f'{folder}: holds files that are no phantoms; name an empty or a new folder'
        )
    else:
        atomic.write_text(note, text)


def write_phantom_data_set(
    folder: str | os.PathLike,
    *,
    num_healthy: int,
    num_covid: int,
    num_masked: int,
    seed: int,
    severe_shares: Sequence[float] = _SEVERE_SHARES,
    shape: tuple[int, int, int] = (192, 192, 40),
    spacing_mm: tuple[float, float, float] = (1.75, 1.75, 8.0),
    num_workers: int = 1,
) -> list[str]:
    """Writes a data set in MosMed's layout; studies that are there already are kept.

    Studies are numbered as in MosMed: CT-0 first, then CT-1 to CT-4; the first num_masked COVID
    studies have masks. Every file appears whole, and the registry last: a folder with a registry is
    complete. A study's chest depends on the seed and its number alone, whatever its category.

    Args:
        folder: new, empty, or left by an earlier call with the same settings.
        num_healthy, num_covid: studies in CT-0, and in CT-1 to CT-4 together.
        num_masked: COVID studies that get a mask file.
        severe_shares: of the COVID studies, those in CT-2, CT-3 and CT-4; the rest is CT-1.
        shape, spacing_mm: (X, Y, Z) of every study's file.
        num_workers: processes; 0 or 1 is this one.

    Returns:
        The ids of the studies written by this call.

    Raises:
        ValueError: more masks than COVID studies, or as make_phantom does.
        InputError: the folder holds something else, or a process was killed.
    """
    folder = pathlib.Path(folder)
    orders = _list_orders(num_healthy, num_covid, num_masked, severe_shares, seed)
    settings = {
        'num_healthy': num_healthy,
        'num_covid': num_covid,
        'num_masked': num_masked,
        'seed': seed,
        'shape': list(shape),
        'spacing_mm': list(spacing_mm),
    }
    if tuple(severe_shares) != _SEVERE_SHARES:  # without a word of it in older folders
        settings['severe_shares'] = list(severe_shares)
    _claim_folder(folder, settings)
    missing = [order for order in orders if not (folder / order.image).is_file()]
    with tqdm.tqdm(total=len(missing), desc='phantoms', unit='study', disable=None) as bar:
        write = functools.partial(_write_study, folder, shape=shape, spacing_mm=spacing_mm)
        for _ in map_in_processes(write, missing, num_workers, 'phantoms'):
            bar.update()
    if missing or not (folder / _REGISTRY_FILE).is_file():
        _write_registry(folder, orders)
    return [order.study_id for order in missing]
