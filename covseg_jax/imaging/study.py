"""One CT study of a data set, and how its files are found and its id is made."""

import os
import pathlib
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from covseg_jax import written
from covseg_jax.errors import FileFault
from covseg_jax.imaging import formats
from covseg_jax.imaging.absent import is_dangling

LESION_MASK, LUNG_MASK = '_mask', '_lungs'  # at the end of a mask's name, after its scan's
# A study's id names files and folders, on every system.
NOT_IN_NAMES = re.compile(r'[\x00-\x1f\x7f/\\:*?"<>|]|^\.+|^$')
_LONGEST_ID = 200  # bytes: a file's name has 255, and endings such as _probability.nii.gz follow
OnStray = Callable[[FileFault], None]


@dataclass(frozen=True)
class Study:
    """One CT study and what is known of it.

    Attributes:
        study_id: unique in its data set, usable as a folder's name.
        image: the NIfTI file, the folder of the DICOM series, or the .npy file.
        lesion_mask: the human (or phantom) mask, or None.
        lung_mask: lungs drawn or computed elsewhere, or None.
        category: 'CT-0' (healthy) to 'CT-4', or None if unknown.
        data_set: 'MosMedData' where its registry is there, else the folder's name.
        index: the study's place in its .npy files; None for all others.
        window: (least stored value, greatest, HU of the first, HU of the second) where the data
            set is known to hold windowed images instead of HU.
        files: of a DICOM series that is one of several in its folder, its files; None of others.
    """

    study_id: str
    image: pathlib.Path
    lesion_mask: pathlib.Path | None
    lung_mask: pathlib.Path | None
    category: str | None
    data_set: str
    index: int | None = None
    window: tuple[float, float, float, float] | None = None
    files: tuple[pathlib.Path, ...] | None = None


def ignore(_: FileFault) -> None:
    """For an `OnStray` where somebody else has been told."""


def nifti_study(image: pathlib.Path, root: pathlib.Path) -> Study:
    """A NIfTI file in `root` or below it, with the masks that lie beside it."""
    name = formats.strip_suffix(image)
    mask, lungs = (find_image(image.with_name(name + end)) for end in (LESION_MASK, LUNG_MASK))
    study_id = make_id([*image.parent.relative_to(root).parts, name])
    return Study(study_id, image, mask, lungs, None, root.resolve().name)


def make_id(parts: Sequence[str]) -> str:
    """A study's id from the names that lead to it, without what cannot stand in a file's name."""
    name = NOT_IN_NAMES.sub('_', '_'.join(parts))
    if len(os.fsencode(name)) > _LONGEST_ID:
        # The end tells series apart, the checksum what was cut off.
        name = f'{checksum(name)}_{name[-_LONGEST_ID // 4 :]}'
    return name


def checksum(text: str) -> str:
    """CRC-32 of a text, in eight digits."""
    return f'{zlib.crc32(os.fsencode(text)):08x}'


def images_in(folder: pathlib.Path) -> list[pathlib.Path]:
    """NIfTI files of a folder that this program did not write, by name; none of no folder."""
    return sorted(filter(_is_image, folder.iterdir())) if folder.is_dir() else []


def _is_image(path: pathlib.Path) -> bool:
    is_hidden = path.name.startswith('.')  # macOS leaves ._study_0001.nii.gz
    # A dangling link is one whose content is not there: reading it says so.
    is_there = path.is_file() or is_dangling(path)
    is_scan = formats.is_nifti(path) and is_there and not is_hidden
    return is_scan and not written.is_output(path)


def find_image(stem: pathlib.Path) -> pathlib.Path | None:
    """The NIfTI file of that path without its suffix, as `images_in` finds it."""
    candidates = [stem.with_name(stem.name + suffix) for suffix in formats.NIFTI_SUFFIXES]
    return next(filter(_is_image, candidates), None)
