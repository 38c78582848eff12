"""The pictures of the report's slice viewer: every slice of a study, small enough for one file."""

import base64
import io
import math

import numpy as np
from matplotlib import colors
from PIL import Image
from scipy import ndimage

from covseg_jax.evaluation.figures import MASK_COLOURS, CaseImages
from covseg_jax.predict import preview

# Pixels of a slice's longer side → qualities of WebP. The first that is small enough is taken.
_FINENESS = {288: (75, 50, 30), 192: (40,), 128: (30,), 64: (30,)}
MAX_SLICES = 64  # of a study with more, as many are shown, evenly spaced
_ALPHA = (0, 70, 255)  # outside a mask, inside it, on its border


def draw_views(case: CaseImages, max_bytes: int) -> dict:
    """The slices of one study as atlases: one picture of all slices, and one a mask.

    The slices are those with lungs, cropped to the lungs' and masks' box, in square pixels, in the
    lung window. An atlas holds them in rows of `columns`, from the base of the lungs up.

    Args:
      case: the study.
      max_bytes: of all pictures together, as text. They are made coarser until they fit, down to 64
        pixels a slice.

    Returns:
      What the page's script reads: `study_id`; `slices`, their numbers on the native grid; `start`,
      which of them has most lesion; `width`, `height`, `columns`; `scan` and `masks`, the pictures
      as data URLs, masks by name.
    """
    shown = np.logical_or.reduce([case.lungs, *case.masks.values()])
    slices = preview.choose_slices(shown, MAX_SLICES)
    rows, cols = preview.crop_box(shown, case.spacing_mm)
    columns = math.ceil(math.sqrt(len(slices)))
    grey = [preview.to_grey(case.image_hu[z][rows, cols]) for z in slices]
    for side, qualities in _FINENESS.items():
        size = preview.fit_size(rows, cols, case.spacing_mm, side, min(case.spacing_mm[1:]))
        urls = {}
        for name, mask in case.masks.items():
            planes = [preview.fit_plane(mask[z][rows, cols], size) for z in slices]
            urls[name] = _mask_url(preview.lay_atlas(planes, columns), MASK_COLOURS[name])
        left = max_bytes - sum(len(url) for url in urls.values())
        atlas = preview.lay_atlas([preview.fit_plane(each, size) for each in grey], columns)
        scan = _scan_url(atlas, qualities, left)
        if len(scan) <= left:
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


def _mask_url(mask: np.ndarray, colour: str) -> str:
    # A mask ends at the border of its slice: there it meets the slice beside it.
    border = mask & ~ndimage.binary_erosion(mask)
    picture = Image.fromarray(mask.astype(np.uint8) + border, mode='P')
    rgb = [round(255 * each) for each in colors.to_rgb(colour)]
    picture.putpalette(rgb * len(_ALPHA))
    file = io.BytesIO()
    picture.save(file, 'PNG', bits=2, transparency=bytes(_ALPHA), optimize=True)
    return _data_url('image/png', file)


def _scan_url(atlas: np.ndarray, qualities: tuple[int, ...], max_bytes: int) -> str:
    picture = Image.fromarray(atlas)
    for quality in qualities:
        file = io.BytesIO()
        picture.save(file, 'WEBP', quality=quality, method=4)
        url = _data_url('image/webp', file)
        if len(url) <= max_bytes:
            break
    return url


def _data_url(kind: str, file: io.BytesIO) -> str:
    return f'data:{kind};base64,{base64.b64encode(file.getvalue()).decode("ascii")}'
