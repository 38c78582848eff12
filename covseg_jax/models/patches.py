"""Patches of pixels as the channels of one: a finer grid in, and out, of a network that works on a
coarser one.

Shi et al. (CVPR 2016, arXiv 1609.05158) call the way back a sub-pixel convolution.
"""

import jax


def patches_to_channels(x: jax.Array, patch: int) -> jax.Array:
    """(..., H, W, C) → (..., H/p, W/p, p²·C): a patch's pixels one after the other, by rows."""
    if patch == 1:
        return x
    *leading, height, width, channels = x.shape
    x = x.reshape(*leading, height // patch, patch, width // patch, patch, channels)
    return x.swapaxes(-4, -3).reshape(
        *leading, height // patch, width // patch, patch**2 * channels
    )


def channels_to_patches(x: jax.Array, patch: int) -> jax.Array:
    """The way back: (..., H/p, W/p, p²·C) → (..., H, W, C)."""
    if patch == 1:
        return x
    *leading, height, width, channels = x.shape
    x = x.reshape(*leading, height, width, patch, patch, channels // patch**2)
    return x.swapaxes(-4, -3).reshape(*leading, height * patch, width * patch, channels // patch**2)
