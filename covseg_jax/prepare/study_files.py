"""A study's files -> its image in HU and its masks, on one grid, or the fault that forbids it."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from isal import isal_zlib
from scipy import signal

from covseg_jax.errors import FileFault
from covseg_jax.imaging import formats
from covseg_jax.imaging.study import Study
from covseg_jax.imaging.volume import Volume
from covseg_jax.prepare import lungs as lungs_lib
from covseg_jax.prepare.lung_network import SHIPPED, load_network

LUNGS_SOURCES = ('threshold', 'network', 'file', 'lungmask')
SPACING_MM = (0.1, 50.0)  # between these lies every voxel of a chest CT
LUNG_HU, TISSUE_HU = -500, (-200, 300)  # what lies below or between is thin as lung, or tissue
ROUNDED_LABEL = 1e-3  # by which a label may differ from a whole number
_MOST_LABELS = 8  # of a volume that is taken for a mask
LEAST_SHARE = 0.002  # of the voxels of any chest CT, for either
AIR_HU, MUSCLE_HU = -1000, 40  # in any patient
# A chest has bone, of 300 HU and more. What has nothing denser than this was a picture, whose
# window ended somewhere, and its HU are somebody's guess.
CUT_HU = 100
_END_HU = 12  # from the densest voxel: what the window's end has cut
_MOST_AT_END = 0.2  # of what is dense: where more is cut, soft tissue itself may be
_SMOOTH_HU = 61  # of a histogram: pictures are noisy, and have steps of up to 6 HU
_LEAST_PEAK = 0.3  # of the highest: muscle beside more fat, both about 130 HU apart
_DISPLACED_HU = -60  # soft tissue that lies below is not where it belongs


def read_image(study: Study) -> Volume:
    """The study's image in HU, verified; a picture whose HU were guessed, with its soft tissue at
    40 HU, see `find_soft_tissue`.

    Raises:
        FileFault: a file is missing, damaged or of an unusable kind; the voxels' size is no CT's;
            the values cannot be HU.
    """
    volume = formats.read_volume(study.image, study.index, study.files)
    spacings = volume.spacing_mm[::-1]  # x, y, z, as people say them
    if not all(SPACING_MM[0] <= spacing <= SPACING_MM[1] for spacing in spacings):
        size = ' × '.join(f'{spacing:.3g}' for spacing in spacings)
        raise FileFault(
            study.image, f'voxels of {size} mm cannot be CT', 'correct the header; it is in mm'
        )
    if study.window is not None:
        return _undo_window(study, volume)
    fault = find_implausible_hu(volume.array)
    if fault is not None:
        raise FileFault(study.image, fault, 'give the original CT in HU')
    return _stretch_picture(volume)


def read_mask(study: Study, name: str, image: Volume, labels: Sequence[int] | None) -> np.ndarray:
    """One of the study's masks, on the image's grid: bool (Z, Y, X) canonical.

    Args:
        study: whose mask.
        name: its field, 'lesion_mask' or 'lung_mask'; it must not be None.
        image: the study's image.
        labels: values that count as the mask; with others than these and 0 it is refused. None:
            every value above 0 counts.

    Raises:
        FileFault: damaged, on another grid than the image, or with labels that nobody stated.
    """
    path = getattr(study, name)
    mask = formats.read_volume(path, study.index)
    shape, image_shape = mask.as_stored.shape, image.as_stored.shape
    if shape != image_shape:
        raise FileFault(
            path,
            f'shape {shape}, but its image has {image_shape}',
            'give the mask of this image',
        )
    if not mask.lies_on_grid_of(image):
        fault = (
            'its affine is not that of its image: voxels lie up to '
            f'{mask.distance_mm(image):.3g} mm from where the image has them'
        )
        raise FileFault(path, fault, 'give the mask on the image grid')
    if labels is None:
        return mask.array > ROUNDED_LABEL
    chosen = np.empty(mask.array.shape, bool)
    for z, values in enumerate(mask.array):
        whole = _round_labels(values)
        chosen[z] = np.isin(whole, labels)
        if not (chosen[z] | (whole == 0)).all():
            raise _unstated_labels(path, mask.array, labels)
    return chosen


def _round_labels(values: np.ndarray) -> np.ndarray:
    """Labels that are whole numbers but for a float's rounding, as whole numbers."""
    if values.dtype.kind != 'f':
        return values
    whole = np.rint(values)
    return np.where(np.abs(values - whole) <= ROUNDED_LABEL, whole, values)


def voxel_crc32(volume: Volume) -> int:
    """CRC-32 of a volume's voxels, whatever its header, type, format and order of axes."""
    crc32 = 0
    for plane in volume.array:
        crc32 = isal_zlib.crc32(np.ascontiguousarray(plane, np.float32), crc32)
    return crc32


def uses_lung_mask(study: Study, source: str) -> bool:
    """Whether the study's lungs come from its file: published arrays have no other."""
    return source == 'file' or study.index is not None


def find_study_lungs(
    study: Study, image: Volume, source: str, network_path: str = ''
) -> np.ndarray:
    """The study's lungs: bool (Z, Y, X) canonical.

    Args:
        study: whose lungs.
        image: its image.
        source: one of LUNGS_SOURCES. Published arrays, which are empty outside the lungs, always
            take their file.
        network_path: of 'network'; '' is the one that comes with the code.

    Raises:
        FileFault: no lungs found, or no usable file where one is wanted.
    """
    if uses_lung_mask(study, source):
        if study.lung_mask is None:
            raise FileFault(
                study.image,
                'has no lung mask file',
                f'add {study.study_id}_lungs.nii.gz or set prepare.lungs_source=network',
            )
        lungs = read_mask(study, 'lung_mask', image, labels=None)
        if not lungs.any():
            raise FileFault(study.lung_mask, 'the lung mask is empty', 'draw it again')
        return lungs
    try:
        if source == 'lungmask':
            return lungs_lib.find_lungs_by_lungmask(image.array)
        network = load_network(network_path or SHIPPED) if source == 'network' else None
        return lungs_lib.find_lungs(image.array, image.spacing_mm, network)
    except ValueError as error:
        raise FileFault(
            study.image,
            str(error),
            'give a chest CT in HU, or a lung mask with prepare.lungs_source=file',
        ) from error
    except ModuleNotFoundError as error:
        raise FileFault(
            study.image,
            'prepare.lungs_source=lungmask, but that package is not installed',
            'pip install lungmask, or use prepare.lungs_source=network',
        ) from error


def find_implausible_hu(array: np.ndarray) -> str | None:
    """Why a (Z, Y, X) array cannot be a chest CT in HU, or None."""
    low, high = float(array.min()), float(array.max())
    values = f'values from {low:.4g} to {high:.4g}'
    if low == high:
        return f'every voxel is {low:.4g}'
    if abs(low) <= ROUNDED_LABEL and high <= 255:
        found = np.unique(_round_labels(np.unique(array)))
        if len(found) <= _MOST_LABELS and (found == np.rint(found)).all():
            return (
                f'only the values {_list_labels(found)}: a mask and no scan; it is taken for one '
                'where it is named after its scan, such as NAME_mask.nii.gz beside NAME.nii.gz'
            )
    if low >= -1 and high <= 1:
        return f'{values}: a normalised image, not HU'
    if low >= 0 and high <= 255:
        return f'{values}: a windowed image, not HU'
    some = array[:, ::3, ::3]
    if (some < LUNG_HU).mean() < LEAST_SHARE:
        if low >= -50 and high > 255:
            return f'{values}: no air; HU without their offset of -1024 (scl_inter)'
        return f'{values}: nothing is as thin as lung'
    if ((some > TISSUE_HU[0]) & (some < TISSUE_HU[1])).mean() < LEAST_SHARE:
        return f'{values}: nothing is as dense as soft tissue'
    return None


def find_soft_tissue(array: np.ndarray) -> float | None:
    """Where soft tissue lies, in HU, in a (Z, Y, X) picture whose values stand for other HU than
    they say, or None: the scan has bone, or soft tissue lies where it belongs, or is cut off."""
    top, lowest = round(float(array.max())), TISSUE_HU[0] - 100
    if not TISSUE_HU[0] < top <= CUT_HU:
        return None
    counts = np.zeros(top - lowest + 1, int)  # of dense voxels, a bin a HU
    for plane in array:
        dense = np.rint(plane[plane > lowest]).astype(int)
        counts += np.bincount(dense - lowest, minlength=len(counts))
    fill = round(float(np.median(array[:, [0, 0, -1, -1], [0, -1, 0, -1]])))
    if lowest <= fill < top - _END_HU / 2:  # around a crop; what is at the end may be tissue
        counts[fill - lowest] = 0
    number, counts = counts.sum(), counts[: top - _END_HU - lowest]
    if counts.sum() <= (1 - _MOST_AT_END) * number:
        return None
    smooth = np.convolve(counts, np.ones(_SMOOTH_HU), 'same')
    least = _LEAST_PEAK * smooth.max()
    peaks, _ = signal.find_peaks(smooth, height=least, prominence=least / 3)
    if not len(peaks) or peaks[-1] + lowest >= _DISPLACED_HU:
        return None
    return float(peaks[-1] + lowest)


def _stretch_picture(volume: Volume) -> Volume:
    """The volume with its soft tissue where it belongs."""
    tissue = find_soft_tissue(volume.array)
    if tissue is None:
        return volume
    factor = (MUSCLE_HU - AIR_HU) / (tissue - AIR_HU)
    note = (
        f'nothing is denser than {float(volume.array.max()):.0f} HU, and soft tissue lies at '
        f'{tissue:.0f}: a picture of another window; its densities were stretched by {factor:.2f}; '
        'give the original CT where there is one'
    )
    array = np.array(volume.array, np.float32)
    return _with_densities(volume, array, (AIR_HU, tissue), (AIR_HU, MUSCLE_HU), note)


def _undo_window(study: Study, volume: Volume) -> Volume:
    low, high, low_hu, high_hu = study.window
    found = float(volume.array.min()), float(volume.array.max())
    if found[0] == found[1]:
        raise FileFault(study.image, f'every voxel is {found[0]:.4g}', 'leave the study out')
    # Published arrays overshoot: they were interpolated by splines after the window.
    slack = 0.5 * (high - low) if study.index is not None else 0.0
    if found[0] < low - slack or found[1] > high + slack:
        raise FileFault(
            study.image,
            f'values from {found[0]:.9g} to {found[1]:.9g}, where this data set has '
            f'{low:g} to {high:g}',
            'download it again',
        )
    array = np.array(volume.array, np.float32)
    np.clip(array, low, high, out=array)
    note = f'windowed: {low:g} to {high:g} stand for {low_hu:g} to {high_hu:g} HU'
    return _with_densities(volume, array, (low, high), (low_hu, high_hu), note)


def _with_densities(
    volume: Volume,
    array: np.ndarray,
    values: tuple[float, float],
    hu: tuple[float, float],
    note: str,
) -> Volume:
    """The volume with the float32 array, which is changed: its two `values` stand for two `hu`, and
    what lies between and beyond linearly."""
    (low, high), (low_hu, high_hu) = values, hu
    array -= low
    array *= (high_hu - low_hu) / (high - low)
    array += low_hu
    array.flags.writeable = False
    return dataclasses.replace(volume, array=array, notes=(*volume.notes, note))


def _unstated_labels(path, data: np.ndarray, labels: Sequence[int]) -> FileFault:
    found = np.unique(_round_labels(data))
    others = found[(found != 0) & ~np.isin(found, labels)]
    stated = ', '.join(str(label) for label in labels)
    remedy = 'give a mask of whole numbers'
    if len(found) <= _MOST_LABELS and (others == np.rint(others)).all():
        wanted = ', '.join(f'{label:.0f}' for label in found if label != 0)
        remedy = f'say which are lesion, such as --config.prepare.lesion_labels="({wanted},)"'
    # Of many, those that are the fault.
    shown = found if len(found) <= _MOST_LABELS else others
    fault = f'labels {_list_labels(shown)}; only 0 and {stated} are a lesion mask'
    return FileFault(path, fault, remedy)


def _list_labels(labels: np.ndarray) -> str:
    """As many digits as tell one from the next."""
    text = ', '.join(f'{label:.9g}' for label in labels[:_MOST_LABELS])
    return text + (' …' if len(labels) > _MOST_LABELS else '')
