"""Augmentation on the device: (key, batch) -> batch.

Everything is a matrix product or elementwise, so that it costs a TPU nothing: no gathers.
"""

import dataclasses

import jax
import jax.numpy as jnp

from covseg_jax.data.feeds import IMAGE, LUNGS, TARGET

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


def augment_slices(
    key: jax.Array, batch: dict[str, jax.Array], settings: Augmentation
) -> dict[str, jax.Array]:
    """Flips left and right, zooms, shifts, and changes brightness, contrast and noise of IMAGE,
    TARGET, LUNGS (B, H, W, 1); other keys pass through. IMAGE and TARGET stay in [0, 1], and are 0
    outside the lungs."""
    num, height, width, _ = batch[IMAGE].shape
    keys = jax.random.split(key, 8)

    # Drawn flat: XLA compiles draws of many axes slowly on CPU.
    def uniform(k: jax.Array, most: float) -> jax.Array:
        return jax.random.uniform(k, (num,), minval=-most, maxval=most)

    def per_slice(values: jax.Array) -> jax.Array:
        return values[:, None, None, None]

    flip = per_slice(uniform(keys[0], 1.0) < 0)
    rows, columns = (
        _resampling_matrix(
            size, 1 + uniform(zoom_key, settings.zoom), uniform(shift_key, settings.shift)
        )
        for size, zoom_key, shift_key in ((height, *keys[1:3]), (width, *keys[3:5]))
    )

    def move(array: jax.Array) -> jax.Array:
        array = jnp.where(flip, array[:, :, ::-1], array)
        return jnp.einsum('bih,bhwc,bjw->bijc', rows, array, columns)

    image, target, lungs = (move(batch[name]) for name in (IMAGE, TARGET, LUNGS))
    lungs = (lungs >= 0.5).astype(jnp.float32)
    gain = 1 + per_slice(uniform(keys[5], settings.gain))
    bias = per_slice(uniform(keys[6], settings.bias))
    noise_key, size_key = jax.random.split(keys[7])
    noise = jax.random.normal(noise_key, (image.size,)).reshape(image.shape)
    noise *= per_slice(uniform(size_key, settings.noise))
    image = jnp.clip(image * gain + bias + noise, 0.0, 1.0) * lungs
    return batch | {IMAGE: image, TARGET: jnp.clip(target, 0.0, 1.0) * lungs, LUNGS: lungs}
