"""Draws the pictures of README and docs from a phantom, with the model that comes with the code:
`python -m launch.make_figures [FOLDER]`, by default docs/figures.
"""

import pathlib
import sys
import tempfile

from covseg_jax import cpu

if __name__ == '__main__':
    cpu.tune_process()  # first of all: what is imported before is imported twice

import numpy as np
from PIL import Image, ImageColor, ImageDraw
from PIL.ImageFont import load_default
from scipy import ndimage

import covseg_jax
from covseg_jax.imaging import nifti
from covseg_jax.imaging.studies import find_inputs
from covseg_jax.phantom.studies import Phantom, make_phantom
from covseg_jax.predict import preview
from covseg_jax.predict.studies import Extras, predict_studies

ROOT = pathlib.Path(__file__).parents[1]
SEED, CATEGORY = 11, 'CT-2'  # a chest with lesions in both lungs
SHAPE, SPACING_MM = (288, 288, 40), (1.2, 1.2, 8.0)  # x y z
MOST_BYTES = 300_000  # of a picture: it is in every clone
_SIDE, _HEAD = 300, 46  # pixels of a panel's longer side, and of the words over it
_PREVIEW_WIDTH = 860
_DIFFERENCE_HU = 500  # what is added to the density: white in its panel


def predict_phantom(folder: pathlib.Path, phantom: Phantom) -> tuple[np.ndarray, Image.Image]:
    """The shipped model's mask of a phantom, (Z, Y, X) bool canonical, and its preview as
    `predict --preview` writes it; files lie in `folder`."""
    scan, output = folder / 'phantom.nii.gz', folder / 'predicted'
    nifti.write_volume(scan, phantom.image, phantom.affine)
    _, faults = predict_studies(
        find_inputs(scan), covseg_jax.load(), output, wanted=Extras(preview=True)
    )
    if faults:
        sys.exit(f'error: {faults[0]}')
    mask = nifti.read_volume(output / 'phantom_mask.nii.gz').array > 0
    with Image.open(output / 'phantom_preview.png') as picture:
        return mask, picture.convert('RGB')


def draw_panels(phantom: Phantom, healthy: Phantom, mask: np.ndarray) -> Image.Image:
    """The slice with most lesion: scan, healthy twin, what lesions add, and the model's mask."""
    z = int(phantom.lesion.sum(axis=(1, 2)).argmax())
    rows, cols = preview.crop_box(phantom.lungs > 0, SPACING_MM[::-1])
    size = preview.fit_size(rows, cols, SPACING_MM[::-1], _SIDE)
    smooth = Image.Resampling.BICUBIC

    def grey(plane: np.ndarray) -> np.ndarray:
        return np.repeat(preview.fit_plane(plane[rows, cols], size, smooth)[..., None], 3, axis=2)

    added = phantom.image[z].astype(np.int32) - healthy.image[z]
    scan = grey(preview.to_grey(phantom.image[z]))
    panels = {
        'a phantom: a synthetic scan\nwith COVID-19-like lesions': scan,
        'its healthy twin: the same\nphantom without lesions': grey(
            preview.to_grey(healthy.image[z])
        ),
        f'scan - healthy twin,\n0 to {_DIFFERENCE_HU} HU': grey(
            (added * (255 / _DIFFERENCE_HU)).clip(0, 255).astype(np.uint8)
        ),
        "the shipped model's mask (orange)\nand the true one (green)": scan.copy(),
    }
    marked = list(panels.values())[-1]
    found, true = (
        preview.fit_plane(each[z][rows, cols] > 0, size, smooth) for each in (mask, phantom.lesion)
    )
    # One outside its edge and one inside, so that both are seen where they agree.
    edges = (
        (ndimage.binary_dilation(found, iterations=2) & ~found, preview.PREDICTION_COLOUR),
        (true & ~ndimage.binary_erosion(true, iterations=2), preview.TRUTH_COLOUR),
    )
    for edge, colour in edges:
        marked[edge] = ImageColor.getrgb(colour)
    atlas = Image.fromarray(preview.lay_atlas(list(panels.values()), len(panels)))
    picture = Image.new('RGB', (atlas.width, atlas.height + _HEAD), 'white')
    picture.paste(atlas, (0, _HEAD))
    draw = ImageDraw.Draw(picture)
    for number, title in enumerate(panels):
        draw.multiline_text((number * size[0] + 6, 4), title, 'black', load_default(15))
    return picture


def _palette() -> Image.Image:
    """Greys, and both colours over greys as thinly as pictures lay them: of so few colours the
    noise of a scan takes little room."""
    greys = np.linspace(0, 255, 40)[:, None].repeat(3, axis=1)
    tints = [
        (1 - share) * greys[::4] + share * np.array(ImageColor.getrgb(colour))
        for colour in (preview.TRUTH_COLOUR, preview.PREDICTION_COLOUR)
        for share in (0.18, 0.5, 0.75, 1)
    ]
    palette = Image.new('P', (1, 1))
    palette.putpalette(np.concatenate([greys, *tints]).round().astype(np.uint8).tobytes())
    return palette


def save_small(picture: Image.Image, path: pathlib.Path) -> None:
    """Writes a PNG of few colours."""
    few = picture.quantize(palette=_palette(), dither=Image.Dither.NONE)
    few.save(path, 'PNG', optimize=True)
    if path.stat().st_size > MOST_BYTES:
        sys.exit(f'error: {path}: has {path.stat().st_size} bytes, at most {MOST_BYTES} are wanted')
    print(f'{path.stat().st_size:>7} {path}')


def main(folder: pathlib.Path) -> None:
    """Writes the pictures into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    phantom = make_phantom(SEED, CATEGORY, SHAPE, SPACING_MM)
    healthy = make_phantom(SEED, 'CT-0', SHAPE, SPACING_MM)
    with tempfile.TemporaryDirectory() as temporary:
        mask, shown = predict_phantom(pathlib.Path(temporary), phantom)
    save_small(draw_panels(phantom, healthy, mask), folder / 'phantom.png')
    height = round(shown.height * _PREVIEW_WIDTH / shown.width)
    small = shown.resize((_PREVIEW_WIDTH, height), Image.Resampling.LANCZOS)
    save_small(small, folder / 'preview.png')


if __name__ == '__main__':
    main(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / 'docs' / 'figures')
