"""Previews: which slices, where on the picture, and where the outline is."""

import numpy as np
import pytest
from PIL import Image, ImageColor

from covseg_jax import written
from covseg_jax.predict import preview

SPACING_MM = (8.0, 1.0, 1.0)
SHAPE = (41, 100, 130)
OUTLINE = ImageColor.getrgb(preview.PREDICTION_COLOUR)
LUNGS = np.zeros(SHAPE, bool)
LUNGS[3:38, 20:80, 15:115] = True  # with 10 mm around: 80 rows of 120 mm
TILE = (340, round(340 * 80 / 120))


def _write(folder, mask, lungs=LUNGS):
    image_hu = np.where(lungs, -850, 40).astype(np.int16)
    path = folder / 'study_0001_preview.png'
    preview.write_preview(path, image_hu, mask, lungs, SPACING_MM, 'study_0001: lesion 1.2 ml')
    assert written.is_ours(path)
    with Image.open(path) as picture:
        assert picture.format == 'PNG'
        return np.asarray(picture)


def _outlines(picture, num_tiles):
    """Where each tile has the outline's colour: {tile: (rows, columns)}, in order."""
    head = len(picture) - -(-num_tiles // 5) * TILE[1]
    is_outline = (picture == OUTLINE).all(axis=-1)
    assert not is_outline[:head].any()
    found = {}
    for tile in range(num_tiles):
        row, column = divmod(tile, 5)
        top, left = head + row * TILE[1], column * TILE[0]
        inside = is_outline[top : top + TILE[1], left : left + TILE[0]]
        if inside.any():
            found[tile] = np.nonzero(inside)
    return found


def test_preview_outlines_the_lesion_where_it_is(tmp_path):
    mask = np.zeros(SHAPE, bool)
    mask[37, 40:52, 65:89] = True  # in the uppermost slice of the lungs
    picture = _write(tmp_path, mask)
    # 20 tiles, 5 in a row, and the head
    assert picture.shape[1:] == (5 * TILE[0], 3)
    assert 0 < len(picture) - 4 * TILE[1] < 100
    found = _outlines(picture, 20)
    assert list(found) == [0]
    # The box begins at row 10, column 5; 340 / 120 pixels a millimetre; a pixel around.
    scale = 340 / 120
    for lines, (start, stop), origin in zip(found[0], ((40, 52), (65, 89)), (10, 5), strict=True):
        assert lines.min() == pytest.approx((start - origin) * scale - 1, abs=1.5)
        assert lines.max() == pytest.approx((stop - origin) * scale, abs=1.5)
    # An outline, not an area
    assert len(found[0][0]) == pytest.approx(2 * (12 + 24) * scale, rel=0.05)


@pytest.mark.parametrize('most', [4, 20, 36])
def test_preview_always_shows_the_slice_with_most_lesion(tmp_path, most):
    # None of these is among 20 of the lungs' 35 slices, evenly spaced.
    mask = np.zeros(SHAPE, bool)
    mask[most, 40:52, 65:89] = True
    assert len(_outlines(_write(tmp_path, mask), 20)) == 1


def test_preview_without_lesion_or_lungs_has_no_outline(tmp_path):
    empty = np.zeros(SHAPE, bool)
    assert not _outlines(_write(tmp_path, empty), 20)
    # All of the slices: 130 × 100 mm
    assert _write(tmp_path, empty, lungs=empty).shape[1] == 5 * 340
