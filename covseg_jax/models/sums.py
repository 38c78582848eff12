"""Sums over all axes but the last, in the form that is fast on the platform, and their use."""

import math

import jax
import jax.numpy as jnp

from covseg_jax.models.convolution import platform


def channel_sums(x: jax.Array) -> jax.Array:
    """(B, …, C) → (C,): the sum of each channel, in float32.

    XLA for CPUs sums channel by channel, with steps of C through memory. There, the two halves of
    each image are first added to one another, row of memory to row of memory: 4.2 → 0.3 ms for 32
    channels at 8 × 64² on one core. (Not whole images: XLA would make one sum of both again.)
    """
    x = x.astype(jnp.float32)
    channels, count = x.shape[-1], math.prod(x.shape[:-1])
    parts = max(2 * x.shape[0], 4)
    if platform() == 'cpu' and count % parts == 0:
        x = x.reshape(parts, -1).sum(0).reshape(-1, channels)
    return x.sum(tuple(range(x.ndim - 1)))


@jax.custom_vjp
def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """x (B, …, C) + bias (C,), of one type; the bias's gradient is `channel_sums`."""
    return x + bias


add_bias.defvjp(
    lambda x, bias: (x + bias, None), lambda _, dy: (dy, channel_sums(dy).astype(dy.dtype))
)
