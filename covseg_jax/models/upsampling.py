"""Bilinear up-sampling ×2 with aligned corners, and convolutions of what it gives."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from covseg_jax.models.convolution import conv2d, platform


def upsample_bilinear(x: jax.Array) -> jax.Array:
    """Bilinear up-sampling ×2 with aligned corners, as PyTorch's align_corners=True.

    Output sample i of 2n lies at input position i (n − 1) / (2n − 1); `jax.image.resize` would put
    it at (i + ½) / 2 − ½. On a CPU it is shifts and adds, elsewhere two products of matrices.
    (B, H, W, C) → (B, 2H, 2W, C).
    """
    if platform() == 'cpu':
        return _double(x)
    rows, columns = (jnp.asarray(_corner_aligned_matrix(size), x.dtype) for size in x.shape[1:3])
    return jnp.einsum('ph,qw,bhwc->bpqc', rows, columns, x)


def _corner_aligned_matrix(size: int) -> np.ndarray:
    """(2n, n) weights of linear interpolation with aligned corners."""
    position = np.arange(2 * size) * ((size - 1) / (2 * size - 1))
    return np.maximum(0, 1 - np.abs(position[:, None] - np.arange(size)))


@jax.custom_vjp
def _double(x: jax.Array) -> jax.Array:
    return _double_axis(_double_axis(x, 2), 1)


def _double_axis(x: jax.Array, axis: int) -> jax.Array:
    """Linear ×2 along one axis of n: output 2m lies m / (2n − 1) before x[m], and output 2m + 1
    (n − 1 − m) / (2n − 1) after it, so each is a mix of x[m] with one neighbour."""
    size = x.shape[axis]
    before, after = _shares(x, axis, size)
    first = lax.slice_in_dim(x, 0, 1, axis=axis)
    last = lax.slice_in_dim(x, size - 1, size, axis=axis)
    earlier = jnp.concatenate([first, lax.slice_in_dim(x, 0, size - 1, axis=axis)], axis)
    later = jnp.concatenate([lax.slice_in_dim(x, 1, size, axis=axis), last], axis)
    even = x + before * (earlier - x)
    odd = x + after * (later - x)
    doubled = jnp.stack([even, odd], axis + 1)
    return doubled.reshape(*x.shape[:axis], 2 * size, *x.shape[axis + 1 :])


def _halve_axis(dy: jax.Array, axis: int) -> jax.Array:
    """The gradient of `_double_axis`'s input: its transpose."""
    size = dy.shape[axis] // 2
    before, after = _shares(dy, axis, size)
    pairs = dy.reshape(*dy.shape[:axis], size, 2, *dy.shape[axis + 1 :])
    even, odd = (lax.index_in_dim(pairs, i, axis + 1, keepdims=False) for i in (0, 1))
    none = jnp.zeros_like(lax.slice_in_dim(even, 0, 1, axis=axis))
    from_next = lax.slice_in_dim(before * even, 1, size, axis=axis)
    from_previous = lax.slice_in_dim(after * odd, 0, size - 1, axis=axis)
    return (
        (1 - before) * even
        + (1 - after) * odd
        + jnp.concatenate([from_next, none], axis)
        + jnp.concatenate([none, from_previous], axis)
    )


def _shares(x: jax.Array, axis: int, size: int) -> tuple[jax.Array, jax.Array]:
    """The weight of x[m − 1] in output 2m and of x[m + 1] in output 2m + 1, of length n along the
    axis."""
    shape = [1] * x.ndim
    shape[axis] = size
    before = (jnp.arange(size) / (2 * size - 1)).astype(x.dtype).reshape(shape)
    return before, jnp.flip(before, axis)


# By hand, and each axis by itself: 0.8 ms for 8 channels at 8 × 128² (one core). JAX's own gradient
# takes 2.1, and 2.0 with the axes kept apart.
_double.defvjp(
    lambda x: (_double(x), None),
    lambda _, dy: (_halve_axis(lax.optimization_barrier(_halve_axis(dy, 1)), 2),),
)


def conv_upsampled(x: jax.Array | None, below: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolution of [x, up-sampled below], padded by 1.

    A GPU's form joins the two. The others take the sum of two convolutions, and for that of the
    up-sampled image, where its channels are many, mix channels first: both are linear, so that each
    tap of the kernel is a product at a quarter of the pixels, and one matrix an axis then does the
    up-sampling, the taps' shifts and their sum. Measured for the TransUNet's levels on a CPU, value
    and gradients in 0.35 to 0.4 of the time of the joined form; on a TPU it pays where few features
    are left (the compiler's estimate for 64 → 16 at 128²: 6.5 against 11.7 ms). Where it does not
    pay, a TPU does better without joining all the same (128 + 128 → 64 at 64²: 5.7 against 6.5 ms).

    x (B, 2H, 2W, c) or None, below (B, H, W, C) and kernel (3, 3, c + C, n) → (B, 2H, 2W, n).
    """
    channels = 0 if x is None else x.shape[3]
    few = {'cpu': 1 / 2, 'tpu': 1 / 4}.get(platform(), 0)
    if kernel.shape[3] <= few * below.shape[3]:
        y = _mix_then_upsample(below, kernel[:, :, channels:])
    else:
        up = upsample_bilinear(below)
        if x is None or platform() != 'tpu':
            joined = up if x is None else jnp.concatenate([x, up], axis=-1)
            return conv2d(joined, kernel)
        y = conv2d(up, kernel[:, :, channels:])
    if x is not None:
        y += conv2d(x, kernel[:, :, :channels])
    return y


def _mix_then_upsample(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolution of the up-sampled x (B, H, W, C) with kernel (3, 3, C, n) → (B, 2H, 2W, n)."""
    rows, columns = (jnp.asarray(_shifted_matrices(size), x.dtype) for size in x.shape[1:3])
    mixed = jnp.einsum('bhwc,yxcn->bhwyxn', x, kernel)
    wide = jnp.einsum('qxw,bhwyxn->bhyqn', columns, mixed)
    return jnp.einsum('pyh,bhyqn->bpqn', rows, wide)


def _shifted_matrices(size: int) -> np.ndarray:
    """(2n, 3, n): row p of tap t holds the weights of up-sampled sample p + t − 1, 0 outside."""
    matrix = np.pad(_corner_aligned_matrix(size), ((1, 1), (0, 0)))
    return np.stack([matrix[tap : tap + 2 * size] for tap in range(3)], axis=1)
