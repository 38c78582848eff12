"""A study at a glance: its slices in one picture, and what pictures of slices have in common."""

import functools
import math
import pathlib

import numpy as np
from PIL import Image, ImageColor, ImageDraw
from PIL.ImageFont import load_default
from scipy import ndimage

from covseg_jax import written

# Level -600, width 1500 HU: the window in which lungs are read.
LUNG_WINDOW_HU = (-1350.0, 150.0)
# Okabe and Ito's colours, told apart by colour-blind readers too.
TRUTH_COLOUR, PSEUDO_COLOUR, PREDICTION_COLOUR = '#009e73', '#56b4e9', '#e69f00'
LUNGS_COLOUR, DISAGREEMENT_COLOUR = '#56b4e9', '#cc79a7'

_MARGIN_MM = 10.0
_MAX_TILES, _COLUMNS = 20, 5
_TILE_SIDE = 340  # pixels of a tile's longer side
_FILL = 0.18  # of the colour inside a lesion; so little that its density is still seen
_TITLE_SIZE, _NOTE_SIZE, _LABEL_SIZE = 24, 15, 17
_HEAD_HEIGHT, _EDGE, _GAP = 66, 8, 2


def write_preview(
    path: pathlib.Path,
    image_hu: np.ndarray,
    mask: np.ndarray,
    lungs: np.ndarray,
    spacing_mm: tuple[float, float, float],
    title: str,
) -> None:
    """Writes a PNG of up to 20 axial slices with the lesion outlined, from the apex to the base.

    The slices lie evenly over the lungs; the one with most lesion is always among them. They are
    in the lung window, cropped to the lungs and 10 mm around, in square pixels, and bear their
    number on the canonical grid (0 is the lowest slice).

    Image and masks are (Z, Y, X) canonical, the masks boolean; either may be empty. Without both,
    all slices count. `spacing_mm` is (z, y, x), and the title is the line on top.
    """
    shown, areas = lungs | mask, mask.sum(axis=(1, 2))
    most = int(areas.argmax()) if areas.any() else None
    slices = choose_slices(shown, _MAX_TILES, most)[::-1]
    rows, cols = crop_box(shown, spacing_mm)
    size = fit_size(rows, cols, spacing_mm, _TILE_SIDE)
    tiles = [
        _draw_tile(to_grey(image_hu[z][rows, cols]), mask[z][rows, cols], size) for z in slices
    ]
    columns = min(_COLUMNS, len(tiles))
    montage = Image.fromarray(lay_atlas(tiles, columns))
    low, high = LUNG_WINDOW_HU
    note = (
        f'{len(slices)} of {len(image_hu)} slices from apex to base, '
        f"R: the patient's right, window {low:.0f} to {high:.0f} HU"
    )
    picture = _with_head(montage, title, note)
    draw = ImageDraw.Draw(picture)
    write = functools.partial(
        draw.text, fill='white', font=load_default(_LABEL_SIZE), stroke_width=2, stroke_fill='black'
    )
    for number, z in enumerate(slices):
        row, column = divmod(number, columns)
        corner = column * size[0] + _EDGE, _HEAD_HEIGHT + row * size[1] + _EDGE // 2
        write(corner, f'{z}  most lesion' if z == most else f'{z}')
    write((_EDGE, _HEAD_HEIGHT + size[1] // 2), 'R')
    with written.new_file(path) as temporary:
        # Fast: the noise of a scan hardly gets smaller by looking longer.
        picture.save(temporary, 'PNG', compress_level=1)


def choose_slices(shown: np.ndarray, max_slices: int, always: int | None = None) -> np.ndarray:
    """Numbers of at most `max_slices` slices, evenly spaced from the first to the last in which
    the boolean (Z, Y, X) array has something; over all slices where it is empty. One of these
    slices, `always`, takes the place of its nearest neighbour."""
    first, last = _span(shown.any(axis=(1, 2)))
    count = min(last - first + 1, max_slices)
    slices = np.linspace(first, last, count).round().astype(int)
    if always is not None:
        slices[np.abs(slices - always).argmin()] = always
    return slices


def crop_box(shown: np.ndarray, spacing_mm: tuple[float, float, float]) -> tuple[slice, slice]:
    """Rows and columns in which the boolean (Z, Y, X) array has something, and 10 mm around; all
    of them where it is empty."""
    plane, box = shown.any(axis=0), []
    for axis in (0, 1):
        first, last = _span(plane.any(axis=1 - axis))
        margin = math.ceil(_MARGIN_MM / spacing_mm[1 + axis])
        box.append(slice(max(0, first - margin), min(plane.shape[axis], last + margin + 1)))
    return box[0], box[1]


def _span(filled: np.ndarray) -> tuple[int, int]:
    """First and last place where the boolean array has something; its ends where it is empty."""
    places = np.flatnonzero(filled)
    return (int(places[0]), int(places[-1])) if places.size else (0, len(filled) - 1)


def fit_size(
    rows: slice,
    cols: slice,
    spacing_mm: tuple[float, float, float],
    side: int,
    finest_mm: float = 0.0,
) -> tuple[int, int]:
    """Width and height of a box in square pixels of at least `finest_mm`, `side` of them, or fewer,
    along its longer side."""
    height_mm = (rows.stop - rows.start) * spacing_mm[1]
    width_mm = (cols.stop - cols.start) * spacing_mm[2]
    pixel_mm = max(height_mm / side, width_mm / side, finest_mm)
    return max(1, round(width_mm / pixel_mm)), max(1, round(height_mm / pixel_mm))


def fit_plane(
    plane: np.ndarray, size: tuple[int, int], resampling: Image.Resampling = Image.Resampling.BOX
) -> np.ndarray:
    """A boolean or uint8 plane in another size (width, height)."""
    if plane.dtype == bool:
        return fit_plane(plane * np.uint8(255), size, resampling) > 127
    return np.asarray(Image.fromarray(plane).resize(size, resampling))


def to_grey(plane_hu: np.ndarray) -> np.ndarray:
    """HU in the lung window as uint8 grey."""
    low, high = LUNG_WINDOW_HU
    return ((plane_hu - low) * (255 / (high - low))).clip(0, 255).round().astype(np.uint8)


def lay_atlas(planes: list[np.ndarray], columns: int) -> np.ndarray:
    """Planes (H, W) or (H, W, C) in rows of `columns`, in one array; places left over are 0."""
    height, width, *channels = planes[0].shape
    shape = (math.ceil(len(planes) / columns) * height, columns * width, *channels)
    atlas = np.zeros(shape, planes[0].dtype)
    for number, plane in enumerate(planes):
        row, column = divmod(number, columns)
        atlas[row * height : (row + 1) * height, column * width : (column + 1) * width] = plane
    return atlas


def _draw_tile(grey: np.ndarray, mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) uint8: a slice with the lesion filled faintly and outlined."""
    smooth = Image.Resampling.BICUBIC
    tile = np.repeat(fit_plane(grey, size, smooth)[..., None], 3, axis=2)
    lesion = fit_plane(mask, size, smooth)
    colour = np.array(ImageColor.getrgb(PREDICTION_COLOUR))
    tile[lesion] = (1 - _FILL) * tile[lesion] + _FILL * colour
    # Around the lesion, not on it: small ones would be all outline.
    tile[ndimage.binary_dilation(lesion) & ~lesion] = colour
    tile[-_GAP:], tile[:, -_GAP:] = 0, 0
    return tile


def _with_head(montage: Image.Image, title: str, note: str) -> Image.Image:
    """The montage with title and note over it, made wider where they need it."""
    texts = ((title, 8, 'white', _TITLE_SIZE), (note, 41, '#a0a0a0', _NOTE_SIZE))
    longest = max(load_default(font_size).getlength(text) for text, _, _, font_size in texts)
    width = max(montage.width, math.ceil(longest) + 2 * _EDGE)
    picture = Image.new('RGB', (width, montage.height + _HEAD_HEIGHT))
    picture.paste(montage, (0, _HEAD_HEIGHT))
    draw = ImageDraw.Draw(picture)
    for text, top, colour, font_size in texts:
        draw.text((_EDGE, top), text, colour, load_default(font_size))
    return picture
