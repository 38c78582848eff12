"""Layers of the networks, with one layout of parameters whichever form of convolution runs.

Axes are B D H W C, channels last; parameters are float32, arithmetic is in `dtype`. Where a volume
may be `Blocks`, the layer does to them what it does to the volume that they stand for.
"""

import functools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from covseg_jax.models.convolution import conv2d, conv3d, conv_transpose
from covseg_jax.models.lanes import (
    Blocks,
    conv_blocks,
    conv_transpose_blocks,
    join_blocks,
    max_pool_blocks,
    merge_depth,
    split_depth,
)
from covseg_jax.models.sums import add_bias, channel_sums
from covseg_jax.models.upsampling import conv_upsampled

Dtype = Any
Initializer = Callable[..., jax.Array]


# --- random numbers. They are drawn in one row and then shaped: XLA takes ten times as long to
# compile threefry for four or five axes, and a network draws dozens of such arrays


def torch_uniform(key: jax.Array, shape: Sequence[int], dtype: Dtype = jnp.float32) -> jax.Array:
    """PyTorch's default kernels, U(−b, b) with b = 1/√fan_in; the last axis is the output."""
    return _uniform(key, shape, dtype, math.prod(shape[:-1]) ** -0.5)


def keras_uniform(key: jax.Array, shape: Sequence[int], dtype: Dtype = jnp.float32) -> jax.Array:
    """Keras's default kernels (Glorot), U(−b, b) with b = √(6 / (fan_in + fan_out))."""
    fans = math.prod(shape[:-2]) * (shape[-2] + shape[-1])
    return _uniform(key, shape, dtype, math.sqrt(6 / fans))


def _uniform(key: jax.Array, shape: Sequence[int], dtype: Dtype, bound: float) -> jax.Array:
    row = jax.random.uniform(key, (math.prod(shape),), dtype, -bound, bound)
    return row.reshape(shape)


class Dropout(nn.Module):
    """Zeros a share `rate` of the entries in training and scales up the others; key 'dropout'."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Any shape → the same shape and dtype."""
        if not train or self.rate == 0:
            return x
        keep = 1 - self.rate
        kept = jax.random.bernoulli(self.make_rng('dropout'), keep, (x.size,)).reshape(x.shape)
        return jnp.where(kept, x / keep, 0).astype(x.dtype)


class Conv2D(nn.Module):
    """2D convolution with parameters `kernel` (k, k, C, n) and `bias` (n,).

    Padding is (k − 1) / 2 on every side.
    """

    features: int  # n
    kernel_size: int  # k, odd
    stride: int = 1
    use_bias: bool = True
    dtype: Dtype = jnp.float32
    kernel_init: Initializer = torch_uniform
    bias_init: Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: jax.Array | None, below: jax.Array | None = None) -> jax.Array:
        """Convolves x (B, H, W, C), or x joined with the up-sampled `below`, or that alone.

        `below` is (B, H / 2, W / 2, c), for a stride of 1; bilinear ×2 with aligned corners makes
        it as large as x, whose channels come first. Returns (B, H / stride, W / stride, features)
        in `dtype`.
        """
        inputs = [each.astype(self.dtype) for each in (x, below) if each is not None]
        channels = sum(each.shape[-1] for each in inputs)
        shape = (self.kernel_size, self.kernel_size, channels, self.features)
        kernel = self.param('kernel', self.kernel_init, shape).astype(self.dtype)
        if below is None:
            y = conv2d(inputs[0], kernel, stride=self.stride)
        else:
            *skip, below = inputs
            y = conv_upsampled(skip[0] if skip else None, below, kernel)
        if self.use_bias:
            bias = self.param('bias', self.bias_init, (self.features,))
            y = add_bias(y, bias.astype(self.dtype))
        return y


class Conv3D(nn.Module):
    """3D convolution with parameters `kernel` (k, k, k, C, n) and `bias` (n,).

    With use_spectral_norm the kernel, as a matrix (k³·C, n), is divided by its largest singular
    value, found by one step of power iteration a call (Miyato et al., ICLR 2018, algorithm 1). The
    iteration's vector lives in collection 'spectral' and moves on where that is mutable and
    train=True.
    """

    features: int  # n
    kernel_size: int  # k
    stride: int = 1
    padding: str = 'SAME'  # or 'VALID'
    use_spectral_norm: bool = False
    dtype: Dtype = jnp.float32
    kernel_init: Initializer = keras_uniform

    @nn.compact
    def __call__(self, x: jax.Array | Blocks, *, train: bool = False) -> jax.Array | Blocks:
        """(B, D, H, W, C) → (B, d, h, w, features) in `dtype`, sizes as in `conv3d`; Blocks →
        Blocks, as in `conv_blocks`, with a stride of 1."""
        shape = (*(self.kernel_size,) * 3, _channels(x), self.features)
        kernel = self.param('kernel', self.kernel_init, shape)
        bias = self.param('bias', nn.initializers.zeros, (self.features,)).astype(self.dtype)
        if self.use_spectral_norm:
            kernel = kernel / self._largest_singular_value(kernel, train)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        if isinstance(x, Blocks):
            y = conv_blocks(x, kernel, padding=self.padding)
            return y.replace(parts=(y.parts[0] + jnp.tile(bias, y.slices),))
        return add_bias(conv3d(x, kernel, stride=self.stride, padding=self.padding), bias)

    def _largest_singular_value(self, kernel: jax.Array, train: bool) -> jax.Array:
        matrix = kernel.reshape(-1, self.features)
        start = partial(jnp.ones, (self.features,))
        vector = self.variable('spectral', 'vector', start)
        left = _unit(matrix @ vector.value)
        right = _unit(left @ matrix)
        if train and self.is_mutable_collection('spectral') and not self.is_initializing():
            vector.value = lax.stop_gradient(right)
        return lax.stop_gradient(left) @ matrix @ lax.stop_gradient(right)


def _unit(vector: jax.Array) -> jax.Array:
    return vector / (jnp.linalg.norm(vector) + 1e-12)


class ConvTranspose3D(nn.Module):
    """Transposed 3D convolution of kernel 2 and stride 2: `kernel` (2, 2, 2, C, n), `bias` (n,).

    Output voxel 2i + a is input voxel i times kernel[a]: no windows overlap, so that the layer is
    one product of matrices on every backend. Keras stores this kernel as (2, 2, 2, n, C).
    """

    features: int
    dtype: Dtype = jnp.float32
    kernel_init: Initializer = keras_uniform

    @nn.compact
    def __call__(self, x: jax.Array | Blocks) -> jax.Array | Blocks:
        """(B, D, H, W, C) → (B, 2D, 2H, 2W, features) in `dtype`; Blocks → Blocks."""
        kernel = self.param('kernel', self.kernel_init, (2, 2, 2, _channels(x), self.features))
        kernel, x = kernel.astype(self.dtype), x.astype(self.dtype)
        bias = self.param('bias', nn.initializers.zeros, (self.features,)).astype(self.dtype)
        if isinstance(x, Blocks):
            y = conv_transpose_blocks(x, kernel)
            return y.replace(parts=(y.parts[0] + jnp.tile(bias, y.slices),))
        return add_bias(conv_transpose(x, kernel), bias)


def _channels(x: jax.Array | Blocks) -> int:
    return sum(x.widths) if isinstance(x, Blocks) else x.shape[-1]


# --- joining and pooling


def join(*parts: jax.Array | Blocks) -> jax.Array | Blocks:
    """Joined along C; Blocks where one of the parts is, in the blocks of that one."""
    blocks = next((part for part in parts if isinstance(part, Blocks)), None)
    if blocks is None:
        return jnp.concatenate(parts, axis=-1)
    num = blocks.num_blocks
    return join_blocks(*(p if isinstance(p, Blocks) else split_depth(p, num) for p in parts))


def max_pool(x: jax.Array | Blocks) -> jax.Array | Blocks:
    """Maximum over windows of 2 in every spatial axis; an odd last row is dropped.

    Where several elements of a window share the maximum, as in the constant air around the lungs,
    the gradient is split equally among them (`nn.max_pool` gives it to the first of them).
    Images (B, H, W, C), volumes and Blocks come back as such, but for Blocks of single slices,
    which cannot be halved: as an array.
    """
    if isinstance(x, Blocks):
        if x.slices > 1:
            return max_pool_blocks(x)
        x = merge_depth(x)
    spatial = x.shape[1:-1]
    x = x[(slice(None), *(slice(0, size // 2 * 2) for size in spatial))]
    windows = [part for size in spatial for part in (size // 2, 2)]
    x = x.reshape(x.shape[0], *windows, x.shape[-1])
    return x.max(axis=tuple(range(2, 2 * len(spatial) + 1, 2)))


# --- normalisation


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last, with PyTorch's running statistics.

    Normalises by the biased variance of the batch, and keeps the *unbiased* one (n / (n − 1) times
    as large) in 'batch_stats', as PyTorch does; `flax.linen.BatchNorm` keeps the biased one.
    Statistics are float32 whatever the compute dtype, found in one pass over x about the running
    mean (on a TPU together with the convolution that makes x, which saves 15 % of a level's time by
    the compiler's estimate). Under jit with a batch sharded over devices they are those of the
    whole batch. momentum 0.9 is PyTorch's 0.1.

    Parameters: `scale` and `bias` (C,); batch_stats: `mean` and `var` (C,).
    """

    dtype: Dtype = jnp.float32
    momentum: float = 0.9
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Any (B, …, C) → the same shape in `dtype`."""
        channels = (x.shape[-1],)
        scale = self.param('scale', nn.initializers.ones, channels)
        bias = self.param('bias', nn.initializers.zeros, channels)
        running_mean = self.variable('batch_stats', 'mean', partial(jnp.zeros, channels))
        running_var = self.variable('batch_stats', 'var', partial(jnp.ones, channels))
        if not train:
            factor = scale * lax.rsqrt(running_var.value + self.epsilon)
            return ((x - running_mean.value) * factor + bias).astype(self.dtype)
        y, mean, var = _normalise_batch(x, scale, bias, running_mean.value, self.epsilon)
        if self.is_mutable_collection('batch_stats') and not self.is_initializing():
            count, keep = math.prod(x.shape[:-1]), self.momentum
            unbiased = var * (count / max(count - 1, 1))
            running_mean.value = keep * running_mean.value + (1 - keep) * mean
            running_var.value = keep * running_var.value + (1 - keep) * unbiased
        return y.astype(self.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _normalise_batch(
    x: jax.Array, scale: jax.Array, bias: jax.Array, near: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(normalised x, mean, biased variance); only the first is differentiated, and not by `near`.

    The variance is E[(x − near)²] − (E[x] − near)² (Chan, Golub and LeVeque, The American
    Statistician 37:242, 1983), which loses no digits where `near` lies within some standard
    deviations of the mean.
    """
    count = math.prod(x.shape[:-1])
    shifted = x.astype(jnp.float32) - near
    offset = channel_sums(shifted) / count
    mean = near + offset
    var = jnp.maximum(channel_sums(jnp.square(shifted)) / count - jnp.square(offset), 0)
    y = (x - mean) * (scale * lax.rsqrt(var + epsilon)) + bias
    return y.astype(x.dtype), mean, var


def _normalise_batch_forward(x, scale, bias, near, epsilon):
    y, mean, var = _normalise_batch(x, scale, bias, near, epsilon)
    return (y, mean, var), (x, scale, mean, lax.rsqrt(var + epsilon))


def _normalise_batch_backward(epsilon, saved, gradients):
    del epsilon
    x, scale, mean, inverse = saved
    dy = gradients[0]
    # Ioffe and Szegedy (ICML 2015), section 3, with the sums gathered: two passes instead of the
    # four that automatic differentiation makes, and less cancellation in float32
    dbias = channel_sums(dy)
    dscale = channel_sums(dy * ((x - mean) * inverse))
    count = math.prod(x.shape[:-1])
    dx = (dy - dbias / count - (x - mean) * (inverse * dscale / count)) * (scale * inverse)
    return dx.astype(x.dtype), dscale, dbias, jnp.zeros_like(mean)


_normalise_batch.defvjp(_normalise_batch_forward, _normalise_batch_backward)


class GroupNorm(nn.Module):
    """Group normalisation (Wu and He, ECCV 2018): each scan's mean and variance over its voxels and
    a group of neighbouring channels.

    Groups have `group_size` channels; where that does not divide their number, the first ones have
    one more, so that any number of channels can be normalised (`flax.linen.GroupNorm` wants equal
    groups). Statistics are float32 whatever the compute dtype. A volume and the Blocks that stand
    for it are normalised alike.

    Parameters: `scale` and `bias` (C,).
    """

    dtype: Dtype = jnp.float32
    group_size: int = 4
    epsilon: float = 1e-3

    @nn.compact
    def __call__(self, x: jax.Array | Blocks) -> jax.Array | Blocks:
        """(B, D, H, W, C) → the same shape in `dtype`; Blocks of one part → Blocks."""
        channels = _channels(x)
        scale = self.param('scale', nn.initializers.ones, (channels,))
        bias = self.param('bias', nn.initializers.zeros, (channels,))
        if not isinstance(x, Blocks):
            affine = self._affine(x.astype(jnp.float32), (1, 2, 3), scale, bias)
            factor, offset = (each[:, None, None, None] for each in affine)
            return (x * factor + offset).astype(self.dtype)
        (part,) = x.parts
        by_slice = part.reshape(-1, x.num_blocks, *part.shape[1:3], x.slices, channels)
        affine = self._affine(by_slice.astype(jnp.float32), (1, 2, 3, 4), scale, bias)
        factor, offset = (
            jnp.repeat(jnp.tile(each, x.slices), x.num_blocks, axis=0)[:, None, None]
            for each in affine
        )
        return x.replace(parts=((part * factor + offset).astype(self.dtype),))

    def _affine(
        self, x: jax.Array, axes: tuple[int, ...], scale: jax.Array, bias: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """(B, C) each: a factor of x, and then an offset."""
        to_groups = _mean_of_groups(x.shape[-1], self.group_size)
        channel_means = jnp.stack([jnp.mean(x, axes), jnp.mean(jnp.square(x), axes)])
        mean, mean_square = jnp.matmul(channel_means, to_groups, precision='highest')
        var = jnp.maximum(mean_square - jnp.square(mean), 0)
        factor = scale * lax.rsqrt(var + self.epsilon)
        return factor, bias - mean * factor


@functools.cache
def _mean_of_groups(channels: int, group_size: int) -> np.ndarray:
    """(C, C): what gives each channel the mean of its group's."""
    groups = np.array_split(np.arange(channels), max(1, channels // group_size))
    matrix = np.zeros((channels, channels), np.float32)
    for group in groups:
        matrix[np.ix_(group, group)] = 1 / len(group)
    return matrix
