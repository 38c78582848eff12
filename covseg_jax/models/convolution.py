"""Convolutions as functions, in the form that is fast on the platform that they are traced for.

On a CPU, where XLA's 3D convolution is ten times slower, they are built from thinner ones and
products of matrices; on a TPU they are XLA's own on tensors that fill its lanes, see `lanes`; on a
GPU XLA's own. All forms compute the same from the same kernels, and this module alone chooses.
What was measured stands in the comments here.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Pads = tuple[tuple[int, int], ...]  # (before, after) for each spatial axis


_platform = contextvars.ContextVar('platform', default='')


def platform() -> str:
    """'cpu', 'tpu' or another: what `tracing_for` says, or else what computes here."""
    return _platform.get() or jax.default_backend()


@contextlib.contextmanager
def tracing_for(name: str) -> Iterator[None]:
    """What is traced in here, such as an export, gets the forms of another platform.

    A function that was traced before keeps its forms: jit a new one. `name` is 'cpu', 'tpu' or
    'cuda'.
    """
    token = _platform.set(name)
    try:
        yield
    finally:
        _platform.reset(token)


def product(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """x (..., C) @ matrix (C, n) → (..., n).

    On a CPU x becomes (rows, C) first: the matrix's gradient is then a product of two matrices as
    they lie, where XLA copies an x of more axes transposed (1×1 convolution, 16 → 32 at 8 × 64²:
    0.8 instead of 4.8 ms, one core). On a TPU, whose tiles pad the last two axes, that would copy;
    on a GPU it was not tried.
    """
    if platform() != 'cpu':
        return x @ matrix
    rows = x.reshape(-1, x.shape[-1]) @ matrix
    return rows.reshape(*x.shape[:-1], matrix.shape[-1])


# --- 2D convolution


def conv2d(x: jax.Array, kernel: jax.Array, *, stride: int = 1) -> jax.Array:
    """2D convolution padded by (k − 1) / 2 on every side, as PyTorch's padding=k//2.

    x (B, H, W, C) and kernel (k, k, C, n), k odd → (B, H / stride, W / stride, n); H and W must be
    multiples of the stride.
    """
    size = kernel.shape[0]
    pad = (size // 2, size // 2)
    if platform() == 'cpu':
        if size == 1:
            return product(x[:, ::stride, ::stride], kernel[0, 0])
        if x.shape[3] == 1 and stride > 1:
            return _conv2d_blocks(x, kernel, stride)
        if x.shape[3] >= 512 and (stride > 1 or x.shape[1] * x.shape[2] <= 64):
            return _conv2d_patches(x, kernel, stride)
        if size == 3 and stride == 1 and x.shape[2] % 2 == 0 and kernel.shape[3] <= 8:
            return _conv2d_pairs(x, kernel)
    return _conv_nd(x, kernel, (stride, stride), (pad, pad))


def _conv2d_blocks(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """2D convolution as one of stride 1, of blocks of stride² pixels as channels: the TransUNet's
    stem, 7 × 7 from one channel, 3.7 ms with its kernel's gradient at 8 × 128² (one core) where
    patches take 16."""
    size, channels, features = kernel.shape[0], *kernel.shape[2:]
    batch, height, width = x.shape[:3]
    taps = -(-size // stride)
    extra = taps * stride - size
    kernel = jnp.pad(kernel, ((0, extra), (0, extra), (0, 0), (0, 0)))
    kernel = kernel.reshape(taps, stride, taps, stride, channels, features)
    kernel = kernel.transpose(0, 2, 1, 3, 4, 5).reshape(taps, taps, -1, features)
    before, after = size // 2, taps * stride - stride - size // 2
    x = jnp.pad(x, ((0, 0), (before, after), (before, after), (0, 0)))
    rows, columns = (length // stride + taps - 1 for length in (height, width))
    x = x.reshape(batch, rows, stride, columns, stride, channels).transpose(0, 1, 3, 2, 4, 5)
    x = x.reshape(batch, rows, columns, stride**2 * channels)
    return _conv_nd(x, kernel, (1, 1), ((0, 0), (0, 0)))


def _conv2d_pairs(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """3 × 3 convolution of pairs of columns as channels: each pair of outputs is made of two pairs
    of inputs, which begin one column before it. A third more products, and twice the features for
    Eigen's kernels: 8 → 8 at 8 × 128² with the gradient of x in 9.0 instead of 13.3 ms (one core).
    """
    channels, features = kernel.shape[2:]
    batch, height, width = x.shape[:3]
    # Not jnp.pad: XLA fuses it with what makes x into one slow loop.
    edge = jnp.zeros((batch, height, 1, channels), x.dtype)
    x = jnp.concatenate([edge, x, edge], axis=2)
    x = x.reshape(batch, height, width // 2 + 1, 2 * channels)
    # column c of the four inputs and column o of the two outputs meet in tap c − o
    taps = np.stack([np.eye(4, 2, -tap) for tap in range(3)])
    kernel = jnp.einsum('rtkn,tco->rckon', kernel, taps.astype(kernel.dtype))
    kernel = kernel.reshape(3, 2, 2 * channels, 2 * features)
    y = _conv_nd(x, kernel, (1, 1), ((1, 1), (0, 0)))
    return y.reshape(batch, height, width, features)


def _conv2d_patches(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """2D convolution as one product of patches: pays where C is large and H × W small."""
    size, channels = kernel.shape[0], kernel.shape[2]
    pad = (size // 2, size // 2)
    height, width = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), pad, pad, (0, 0)))
    windows = [
        x[:, i : i + height : stride, j : j + width : stride]
        for i in range(size)
        for j in range(size)
    ]
    return product(jnp.concatenate(windows, axis=-1), kernel.reshape(size * size * channels, -1))


def _conv_nd(x: jax.Array, kernel: jax.Array, strides: tuple[int, ...], pads: Pads) -> jax.Array:
    """XLA's convolution, channels last, 2D or 3D by the rank of x."""
    axes = 'DHW'[-(x.ndim - 2) :]
    numbers = (f'N{axes}C', f'{axes}IO', f'N{axes}C')
    return lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=numbers)


# --- 3D convolution


def conv3d(x: jax.Array, kernel: jax.Array, *, stride: int = 1, padding: str = 'SAME') -> jax.Array:
    """3D convolution.

    On a CPU a form puts the depth taps of the kernel into the channels of one 2D convolution: into
    its inputs where C < n or with a stride, else into its outputs, which are then shifted in depth
    and added. With the setting of `cpu.tune_process` their gradients are as quick.

    x (B, D, H, W, C) and kernel (k, k, k, C, n) → (B, d, h, w, n): D, H, W divided by the stride
    (padding 'SAME', rounded up) or k − 1 less ('VALID'), as XLA and Keras mean them.
    """
    size = kernel.shape[0]
    pads = tuple(lax.padtype_to_pads(x.shape[1:4], (size,) * 3, (stride,) * 3, padding))
    if platform() != 'cpu':
        return _conv_nd(x, kernel, (stride,) * 3, pads)
    if size == 1 and stride == 1:
        return product(x, kernel[0, 0, 0])
    if stride > 1 and size % stride == 0:
        return _conv3d_blocks(x, kernel, stride, pads)
    if stride > 1:
        return _conv3d_taps_in(x, kernel, stride, pads)
    return _conv3d_thin(x, kernel, pads)


def _conv3d_blocks(x: jax.Array, kernel: jax.Array, stride: int, pads: Pads) -> jax.Array:
    """3D convolution whose stride divides its kernel's size: blocks of stride³ voxels become
    channels, the stride 1, and the kernel smaller by the stride. XLA's gradients of strided
    convolutions are slow on CPU."""
    size, channels, features = kernel.shape[0], *kernel.shape[3:]
    # Only whole blocks: what is left over at the far end reaches no output.
    sizes = [
        ((n + sum(pad) - size) // stride + 1) * stride + size - stride
        for n, pad in zip(x.shape[1:4], pads, strict=True)
    ]
    edges = [
        (before, total - n - before, 0)
        for total, n, (before, _) in zip(sizes, x.shape[1:4], pads, strict=True)
    ]
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
    depth, height, width = (total // stride for total in sizes)
    x = x.reshape(-1, depth, stride, height, stride, width, stride, channels)
    x = x.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(-1, depth, height, width, stride**3 * channels)
    taps = size // stride
    kernel = kernel.reshape(taps, stride, taps, stride, taps, stride, channels, features)
    kernel = kernel.transpose(0, 2, 4, 1, 3, 5, 6, 7)
    kernel = kernel.reshape(taps, taps, taps, stride**3 * channels, features)
    return _conv3d_thin(x, kernel, ((0, 0),) * 3)


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
        edges, none = (before - tap, out_depth - depth - before + tap, 0), (0, 0, 0)
        part = lax.pad(part, jnp.zeros((), y.dtype), (none, edges, none, none, none))
        total = part if total is None else total + part
    return total


def _conv3d_thin(x: jax.Array, kernel: jax.Array, pads: Pads) -> jax.Array:
    """3D convolution of stride 1 by whichever of the two forms has fewer folded channels."""
    if kernel.shape[3] < kernel.shape[4]:
        return _conv3d_taps_in(x, kernel, 1, pads)
    return _conv3d_taps_out(x, kernel, pads)


# --- transposed 3D convolution


@jax.custom_vjp
def conv_transpose(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Transposed 3D convolution of stride 2: output voxel 2i + a is input voxel i times kernel[a].

    x (B, D, H, W, C) and kernel (2, 2, 2, C, n) → (B, 2D, 2H, 2W, n).
    """
    batch, depth, height, width, channels = x.shape
    # the two taps in W as channels of one product: their order is already the output's
    flat = kernel.transpose(0, 1, 3, 2, 4).reshape(2, 2, channels, -1)
    slices = []
    for slice_kernel in flat:
        rows = jnp.stack([x @ row_kernel for row_kernel in slice_kernel], axis=3)
        slices.append(rows.reshape(batch, depth, 2 * height, 2 * width, -1))
    volume = jnp.stack(slices, axis=2)
    return volume.reshape(batch, 2 * depth, 2 * height, 2 * width, -1)


def _conv_transpose_forward(x, kernel):
    return conv_transpose(x, kernel), (x, kernel)


def _conv_transpose_backward(saved, dy):
    # The eight taps' parts of dy beside each other, once for both products: JAX's own gradient
    # copies each of them for each (39 against 86 ms, 24 → 32 at 16 × 64², 2 cores).
    x, kernel = saved
    batch, depth, height, width, channels = x.shape
    features = kernel.shape[-1]
    dy = dy.reshape(batch, depth, 2, height, 2, width, 2 * features)
    dy = dy.transpose(0, 1, 3, 5, 2, 4, 6).reshape(-1, 8 * features)
    dx = dy @ kernel.transpose(0, 1, 2, 4, 3).reshape(8 * features, channels)
    dkernel = x.reshape(-1, channels).T @ dy
    dkernel = dkernel.reshape(channels, 2, 2, 2, features).transpose(1, 2, 3, 0, 4)
    return dx.reshape(x.shape), dkernel


conv_transpose.defvjp(_conv_transpose_forward, _conv_transpose_backward)
