"""The pictures of the report's slice viewer: every slice of a study, small enough for one file."""

import base64
import io
import math

import numpy as np
from matplotlib import colors
from PIL import Image
from scipy import ndimage

from covseg_jax.evaluation.figures import (
    LUNG_WINDOW_HU,
    PREDICTION_COLOUR,
    PSEUDO_COLOUR,
    TRUTH_COLOUR,
    CaseImages,
)

# Pixels of a slice's longer side, and quality of WebP: the first that is small enough is taken.
_FINENESS = ((288, 75), (288, 50), (288, 30), (192, 40), (128, 30), (64, 30))
MAX_SLICES = 64  # a study of more shows them evenly spaced
_MARGIN_MM = 10.0
_ALPHA = (0, 70, 255)  # outside a mask, inside it, on its border


def draw_views(case: CaseImages, max_bytes: int) -> dict:
    """The slices of one study as atlases: one picture of all slices, and one a mask.

    The slices are those with lungs, cropped to the lungs' and masks' box, in square pixels, in the
    lung window. An atlas holds them in rows of `columns`, from the top of the lungs down.

    Args:
      case: the study.
      max_bytes: all pictures together, as text, are made so coarse that they have no more (at
        64 pixels a slice they may).

    Returns:
      What the page's script reads: `study_id`; `slices`, their numbers on the native grid; `start`,
      which of them has most lesion; `width`, `height`, `columns`; `scan` and `masks`, the pictures
      as data URLs, masks by name.
    """
    masks = {
        'truth': (case.truth, TRUTH_COLOUR),
        'pseudo-mask': (case.pseudo_mask, PSEUDO_COLOUR),
        'prediction': (case.prediction, PREDICTION_COLOUR),
    }
    masks = {name: drawn for name, drawn in masks.items() if drawn[0] is not None}
    shown = np.logical_or.reduce([case.lungs, *(mask for mask, _ in masks.values())])
    slices = _choose_slices(shown)
    rows, cols = _box(shown, case.spacing_mm)
    columns = math.ceil(math.sqrt(len(slices)))
    low, high = LUNG_WINDOW_HU
    grey = [(case.image_hu[z][rows, cols] - low) * (255 / (high - low)) for z in slices]
    grey = [each.clip(0, 255).round().astype(np.uint8) for each in grey]
    for side, quality in _FINENESS:
        size = _size(rows, cols, case.spacing_mm, side)
        scan = _scan_url(_atlas([_fit(each, size) for each in grey], columns), quality)
        urls = {}
        for name, (mask, colour) in masks.items():
            planes = [_fit(mask[z][rows, cols], size) for z in slices]
            urls[name] = _mask_url(_atlas(planes, columns), colour)
        if len(scan) + sum(len(url) for url in urls.values()) <= max_bytes:
            break
    areas = [case.truth[z].sum() or case.prediction[z].sum() / 1e6 for z in slices]
    return {
        'study_id': case.study_id,
        'slices': [int(z) for z in slices],
        'start': int(np.argmax(areas)),
        'width': size[0],
        'height': size[1],
        'columns': columns,
        'scan': scan,
        'masks': urls,
    }


def _choose_slices(shown: np.ndarray) -> np.ndarray:
    filled = np.flatnonzero(shown.any(axis=(1, 2)))
    first, last = (filled[0], filled[-1]) if filled.size else (0, len(shown) - 1)
    count = min(int(last - first) + 1, MAX_SLICES)
    return np.linspace(first, last, count).round().astype(int)


def _box(shown: np.ndarray, spacing_mm: tuple[float, float, float]) -> tuple[slice, slice]:
    box = []
    plane = shown.any(axis=0)
    for axis in (0, 1):
        filled = np.flatnonzero(plane.any(axis=1 - axis))
        margin = math.ceil(_MARGIN_MM / spacing_mm[1 + axis])
        first, last = (filled[0], filled[-1]) if filled.size else (0, plane.shape[axis] - 1)
        stop = min(plane.shape[axis], int(last) + margin + 1)
        box.append(slice(max(0, int(first) - margin), stop))
    return box[0], box[1]


def _size(
    rows: slice, cols: slice, spacing_mm: tuple[float, float, float], side: int
) -> tuple[int, int]:
    """Width and height in square pixels, none smaller than the scan's own."""
    height_mm = (rows.stop - rows.start) * spacing_mm[1]
    width_mm = (cols.stop - cols.start) * spacing_mm[2]
    pixel_mm = max(height_mm / side, width_mm / side, min(spacing_mm[1:]))
    return max(1, round(width_mm / pixel_mm)), max(1, round(height_mm / pixel_mm))


def _fit(plane: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A boolean or uint8 plane in another size."""
    if plane.dtype == bool:
        return _fit(plane * np.uint8(255), size) > 127
    return np.asarray(Image.fromarray(plane).resize(size, Image.Resampling.BOX))


def _atlas(planes: list[np.ndarray], columns: int) -> np.ndarray:
    height, width = planes[0].shape
    atlas = np.zeros((math.ceil(len(planes) / columns) * height, columns * width), planes[0].dtype)
    for number, plane in enumerate(planes):
        row, column = divmod(number, columns)
        atlas[row * height : (row + 1) * height, column * width : (column + 1) * width] = plane
    return atlas


def _mask_url(mask: np.ndarray, colour: str) -> str:
    # A mask ends at the border of its slice: there it meets the slice beside it.
    border = mask & ~ndimage.binary_erosion(mask)
    picture = Image.fromarray(mask.astype(np.uint8) + border, mode='P')
    rgb = [round(255 * each) for each in colors.to_rgb(colour)]
    picture.putpalette(rgb * len(_ALPHA))
    file = io.BytesIO()
    picture.save(file, 'PNG', bits=2, transparency=bytes(_ALPHA), optimize=True)
    return _data_url('image/png', file)


def _scan_url(atlas: np.ndarray, quality: int) -> str:
    file = io.BytesIO()
    Image.fromarray(atlas).save(file, 'WEBP', quality=quality, method=4)
    return _data_url('image/webp', file)


def _data_url(kind: str, file: io.BytesIO) -> str:
    return f'data:{kind};base64,{base64.b64encode(file.getvalue()).decode("ascii")}'
