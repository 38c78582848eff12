"""The pictures of a page's slice viewer: the slices of a study, small enough for one file."""

import base64
import dataclasses
import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageColor
from scipy import ndimage

from covseg_jax.predict import preview

# Pixels of a slice's longer side → qualities of WebP. The first that is small enough is taken.
_FINENESS = {288: (75, 50, 30), 192: (40,), 128: (30,), 64: (30,)}


@dataclasses.dataclass(frozen=True)
class Limits:
    """How much of a study its pictures show."""

    max_bytes: int = 500_000  # of all of them, as text; they are made coarser until they fit
    max_slices: int = 64  # of a study with more, as many are shown, evenly spaced


FEW = Limits()  # in a page of few studies
# Of the pictures of a page, and of the studies that it has pictures of.
PAGE_BYTES, MAX_VIEWS = 20_000_000, 200


def limits_of(num_studies: int) -> Limits:
    """The limits of each of so many studies of one page."""
    if num_studies * FEW.max_bytes <= PAGE_BYTES:
        return FEW
    return Limits(max_bytes=PAGE_BYTES // min(num_studies, MAX_VIEWS), max_slices=24)


@dataclasses.dataclass(frozen=True)
class Layer:
    """A mask that is drawn over a scan."""

    mask: np.ndarray  # (Z, Y, X) boolean
    colour: str  # '#rrggbb', of its border
    fill: int = 70  # how opaque its inside is, of 255


def draw_views(
    study_id: str,
    image_hu: np.ndarray,
    lungs: np.ndarray,
    layers: Mapping[str, Layer],
    spacing_mm: tuple[float, float, float],
    limits: Limits,
    most_of: Sequence[str],
) -> dict:
    """The slices of one study as atlases: one picture of all slices, and one a mask.

    The slices are those with lungs or a mask, cropped to their box, in square pixels, in the lung
    window. An atlas holds them in rows of `columns`, from the base of the lungs up.

    Args:
      study_id: the study's name.
      image_hu: (Z, Y, X) canonical, in HU.
      lungs: (Z, Y, X) boolean.
      layers: the masks by name; a later one is drawn over those before.
      spacing_mm: (z, y, x).
      limits: pictures are made coarser until they fit, down to 64 pixels a slice.
      most_of: the viewer opens on the slice in which the first of these masks that is not empty
        has most. That slice is always among those shown.

    Returns:
      What the page's script reads: `study_id`; `slices`, their numbers on the native grid; `start`,
      on which of them the viewer opens; `width`, `height`, `columns`; `scan` and `masks`, the
      pictures as data URLs, masks by name.
    """
    shown = np.logical_or.reduce([lungs, *(layer.mask for layer in layers.values())])
    most = _fullest_slice([layers[name].mask for name in most_of])
    slices = preview.choose_slices(shown, limits.max_slices, most)
    rows, cols = preview.crop_box(shown, spacing_mm)
    columns = math.ceil(math.sqrt(len(slices)))
    grey = [preview.to_grey(image_hu[z][rows, cols]) for z in slices]
    for side, qualities in _FINENESS.items():
        size = preview.fit_size(rows, cols, spacing_mm, side, min(spacing_mm[1:]))
        urls = {}
        for name, layer in layers.items():
            planes = [preview.fit_plane(layer.mask[z][rows, cols], size) for z in slices]
            urls[name] = _mask_url(preview.lay_atlas(planes, columns), layer)
        left = limits.max_bytes - sum(len(url) for url in urls.values())
        atlas = preview.lay_atlas([preview.fit_plane(each, size) for each in grey], columns)
        scan = _scan_url(atlas, qualities, left)
        if len(scan) <= left:
            break
    return {
        'study_id': study_id,
        'slices': [int(z) for z in slices],
        'start': 0 if most is None else int(np.abs(slices - most).argmin()),
        'width': size[0],
        'height': size[1],
        'columns': columns,
        'scan': scan,
        'masks': urls,
    }


def _fullest_slice(masks: Sequence[np.ndarray]) -> int | None:
    for mask in masks:
        areas = mask.sum(axis=(1, 2))
        if areas.any():
            return int(areas.argmax())
    return None


def _mask_url(mask: np.ndarray, layer: Layer) -> str:
    # A mask ends at the border of its slice: there it meets the slice beside it.
    border = mask & ~ndimage.binary_erosion(mask)
    picture = Image.fromarray(mask.astype(np.uint8) + border, mode='P')
    alpha = (0, layer.fill, 255)  # outside the mask, inside it, on its border
    picture.putpalette(list(ImageColor.getrgb(layer.colour)) * len(alpha))
    file = io.BytesIO()
    # Optimised it would be a seventh smaller, and take nine times as long.
    picture.save(file, 'PNG', bits=2, transparency=bytes(alpha))
    return _data_url('image/png', file)


def _scan_url(atlas: np.ndarray, qualities: tuple[int, ...], max_bytes: int) -> str:
    picture = Image.fromarray(atlas)
    for quality in qualities:
        file = io.BytesIO()
        picture.save(file, 'WEBP', quality=quality, method=2)  # 4: 4 % smaller, twice the time
        url = _data_url('image/webp', file)
        if len(url) <= max_bytes:
            break
    return url


def _data_url(kind: str, file: io.BytesIO) -> str:
    return f'data:{kind};base64,{base64.b64encode(file.getvalue()).decode("ascii")}'
