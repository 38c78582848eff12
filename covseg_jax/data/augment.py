"""Augmentation on the device: (key, batch) -> batch.

Everything is a matrix product or elementwise, so that it costs a TPU nothing: no gathers.
"""

import dataclasses

import jax
import jax.numpy as jnp

from covseg_jax.data.feeds import IMAGE, LUNGS, TARGET
from covseg_jax.data.smoothing import mean_of_lungs

_DEPENDENT_DENSITY = 0.45  # image value; −370 HU in the default window


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """How far slices are changed: the most that each may be."""

    enabled: bool  # False leaves slices as they are
    zoom: float  # relative change of size of each axis
    shift: float  # share of the axis
    gain: float  # relative change of the lungs' contrast
    bias: float  # change of brightness, in units of [0, 1]
    noise: float  # standard deviation of added noise, in units of [0, 1]
    # Standard deviation of smoothing, in pixels: scans differ in it, and what is smooth is no
    # lesion for that. Noise is added to what is smoothed.
    smoothing_pixels: float


def _resampling_matrix(size: int, zoom: jax.Array, shift: jax.Array) -> jax.Array:
    """(B, size, size) linear interpolation weights of a zoom about the centre and a shift; 0 where
    the source lies outside."""
    centre = (size - 1) / 2
    target = jnp.arange(size)
    source = (target[None] - centre) / zoom[:, None] + centre + shift[:, None] * size
    distance = jnp.abs(source[:, :, None] - target[None, None, :])
    return jnp.maximum(0.0, 1.0 - distance)


def add_dependent_density(
    key: jax.Array, image: jax.Array, lungs: jax.Array, most: float
) -> jax.Array:
    """Makes the back of the lungs denser, as gravity does in a patient who lies on it.

    Healthy scans differ most in this, and a few of them do not show how much: without it a network
    takes the dependent density of the next scan for ground glass. Each half of the image has a
    strength of its own.

    Image in [0, 1], rows from front to back, and lungs are (B, D, H, W, 1); `most` is the largest
    share by which the last row goes towards _DEPENDENT_DENSITY. The image becomes nowhere darker,
    and stays as it is outside the lungs.
    """
    num, height, width = image.shape[0], image.shape[2], image.shape[3]
    strength_key, start_key, power_key = jax.random.split(key, 3)
    # Left and right.
    strengths = most * jax.random.uniform(strength_key, (num * 2,)).reshape(num, 2)
    start = jax.random.uniform(start_key, (num, 1), minval=0.2, maxval=0.8)
    power = jax.random.uniform(power_key, (num, 1), minval=0.7, maxval=2.0)
    rows = jnp.linspace(0.0, 1.0, height)[None]
    ramp = jnp.maximum((rows - start) / (1 - start), 1e-6) ** power  # (B, H)
    right = jax.nn.sigmoid(jnp.linspace(-20.0, 20.0, width))
    across = strengths[:, :1] * (1 - right) + strengths[:, 1:] * right  # (B, W)
    weight = (ramp[:, None, :, None] * across[:, None, None, :])[..., None] * lungs
    return image + weight * jnp.maximum(_DEPENDENT_DENSITY - image, 0.0)


def _smooth(key: jax.Array, image: jax.Array, lungs: jax.Array, most: float) -> jax.Array:
    """Each image (B, H, W, 1) with a Gaussian of a width of its own, of the lungs' pixels alone."""
    # Narrower ones leave their pixel alone: 0.2 gives its neighbours 4e-6.
    deviation = jnp.maximum(most * jax.random.uniform(key, image.shape[:1]), 0.2)
    smooth = mean_of_lungs(image[..., 0], lungs[..., 0], (deviation, deviation))
    return smooth[..., None] * lungs


def augment_slices(
    key: jax.Array, batch: dict[str, jax.Array], settings: Augmentation
) -> dict[str, jax.Array]:
    """Flips left and right, zooms, shifts, and changes sharpness, brightness, contrast and noise of
    IMAGE, TARGET, LUNGS (B, H, W, 1); other keys pass through. IMAGE stays in [0, 1] and TARGET in
    its range, and both are 0 outside the lungs."""
    num, height, width, _ = batch[IMAGE].shape
    numbers_key, noise_key, smooth_key = jax.random.split(key, 3)
    if settings.smoothing_pixels:
        smooth = _smooth(smooth_key, batch[IMAGE], batch[LUNGS], settings.smoothing_pixels)
        batch = batch | {IMAGE: smooth}
    # Drawn flat and at once: XLA for CPUs compiles draws of many axes, and many draws, slowly.
    numbers = jax.random.uniform(numbers_key, (8 * num,), minval=-1.0).reshape(8, num)
    rows, columns = (
        _resampling_matrix(size, 1 + settings.zoom * zoom, settings.shift * shift)
        for size, zoom, shift in ((height, *numbers[:2]), (width, *numbers[2:4]))
    )
    flip, gain, bias, deviation = numbers[4:, :, None, None, None]

    # The channels of one product of matrices a slice.
    stacked = jnp.stack([batch[name][..., 0] for name in (IMAGE, TARGET, LUNGS)], axis=1)
    stacked = jnp.where(flip < 0, stacked[..., ::-1], stacked)
    moved = rows[:, None] @ stacked @ columns.mT[:, None]
    image, target, lungs = moved.transpose(1, 0, 2, 3)[..., None]
    lungs = (lungs >= 0.5).astype(jnp.float32)
    noise = jax.random.normal(noise_key, (image.size,)).reshape(image.shape)
    image = image * (1 + settings.gain * gain) + settings.bias * bias
    image = jnp.clip(image + settings.noise * deviation * noise, 0.0, 1.0) * lungs
    return batch | {IMAGE: image, TARGET: target * lungs, LUNGS: lungs}
