"""Where the notebooks work: a temporary folder, in which the commands of this checkout run."""

import os
import pathlib
import sys
import tempfile

from matplotlib_inline.backend_inline import set_matplotlib_formats
from PIL import Image

_CHECKOUT = pathlib.Path(__file__).resolve().parents[1]


def enter() -> None:
    """Goes to a new temporary folder, or to the one that COVSEG_NOTEBOOKS names. The package and
    configs/ are found from there, by Python and by commands."""
    os.chdir(os.environ.get('COVSEG_NOTEBOOKS') or tempfile.mkdtemp())
    if not os.path.exists('configs'):
        os.symlink(_CHECKOUT / 'configs', 'configs')
    sys.path.insert(0, str(_CHECKOUT))
    os.environ['PYTHONPATH'] = str(_CHECKOUT)
    set_matplotlib_formats('jpeg', pil_kwargs={'quality': 85})  # noise makes large PNGs


def shrunk(path: str, width: int) -> Image.Image:
    """A picture at so many pixels of width, in few colours: notebooks stay small."""
    picture = Image.open(path).convert('RGB')
    picture = picture.resize((width, width * picture.height // picture.width), Image.LANCZOS)
    return picture.quantize(128)
