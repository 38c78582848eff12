"""Augmentation on the device: (key, batch) -> batch.

Everything is a matrix product or elementwise, so that it costs a TPU nothing: no gathers.
"""

import dataclasses

import jax
import jax.numpy as jnp

from covseg_jax.data.pipeline import IMAGE, LUNGS, TARGET


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """How far slices are changed.

    Attributes:
      zoom: largest relative change of size of each axis, for example 0.1.
      shift: largest shift, as a share of the axis.
      gain: largest relative change of the lungs' contrast.
      bias: largest change of brightness, in units of [0, 1].
      noise: largest standard deviation of added noise, in units of [0, 1].
    """

    zoom: float = 0.1
    shift: float = 0.05
    gain: float = 0.1
    bias: float = 0.02
    noise: float = 0.01


def _resampling_matrix(size: int, zoom: jax.Array, shift: jax.Array) -> jax.Array:
    """(B, size, size) linear interpolation weights of a zoom about the centre and a shift; 0 where
    the source lies outside."""
    centre = (size - 1) / 2
    target = jnp.arange(size)
    source = (target[None] - centre) / zoom[:, None] + centre + shift[:, None] * size
    distance = jnp.abs(source[:, :, None] - target[None, None, :])
    return jnp.maximum(0.0, 1.0 - distance)


def augment_slices(
    key: jax.Array, batch: dict[str, jax.Array], settings: Augmentation
) -> dict[str, jax.Array]:
    """Flips left and right, zooms, shifts, and changes brightness, contrast and noise.

    Args:
      key: PRNG key.
      batch: IMAGE, TARGET, LUNGS (B, H, W, 1); other keys pass through.
      settings: how far.

    Returns:
      A batch of the same shapes; IMAGE and TARGET stay in [0, 1] and IMAGE 0 outside the lungs.
    """
    num, height, width, _ = batch[IMAGE].shape
    keys = jax.random.split(key, 8)

    # Drawn flat: XLA compiles draws of many axes slowly on CPU.
    def uniform(k: jax.Array, most: float) -> jax.Array:
        return jax.random.uniform(k, (num,), minval=-most, maxval=most)

    def per_slice(values: jax.Array) -> jax.Array:
        return values[:, None, None, None]

    flip = per_slice(uniform(keys[0], 1.0) < 0)
    rows = _resampling_matrix(
        height, 1 + uniform(keys[1], settings.zoom), uniform(keys[2], settings.shift)
    )
    columns = _resampling_matrix(
        width, 1 + uniform(keys[3], settings.zoom), uniform(keys[4], settings.shift)
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
