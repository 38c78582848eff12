"""Masks on which our metrics are held against MONAI and seg-metrics, and what those two say.

    python -m tests.evaluation.oracle_masks

writes oracle_goldens.json. It runs where monai and seg-metrics are installed, which are not among
the project's requirements; test_oracles.py reads only the file.
"""

import importlib.metadata
import json
import logging
import math
import pathlib
import warnings
import zlib
from collections.abc import Iterator

import numpy as np
from scipy import ndimage

GOLDENS = pathlib.Path(__file__).with_name('oracle_goldens.json')
COLUMNS = ('name', 'crc32', 'dice', 'hd95_mm', 'nsd', 'seg_metrics_dice', 'seg_metrics_hd95_mm')
TOLERANCE_MM = 2.0

_NUM_BLOBS, _NUM_EACH_EDGE = 400, 8
# (step, number): together TOLERANCE_MM, but for rounding; the last lies over it by less than the
# relative 1e-5 that metrics.py forgives.
_TOLERANCE_STEPS_MM = (
    (2.0, 1),
    (1.0, 2),
    (0.4, 5),
    (0.1, 20),
    (2 / 3, 3),
    (2 / 7, 7),
    (2.00001, 1),
)

Pair = tuple[np.ndarray, np.ndarray]
Shape = tuple[int, ...]


def _draw_shape(rng: np.random.Generator) -> Shape:
    return tuple(int(n) for n in rng.integers((2, 4, 4), (12, 24, 24), endpoint=True))


def _draw_spacing_mm(rng: np.random.Generator) -> tuple[float, ...]:
    isotropic, thick, any_ = rng.uniform(0.5, 3), rng.uniform(3, 8), rng.uniform(0.4, 8, size=3)
    in_plane = rng.uniform(0.5, 1)
    drawn = ((isotropic,) * 3, (thick, in_plane, in_plane), any_)[rng.integers(3)]
    return tuple(round(float(step), 3) for step in drawn)


def _draw_blobs(rng: np.random.Generator, shape: Shape) -> Pair:
    """Two blobs of any density and smoothness, from alike to unrelated; neither is empty."""
    noise = rng.standard_normal((2, *shape))
    noise[1] += rng.choice([0, 1, 4]) * noise[0]
    smooth = ndimage.gaussian_filter(noise, (0, *rng.uniform(0, 3, size=3)))
    truth, prediction = (
        field > np.quantile(field, rng.uniform(low, 0.97))
        for field, low in zip(smooth, rng.choice([0.05, 0.6], size=2), strict=True)
    )
    return truth, prediction


def _draw_blob(rng: np.random.Generator, shape: Shape) -> np.ndarray:
    return _draw_blobs(rng, shape)[0]


def _draw_voxel(rng: np.random.Generator, shape: Shape) -> np.ndarray:
    voxel = np.zeros(shape, bool)
    voxel.flat[rng.integers(voxel.size)] = True
    return voxel


def _draw_specks(rng: np.random.Generator, shape: Shape) -> np.ndarray:
    return (rng.random(shape) < 0.02) | _draw_voxel(rng, shape)


def _draw_slice(rng: np.random.Generator, shape: Shape) -> np.ndarray:
    """A blob in one slice of a random axis."""
    axis = int(rng.integers(3))
    mask = np.zeros(shape, bool)
    plane = np.moveaxis(mask, axis, 0)[rng.integers(shape[axis])]
    plane[...] = _draw_blob(rng, plane[None].shape)[0]
    return mask


def _touch_borders(rng: np.random.Generator, shape: Shape) -> Pair:
    """A blob and three bars from border to border; and the six faces of the array."""
    bars = _draw_blob(rng, shape)
    for axis in range(3):
        np.moveaxis(bars, axis, 0)[:, 1, 1] = True
    faces = np.ones(shape, bool)
    faces[1:-1, 1:-1, 1:-1] = False
    return (bars, faces) if rng.random() < 0.5 else (faces, bars)


def _draw_far_apart(rng: np.random.Generator, shape: Shape) -> Pair:
    """Blobs in opposite corners."""
    truth, prediction = np.zeros((2, *shape), bool)
    corner = tuple(slice(0, max(1, n // 5)) for n in shape)
    truth[corner] = _draw_blob(rng, shape)[corner]
    truth[0, 0, 0] = True
    prediction[corner] = _draw_blob(rng, shape)[corner]
    prediction[0, 0, 0] = True
    return truth, prediction[::-1, ::-1, ::-1].copy()


def _draw_nested(rng: np.random.Generator, shape: Shape) -> Pair:
    blob = _draw_blob(rng, shape)
    return blob, ndimage.binary_dilation(blob)


def _draw_same(rng: np.random.Generator, shape: Shape) -> Pair:
    blob = _draw_blob(rng, shape)
    return blob, blob


_EDGES = {
    'empty_empty': lambda rng, shape: (np.zeros(shape, bool), np.zeros(shape, bool)),
    'empty_full': lambda rng, shape: (np.zeros(shape, bool), np.ones(shape, bool)),
    'full_empty': lambda rng, shape: (np.ones(shape, bool), np.zeros(shape, bool)),
    'full_full': lambda rng, shape: (np.ones(shape, bool), np.ones(shape, bool)),
    'full_blob': lambda rng, shape: (np.ones(shape, bool), _draw_blob(rng, shape)),
    'blob_full': lambda rng, shape: (_draw_blob(rng, shape), np.ones(shape, bool)),
    'empty_blob': lambda rng, shape: (np.zeros(shape, bool), _draw_blob(rng, shape)),
    'blob_empty': lambda rng, shape: (_draw_blob(rng, shape), np.zeros(shape, bool)),
    'empty_voxel': lambda rng, shape: (np.zeros(shape, bool), _draw_voxel(rng, shape)),
    'voxel_empty': lambda rng, shape: (_draw_voxel(rng, shape), np.zeros(shape, bool)),
    'voxel_voxel': lambda rng, shape: (_draw_voxel(rng, shape), _draw_voxel(rng, shape)),
    'voxel_blob': lambda rng, shape: (_draw_voxel(rng, shape), _draw_blob(rng, shape)),
    'blob_specks': lambda rng, shape: (_draw_blob(rng, shape), _draw_specks(rng, shape)),
    'slice_slice': lambda rng, shape: (_draw_slice(rng, shape), _draw_slice(rng, shape)),
    'slice_blob': lambda rng, shape: (_draw_slice(rng, shape), _draw_blob(rng, shape)),
    'one_slice_array': lambda rng, shape: _draw_blobs(rng, (1, *shape[1:])),
    'one_row_array': lambda rng, shape: _draw_blobs(rng, (1, 1, *shape[2:])),
    'borders': _touch_borders,
    'far_apart': _draw_far_apart,
    'nested': _draw_nested,
    'same': _draw_same,
}


def oracle_masks() -> Iterator[tuple[str, np.ndarray, np.ndarray, tuple[float, ...]]]:
    """(name, truth, prediction, spacing_mm): (Z, Y, X) boolean, up to 12×24×24, always the same."""
    rng = np.random.default_rng(2)
    for index in range(_NUM_BLOBS):
        yield f'blobs_{index}', *_draw_blobs(rng, _draw_shape(rng)), _draw_spacing_mm(rng)
    for name, draw in _EDGES.items():
        for index in range(_NUM_EACH_EDGE):
            yield f'{name}_{index}', *draw(rng, _draw_shape(rng)), _draw_spacing_mm(rng)
    for step_mm, num in _TOLERANCE_STEPS_MM:
        truth = np.zeros((2, 3, 24), bool)
        truth[1, 1, 2] = True
        yield f'tolerance_{step_mm:.5f}', truth, np.roll(truth, num, axis=2), (3.0, 3.0, step_mm)


def checksum(truth: np.ndarray, prediction: np.ndarray, spacing_mm: tuple[float, ...]) -> int:
    """crc32 of all that an oracle is given."""
    given = repr((truth.shape, spacing_mm)).encode()
    return zlib.crc32(given + truth.tobytes() + prediction.tobytes())


def ask_monai(
    truth: np.ndarray, prediction: np.ndarray, spacing_mm: tuple[float, ...]
) -> list[float]:
    """Dice, HD95 and NSD, as MONAI has them by default."""
    import torch
    from monai import metrics

    pair = {
        'y_pred': torch.from_numpy(prediction)[None, None].float(),
        'y': torch.from_numpy(truth)[None, None].float(),
        'include_background': True,
    }
    found = (
        metrics.compute_dice(**pair),
        metrics.compute_hausdorff_distance(**pair, percentile=95, spacing=spacing_mm),
        metrics.compute_surface_dice(**pair, class_thresholds=[TOLERANCE_MM], spacing=spacing_mm),
    )
    return [each.item() for each in found]


def ask_seg_metrics(
    truth: np.ndarray, prediction: np.ndarray, spacing_mm: tuple[float, ...]
) -> list[float]:
    """Dice and HD95 of masks padded by a voxel: for it the border of the array is not outside."""
    from seg_metrics import seg_metrics

    padded = [np.pad(mask, 1).astype(np.uint8) for mask in (prediction, truth)]
    found = seg_metrics.computeQualityMeasures(
        *padded, np.array(spacing_mm[::-1]), ['dice', 'hd95'], fullyConnected=False
    )
    return [float(found[name]) for name in ('dice', 'hd95')]


def main() -> None:
    """Asks both of every mask and writes the file: one row a mask, null for NaN."""
    warnings.simplefilter('ignore')
    logging.disable()
    rows = []
    for name, *given in oracle_masks():
        answers = ask_monai(*given) + ask_seg_metrics(*given)
        answers = [None if math.isnan(value) else round(value, 7) for value in answers]
        rows.append(json.dumps([name, checksum(*given), *answers], allow_nan=False))
    versions = {
        name: importlib.metadata.version(name)
        for name in ('monai', 'torch', 'seg-metrics', 'SimpleITK', 'numpy', 'scipy')
    }
    head = f'"versions": {json.dumps(versions)},\n"columns": {json.dumps(COLUMNS)},\n"rows": [\n'
    GOLDENS.write_text('{' + head + ',\n'.join(rows) + '\n]}\n', encoding='utf-8')


if __name__ == '__main__':
    main()
