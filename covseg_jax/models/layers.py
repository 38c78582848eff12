"""Layers of the networks: plain forms, and forms that are fast where the plain ones are slow.

Every layer keeps one parameter layout whichever form runs. conv_impl chooses the form: 'native' is
XLA's own convolution, 'folded' builds a convolution from thinner ones and products of matrices, and
'auto' is 'folded' on a CPU (where XLA's 3D convolution is ten times slower) and 'native' elsewhere.
Axes are B D H W C, channels last; arrays of parameters are float32, arithmetic is in `dtype`.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

Dtype = Any
Initializer = Callable[..., jax.Array]
Pads = tuple[tuple[int, int], ...]  # (before, after) for each spatial axis

# PyTorch's default for convolutions and linear layers: U(−1/√fan_in, 1/√fan_in)
torch_uniform = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')
keras_uniform = nn.initializers.glorot_uniform()


def is_folded(conv_impl: str) -> bool:
    """True where conv_impl means the CPU forms.

    Raises:
      ValueError: conv_impl is none of 'auto', 'native', 'folded'.
    """
    if conv_impl not in ('auto', 'native', 'folded'):
        raise ValueError(f"conv_impl={conv_impl!r}; use 'auto', 'native' or 'folded'")
    return conv_impl == 'folded' or (conv_impl == 'auto' and jax.default_backend() == 'cpu')


# --- 2D convolution


def conv2d(
    x: jax.Array, kernel: jax.Array, *, stride: int = 1, conv_impl: str = 'auto'
) -> jax.Array:
    """2D convolution padded by (k − 1) / 2 on every side, as PyTorch's padding=k//2.

    Args:
      x: (B, H, W, C).
      kernel: (k, k, C, n), k odd.
      stride: step in H and W; they must be multiples of it.
      conv_impl: form, see the module's docstring. 'folded' computes 1×1 convolutions as products.

    Returns:
      (B, H / stride, W / stride, n).
    """
    size = kernel.shape[0]
    pad = (size // 2, size // 2)
    if is_folded(conv_impl):
        if size == 1:
            return x[:, ::stride, ::stride] @ kernel[0, 0]
        if x.shape[3] == 1:
            # sums row by row: XLA adds all k² products one after the other, and the rounding of
            # the TransUNet's stem is what its gradients differ by from those in float64
            rows = (_conv2d_patches(x, kernel, stride, (row,)) for row in range(size))
            return sum(rows)
        if x.shape[3] >= 512 and (stride > 1 or x.shape[1] * x.shape[2] <= 64):
            return _conv2d_patches(x, kernel, stride, range(size))
    return _conv_nd(x, kernel, (stride, stride), (pad, pad))


def _conv2d_patches(x: jax.Array, kernel: jax.Array, stride: int, rows: Sequence[int]) -> jax.Array:
    """The part of a 2D convolution that `rows` of its kernel do, as one product of patches.

    All rows at once pay where C is large and H × W small.
    """
    size, channels = kernel.shape[0], kernel.shape[2]
    pad = (size // 2, size // 2)
    height, width = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), pad, pad, (0, 0)))
    windows = [
        x[:, i : i + height : stride, j : j + width : stride] for i in rows for j in range(size)
    ]
    flat = kernel[rows[0] : rows[-1] + 1].reshape(len(rows) * size * channels, -1)
    return jnp.concatenate(windows, axis=-1) @ flat


def _conv_nd(x: jax.Array, kernel: jax.Array, strides: tuple[int, ...], pads: Pads) -> jax.Array:
    """XLA's convolution, channels last, 2D or 3D by the rank of x."""
    axes = 'DHW'[-(x.ndim - 2) :]
    numbers = (f'N{axes}C', f'{axes}IO', f'N{axes}C')
    return lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=numbers)


class Conv2D(nn.Module):
    """2D convolution with parameters `kernel` (k, k, C, n) and `bias` (n,).

    Fields: features n; kernel_size k, odd; stride; use_bias; dtype of the arithmetic; conv_impl;
    kernel_init. Padding is (k − 1) / 2 on every side.
    """

    features: int
    kernel_size: int
    stride: int = 1
    use_bias: bool = True
    dtype: Dtype = jnp.float32
    conv_impl: str = 'auto'
    kernel_init: Initializer = torch_uniform

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, C) → (B, H / stride, W / stride, features) in `dtype`."""
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = self.param('kernel', self.kernel_init, shape).astype(self.dtype)
        y = conv2d(x.astype(self.dtype), kernel, stride=self.stride, conv_impl=self.conv_impl)
        if self.use_bias:
            y += self.param('bias', nn.initializers.zeros, (self.features,)).astype(self.dtype)
        return y


# --- 3D convolution


def conv3d(
    x: jax.Array,
    kernel: jax.Array,
    *,
    stride: int = 1,
    padding: str = 'SAME',
    conv_impl: str = 'auto',
) -> jax.Array:
    """3D convolution.

    The folded form puts the depth taps of the kernel into the channels of one 2D convolution: into
    its inputs where C < n or with a stride, else into its outputs, which are then shifted in depth
    and added. Its gradients are forms of the same kind (`_conv3d_thin`).

    Args:
      x: (B, D, H, W, C).
      kernel: (k, k, k, C, n).
      stride: step in D, H and W.
      padding: 'SAME' or 'VALID', as XLA and Keras mean them.
      conv_impl: form, see the module's docstring.

    Returns:
      (B, d, h, w, n): D, H, W divided by the stride ('SAME', rounded up) or k − 1 less ('VALID').
    """
    size = kernel.shape[0]
    pads = tuple(lax.padtype_to_pads(x.shape[1:4], (size,) * 3, (stride,) * 3, padding))
    if not is_folded(conv_impl):
        return _conv_nd(x, kernel, (stride,) * 3, pads)
    if size == 1 and stride == 1:
        return x @ kernel[0, 0, 0]
    if stride > 1:
        return _conv3d_taps_in(x, kernel, stride, pads)
    return _conv3d_thin(x, kernel, pads)


def _conv3d_taps_in(x: jax.Array, kernel: jax.Array, stride: int, pads: Pads) -> jax.Array:
    """3D convolution whose depth taps are input channels of one 2D convolution."""
    size, channels, features = kernel.shape[0], *kernel.shape[3:]
    batch = x.shape[0]
    depth = (x.shape[1] + sum(pads[0]) - size) // stride + 1
    x = jnp.pad(x, ((0, 0), pads[0], (0, 0), (0, 0), (0, 0)))
    slices = [x[:, tap : tap + stride * (depth - 1) + 1 : stride] for tap in range(size)]
    folded = jnp.concatenate(slices, axis=-1)  # (B, d, H, W, k·C)
    flat = kernel.transpose(1, 2, 0, 3, 4).reshape(*kernel.shape[1:3], size * channels, features)
    y = _conv_nd(folded.reshape(-1, *folded.shape[2:]), flat, (stride, stride), pads[1:])
    return y.reshape(batch, depth, *y.shape[1:])


def _conv3d_taps_out(x: jax.Array, kernel: jax.Array, pads: Pads) -> jax.Array:
    """3D convolution, stride 1, whose depth taps are output channels of one 2D convolution."""
    size, channels, features = kernel.shape[0], *kernel.shape[3:]
    batch, depth = x.shape[:2]
    flat = kernel.transpose(1, 2, 3, 0, 4).reshape(*kernel.shape[1:3], channels, size * features)
    y = _conv_nd(x.reshape(-1, *x.shape[2:]), flat, (1, 1), pads[1:])
    y = y.reshape(batch, depth, *y.shape[1:])
    before, after = pads[0]
    out_depth = depth + before + after - size + 1
    total = None
    for tap in range(size):
        # output slice d takes tap t of input slice d + t − before; missing slices add nothing
        part = y[..., tap * features : (tap + 1) * features]
        edges = (before - tap, out_depth - depth - before + tap, 0)
        none = (0, 0, 0)
        part = lax.pad(part, jnp.zeros((), y.dtype), (none, edges, none, none, none))
        total = part if total is None else total + part
    return total


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv3d_thin(x: jax.Array, kernel: jax.Array, pads: Pads) -> jax.Array:
    """3D convolution of stride 1 by whichever of the two forms has fewer folded channels."""
    if kernel.shape[3] < kernel.shape[4]:
        return _conv3d_taps_in(x, kernel, 1, pads)
    return _conv3d_taps_out(x, kernel, pads)


def _conv3d_thin_forward(x, kernel, pads):
    return _conv3d_thin(x, kernel, pads), (x, kernel)


def _conv3d_thin_backward(pads, saved, dy):
    x, kernel = saved
    size = kernel.shape[0]
    mirrored = tuple((size - 1 - before, size - 1 - after) for before, after in pads)
    dx = _conv3d_thin(dy, jnp.flip(kernel, (0, 1, 2)).swapaxes(3, 4), mirrored)
    return dx, _kernel_gradient(x, dy, size, pads)


_conv3d_thin.defvjp(_conv3d_thin_forward, _conv3d_thin_backward)


def _kernel_gradient(x: jax.Array, dy: jax.Array, size: int, pads: Pads) -> jax.Array:
    """Gradient (k, k, k, C, n) of a 3D convolution of stride 1 with respect to its kernel.

    A scan over depth: the k×k patches of a slice of x against the k slices of dy that it reaches,
    one matrix product a slice (about 4 × faster than XLA's own where slices are large).
    """
    depth, channels = x.shape[1], x.shape[-1]
    out_depth, height, width, features = dy.shape[1:]
    # input slice e meets tap t in output slice e − t + before
    before = pads[0][0]
    edge = (size - 1 - before, depth + before - out_depth, 0)
    none = (0, 0, 0)
    dy = lax.pad(dy, jnp.zeros((), dy.dtype), (none, edge, none, none, none))
    x = jnp.pad(x, ((0, 0), (0, 0), *pads[1:], (0, 0)))

    def add_slice(total, index):
        image = lax.dynamic_index_in_dim(x, index, 1, keepdims=False)
        windows = [
            image[:, i : i + height, j : j + width] for i in range(size) for j in range(size)
        ]
        patches = jnp.concatenate(windows, axis=-1).reshape(-1, size * size * channels)
        reached = lax.dynamic_slice_in_dim(dy, index, size, axis=1)  # taps in falling order
        reached = jnp.moveaxis(reached, 1, 3).reshape(-1, size * features)
        product = jnp.matmul(patches.T, reached, preferred_element_type=jnp.float32)
        return total + product, None

    zeros = jnp.zeros((size * size * channels, size * features), jnp.float32)
    total, _ = lax.scan(add_slice, zeros, jnp.arange(depth))
    gradient = total.reshape(size, size, channels, size, features)
    return jnp.flip(gradient, 3).transpose(3, 0, 1, 2, 4).astype(dy.dtype)


class Conv3D(nn.Module):
    """3D convolution with parameters `kernel` (k, k, k, C, n) and `bias` (n,).

    Fields: features n; kernel_size k; stride; padding 'SAME' or 'VALID'; use_spectral_norm; dtype
    of the arithmetic; conv_impl; kernel_init.

    With use_spectral_norm the kernel, as a matrix (k³·C, n), is divided by its largest singular
    value, found by one step of power iteration a call (Miyato et al., ICLR 2018, algorithm 1). The
    iteration's vector lives in collection 'spectral' and moves on where that is mutable and
    train=True.
    """

    features: int
    kernel_size: int
    stride: int = 1
    padding: str = 'SAME'
    use_spectral_norm: bool = False
    dtype: Dtype = jnp.float32
    conv_impl: str = 'auto'
    kernel_init: Initializer = keras_uniform

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """(B, D, H, W, C) → (B, d, h, w, features) in `dtype`, sizes as in `conv3d`."""
        shape = (*(self.kernel_size,) * 3, x.shape[-1], self.features)
        kernel = self.param('kernel', self.kernel_init, shape)
        bias = self.param('bias', nn.initializers.zeros, (self.features,)).astype(self.dtype)
        if self.use_spectral_norm:
            kernel = kernel / self._largest_singular_value(kernel, train)
        y = conv3d(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            stride=self.stride,
            padding=self.padding,
            conv_impl=self.conv_impl,
        )
        return y + bias

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
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, D, H, W, C) → (B, 2D, 2H, 2W, features) in `dtype`."""
        batch, depth, height, width, channels = x.shape
        kernel = self.param('kernel', self.kernel_init, (2, 2, 2, channels, self.features))
        bias = self.param('bias', nn.initializers.zeros, (self.features,)).astype(self.dtype)
        kernel = kernel.astype(self.dtype).transpose(3, 0, 1, 2, 4).reshape(channels, -1)
        y = (x.astype(self.dtype) @ kernel).reshape(
            batch, depth, height, width, 2, 2, 2, self.features
        )
        y = y.transpose(0, 1, 4, 2, 5, 3, 6, 7)
        return y.reshape(batch, 2 * depth, 2 * height, 2 * width, self.features) + bias


# --- pooling and up-sampling


def max_pool(x: jax.Array) -> jax.Array:
    """Maximum over windows of 2 in every spatial axis; an odd last row is dropped.

    Where several elements of a window share the maximum, as in the constant air around the lungs,
    the gradient is split equally among them (`nn.max_pool` gives it to the first of them).

    Args:
      x: (B, H, W, C) or (B, D, H, W, C).

    Returns:
      The same with every spatial size halved, rounded down.
    """
    spatial = x.shape[1:-1]
    x = x[(slice(None), *(slice(0, size // 2 * 2) for size in spatial))]
    windows = [part for size in spatial for part in (size // 2, 2)]
    x = x.reshape(x.shape[0], *windows, x.shape[-1])
    return x.max(axis=tuple(range(2, 2 * len(spatial) + 1, 2)))


def upsample_bilinear(x: jax.Array, *, conv_impl: str = 'auto') -> jax.Array:
    """Bilinear up-sampling ×2 with aligned corners, as PyTorch's align_corners=True.

    Output sample i of 2n lies at input position i (n − 1) / (2n − 1); `jax.image.resize` would put
    it at (i + ½) / 2 − ½. 'native' is two products of matrices, 'folded' shifts and adds.

    Args:
      x: (B, H, W, C).
      conv_impl: form, see the module's docstring.

    Returns:
      (B, 2H, 2W, C), dtype of x.
    """
    if is_folded(conv_impl):
        return _double_axis(_double_axis(x, 1), 2)
    rows, columns = (_corner_aligned_matrix(size).astype(x.dtype) for size in x.shape[1:3])
    return jnp.einsum('ph,qw,bhwc->bpqc', rows, columns, x)


def _corner_aligned_matrix(size: int) -> jax.Array:
    """(2n, n) weights of linear interpolation with aligned corners."""
    position = jnp.arange(2 * size) * ((size - 1) / (2 * size - 1))
    return jnp.maximum(0, 1 - jnp.abs(position[:, None] - jnp.arange(size)))


def _double_axis(x: jax.Array, axis: int) -> jax.Array:
    """Linear ×2 along one axis: samples 2m and 2m + 1 lie m / (2n − 1) before x[m] and as far
    after it as n − 1 − m counts, so each is a mix of x[m] with one neighbour."""
    size = x.shape[axis]
    shape = [1] * x.ndim
    shape[axis] = size
    share = (jnp.arange(size) / (2 * size - 1)).astype(x.dtype).reshape(shape)
    first = lax.slice_in_dim(x, 0, 1, axis=axis)
    last = lax.slice_in_dim(x, size - 1, size, axis=axis)
    earlier = jnp.concatenate([first, lax.slice_in_dim(x, 0, size - 1, axis=axis)], axis)
    later = jnp.concatenate([lax.slice_in_dim(x, 1, size, axis=axis), last], axis)
    even = x + share * (earlier - x)
    odd = x + jnp.flip(share, axis) * (later - x)
    doubled = jnp.stack([even, odd], axis + 1)
    return doubled.reshape(*x.shape[:axis], 2 * size, *x.shape[axis + 1 :])


# --- normalisation


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last, with PyTorch's running statistics.

    Normalises by the biased variance of the batch, and keeps the *unbiased* one (n / (n − 1) times
    as large) in 'batch_stats', as PyTorch does; `flax.linen.BatchNorm` keeps the biased one.
    Statistics are float32 whatever the compute dtype, found in two passes. Under jit with a batch
    sharded over devices they are those of the whole batch. momentum 0.9 is PyTorch's 0.1.

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
        y, mean, var = _normalise_batch(x, scale, bias, self.epsilon)
        if self.is_mutable_collection('batch_stats') and not self.is_initializing():
            count = math.prod(x.shape[:-1])
            unbiased = var * (count / max(count - 1, 1))
            keep = self.momentum
            running_mean.value = keep * running_mean.value + (1 - keep) * mean
            running_var.value = keep * running_var.value + (1 - keep) * unbiased
        return y.astype(self.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _normalise_batch(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(normalised x, mean, biased variance); only the first is differentiated."""
    axes = tuple(range(x.ndim - 1))
    mean = jnp.mean(x, axes, dtype=jnp.float32)
    var = jnp.mean(jnp.square(x - mean), axes)
    y = (x - mean) * (scale * lax.rsqrt(var + epsilon)) + bias
    return y.astype(x.dtype), mean, var


def _normalise_batch_forward(x, scale, bias, epsilon):
    y, mean, var = _normalise_batch(x, scale, bias, epsilon)
    return (y, mean, var), (x, scale, mean, lax.rsqrt(var + epsilon))


def _normalise_batch_backward(epsilon, saved, gradients):
    del epsilon
    x, scale, mean, inverse = saved
    dy = gradients[0]
    axes = tuple(range(x.ndim - 1))
    # Ioffe and Szegedy (ICML 2015), section 3, with the sums gathered: two passes instead of the
    # four that automatic differentiation makes, and less cancellation in float32
    dbias = jnp.sum(dy, axes, dtype=jnp.float32)
    dscale = jnp.sum(dy * ((x - mean) * inverse), axes)
    count = math.prod(x.shape[:-1])
    dx = (dy - dbias / count - (x - mean) * (inverse * dscale / count)) * (scale * inverse)
    return dx.astype(x.dtype), dscale, dbias


_normalise_batch.defvjp(_normalise_batch_forward, _normalise_batch_backward)
