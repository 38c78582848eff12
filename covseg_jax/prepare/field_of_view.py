"""What of an image was never scanned: padding.

A scanner fills what lies outside its circle with one value (-1024, -2000, 3071), and so does a
program that turns or pads a scan. Taken for air, such padding opens the lungs that it cuts into;
taken for tissue, it walls room air in.
"""

import numpy as np

from covseg_jax.prepare.slicewise import components_at, dilate_in_plane, label_in_plane

# Nothing scanned is constant at these values or beyond: by them padding within padding is told,
# such as a circle that was turned.
UNSCANNED_HU = (-1025, 3071)
EDGE_VOXELS = 2  # from padding: between lies a mixture, or what a resampling made


def find_padding(image_hu: np.ndarray) -> np.ndarray:
    """Voxels outside the field of view: areas of exactly one value that reach the border of their
    slice.

    Noise keeps all that is scanned from being constant, but for air that was clipped; that of the
    room, which reaches the border, is outside the patient too.

    Args:
        image_hu: (Z, Y, X), HU, values as stored: nothing interpolated.

    Returns:
        bool (Z, Y, X).
    """
    equal_rows = image_hu[:, 1:] == image_hu[:, :-1]
    equal_columns = image_hu[:, :, 1:] == image_hu[:, :, :-1]
    # Voxels whose neighbours in the slice, where they have such, are all equal to them.
    flat = np.ones(image_hu.shape, bool)
    flat[:, 1:] &= equal_rows
    flat[:, :-1] &= equal_rows
    flat[:, :, 1:] &= equal_columns
    flat[:, :, :-1] &= equal_columns
    border = find_border(image_hu.shape)
    padding = np.zeros_like(flat)
    for value in np.unique(image_hu[flat & border]):
        same = image_hu == value
        padding |= dilate_in_plane(components_at(label_in_plane(flat & same), border), within=same)
    if padding.any():
        flat &= (image_hu <= UNSCANNED_HU[0]) | (image_hu >= UNSCANNED_HU[1])
        padding |= components_at(label_in_plane(flat), dilate_in_plane(padding, EDGE_VOXELS))
    return padding


def find_border(shape: tuple[int, int, int]) -> np.ndarray:
    """The outermost voxels of each slice: bool (Z, Y, X)."""
    border = np.ones(shape, bool)
    border[:, 1:-1, 1:-1] = False
    return border
