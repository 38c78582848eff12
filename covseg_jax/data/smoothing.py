"""Gaussian means in the planes of slices, as products of matrices: no gathers."""

import jax
import jax.numpy as jnp


def gaussian_weights(size: int, deviation: float | jax.Array) -> jax.Array:
    """(..., size, size) weights that a place gives each other one, 1 at itself, of a Gaussian whose
    deviation (...) is in places."""
    at = jnp.arange(size)
    gaps = at[:, None] - at[None, :]
    return jnp.exp(-0.5 * jnp.square(gaps / jnp.asarray(deviation)[..., None, None]))


def mean_of_lungs(image: jax.Array, lungs: jax.Array, deviations: tuple) -> jax.Array:
    """(..., H, W) Gaussian mean of the lungs' pixels alone, around each pixel of its slice; the
    deviations, in pixels, are of rows and columns, and broadcast to the leading axes."""
    rows, columns = map(gaussian_weights, image.shape[-2:], deviations)
    total, weight = (rows @ each @ columns for each in (image * lungs, lungs))
    return total / jnp.maximum(weight, 1e-3)
