"""A network of slices as a function of volumes."""

import dataclasses
from collections.abc import Callable

import numpy as np
from scipy import ndimage

from covseg_jax.errors import InputError
from covseg_jax.imaging.geometry import enlarge, shrink, stretching_matrix
from covseg_jax.prepare.slicewise import erode_in_plane

Probability = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (image, lungs) -> lesion probability


@dataclasses.dataclass(frozen=True)
class VolumeSettings:
    """How slices become a volume.

    Attributes:
      batch_size: slices at a time.
      smoothing_pixels: standard deviation, in pixels of the model's grid, that slices are smoothed
        by in their plane before the network sees them; 0 leaves them.
      flip: average with the prediction of the mirrored slices.
      smoothing_slices: standard deviation, in slices of the model's grid, that probabilities are
        smoothed by from slice to slice; 0 leaves them.
      border_factor: what the probabilities of the lungs' outermost pixels in each slice are
        multiplied by, and those of the next ones by its root; 1 leaves them. These pixels hold
        some of the chest's wall, which looks like an opacity.
      output: what the network says of a pixel: 'sigmoid', a probability; or 'linear', as published,
        the raw output z. A volume of it is max(z, 0), divided by its maximum where that is above 1:
        within [0, 1], and every share of the maximum is where it was.
    """

    batch_size: int
    smoothing_pixels: float
    flip: bool
    smoothing_slices: float
    border_factor: float
    output: str

    def __post_init__(self):
        if self.output not in ('sigmoid', 'linear'):
            raise InputError(f"predict.output={self.output!r} is not one of 'sigmoid', 'linear'")


def predict_volumes(
    predict: Callable[[np.ndarray], np.typing.ArrayLike], settings: VolumeSettings
) -> Probability:
    """A function of (image, lungs), both (D, H, W), that gives (D, H, W) float32 lesion
    probability, 0 outside the lungs.

    `predict` takes (batch_size, H, W, 1) float32 slices and gives as many outputs, of the kind that
    the settings name.
    """
    size = settings.batch_size

    def predict_slices(slices: np.ndarray) -> np.ndarray:
        padded = np.zeros((-(-len(slices) // size) * size, *slices.shape[1:], 1), np.float32)
        padded[: len(slices), ..., 0] = slices
        found = [predict(padded[i : i + size]) for i in range(0, len(padded), size)]
        return np.concatenate([np.asarray(f)[..., 0] for f in found])[: len(slices)]

    def probability(image: np.ndarray, lungs: np.ndarray) -> np.ndarray:
        image, inside = np.asarray(image, np.float32), np.asarray(lungs) > 0
        image = smooth_slices(image, inside, settings.smoothing_pixels)
        found = predict_slices(image)
        if settings.flip:
            found = (found + predict_slices(image[:, :, ::-1])[:, :, ::-1]) / 2
        if settings.smoothing_slices:
            found = ndimage.gaussian_filter1d(
                found, settings.smoothing_slices, axis=0, mode='nearest'
            )
        found = found * _weigh_borders(inside, settings.border_factor)
        if settings.output == 'linear':
            found = np.maximum(found, 0)
            found /= max(float(found.max(initial=0)), 1.0)
        return found

    return probability


def with_pixels(probability: Probability, pixels: tuple[int, int]) -> Probability:
    """A function of volumes whose slices have H × W pixels, as one of slices of any pixels over the
    same field: where they are others, images are resampled before it, and probabilities after it.

    At the lungs' rim probabilities fade to the 0 outside. Divided by the lungs, resampled as they
    are, they mark more there, and are as good (docs/results.md)."""

    def resampled(image: np.ndarray, lungs: np.ndarray) -> np.ndarray:
        inside = np.asarray(lungs) > 0
        if inside.shape[1:] == tuple(pixels):
            return probability(image, lungs)
        found = probability(*resample_slices(np.asarray(image, np.float32), inside, pixels))
        matrices = _in_plane_matrices(found.shape, inside.shape[1:])
        return np.concatenate([each for _, each in enlarge(found, matrices)]) * inside

    return resampled


def resample_slices(
    image: np.ndarray, inside: np.ndarray, pixels: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """(N, H, W) float32 slices, 0 outside the lungs, and what is inside, with other pixels: as in
    `prepare`, what is outside does not bleed into the lungs' edge. Of these pixels they stay."""
    if image.shape[1:] == tuple(pixels):
        return image, inside
    matrices = _in_plane_matrices(image.shape, pixels)
    total = shrink(image, matrices, weights=inside)
    weight = shrink(inside, matrices)
    kept = weight >= 0.5
    return np.divide(total, weight, out=np.zeros_like(total), where=kept), kept


def _in_plane_matrices(shape: tuple[int, ...], pixels: tuple[int, int]) -> list[np.ndarray]:
    return [stretching_matrix(*lengths) for lengths in zip((shape[0], *pixels), shape, strict=True)]


def smooth_slices(image: np.ndarray, inside: np.ndarray, pixels: float) -> np.ndarray:
    """(N, H, W) float32 slices as the network sees them in a prediction: smoothed in their plane by
    so many pixels, and 0 outside the lungs; 0 pixels leave them."""
    return ndimage.gaussian_filter(image, (0.0, pixels, pixels)) * inside if pixels else image


def _weigh_borders(inside: np.ndarray, factor: float) -> np.ndarray:
    """(D, H, W) float32: 0 outside the lungs, slice by slice `factor` in their outermost pixels,
    its root in the next ones, and 1 deeper inside."""
    inner = erode_in_plane(inside)
    deep = erode_in_plane(inner)
    return np.select([deep, inner, inside], [1.0, factor**0.5, factor], 0.0).astype(np.float32)
