"""3D GAN of Shabani et al. 2022: a generator of healthy-looking lungs, and its discriminators.

Volumes are (B, D, H, W, 1) in [0, 1], published size 32 × 128 × 128. Source: method.md section 2.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from covseg_jax.models.convolution import platform
from covseg_jax.models.lanes import Blocks, merge_depth, split_depth
from covseg_jax.models.layers import (
    Conv3D,
    ConvTranspose3D,
    Dropout,
    GroupNorm,
    join,
    keras_uniform,
    max_pool,
)


@jax.custom_vjp
def _relu_that_revives(x: jax.Array) -> jax.Array:
    """ReLU, whose gradient also passes below 0 where the loss wants the output to be larger.

    The healthy version may not be brighter than the scan. Where the network's lung is above the
    scan in all voxels, as first steps can bring it, ReLU has no gradient and stays so for good: the
    network then gives every scan back as it is.
    """
    return nn.relu(x)


def _revive_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return nn.relu(x), x > 0


def _revive_backward(is_above: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    return (jnp.where(is_above | (gradient < 0), gradient, 0.0),)


_relu_that_revives.defvjp(_revive_forward, _revive_backward)


class Generator(nn.Module):
    """Encoder with repeated inputs, bottleneck with noise, decoder; 7,861,643 parameters.

    Fields:
      filters: channels of the encoder's levels, from the finest.
      bottleneck_filters: channels of the two convolutions around the branches.
      branch_filters: channels of each of the three branches, which are added to the bottleneck's
        patch² + sum(filters) + bottleneck_filters channels and must be a third of them.
      noise_channels: channels of the noise.
      head: 'relu' gives the healthy volume itself, as published; 'blend' gives
        volume − σ(a − 2) · relu(volume − r), with the opacity a and the lung under it r both
        linear: how an opacity came there, undone. It never brightens, and starts as nearly the
        identity.
      input_shift, input_scale: the network sees (volume − shift) · scale; r comes back in units of
        the volume, shift + r / scale.
      input_clip: the most that the network sees, after scaling; None for no limit. Dense tissue
        fills most of the range and says nothing about the lungs.
      negative_slope: of LeakyReLU.
      patch: in-plane voxels, patch × patch, that enter as channels of one and leave the same way: a
        cheaper network for small machines; 1 as published.
      use_norm: group normalisation before each LeakyReLU; not published, but without it the rate at
        which the network can learn is far lower.
      dtype: of the arithmetic. Parameters and output are float32.
    """

    filters: Sequence[int] = (8, 16, 32, 64)
    bottleneck_filters: int = 128
    branch_filters: int = 83
    noise_channels: int = 10
    head: str = 'relu'
    input_shift: float = 0.0
    input_scale: float = 1.0
    input_clip: float | None = None
    negative_slope: float = 0.3
    patch: int = 1
    use_norm: bool = False
    dtype: Any = jnp.float32

    def noise_shape(self, volume_shape: Sequence[int]) -> tuple[int, ...]:
        """Shape (B, D/s, H/ps, W/ps, noise_channels) of the noise for volumes (B, D, H, W, 1), s =
        2 ** number of levels and p the patch.

        Raises:
          ValueError: D, H or W is no multiple of s.
        """
        step = 2 ** len(self.filters)
        steps = (step, self.patch * step, self.patch * step)
        if any(size % s for size, s in zip(volume_shape[1:4], steps, strict=True)):
            raise ValueError(f'volume of {tuple(volume_shape[1:4])}: use multiples of {steps}')
        sizes = (size // s for size, s in zip(volume_shape[1:4], steps, strict=True))
        return (volume_shape[0], *sizes, self.noise_channels)

    @nn.compact
    def __call__(self, volume: jax.Array, noise: jax.Array) -> jax.Array:
        """(B, D, H, W, 1) volumes in [0, 1], and noise of their `noise_shape` (published U(−0.5,
        0.5)) → their healthy-looking versions, float32.

        Raises:
          ValueError: sizes that do not fit (see `noise_shape` and branch_filters), unknown head.
        """
        self._check(volume.shape, noise.shape)
        scaled = (volume - self.input_shift) * self.input_scale
        if self.input_clip is not None:
            scaled = jnp.minimum(scaled, self.input_clip)
        scaled = scaled.astype(self.dtype)
        pooled = _patches_to_channels(scaled, self.patch)
        if platform() == 'tpu':
            pooled = split_depth(pooled, pooled.shape[1] // 2 ** (len(self.filters) - 1))
        skips = []
        for level, features in enumerate(self.filters, 1):
            name = f'encoder_{level}'
            first = self._conv(pooled, features, f'{name}_conv_1')
            second = self._conv(join(pooled, first), features, f'{name}_conv_2')
            joined = join(pooled, second)
            deepest = level == len(self.filters)
            skips.append(joined if deepest else second)
            pooled = max_pool(joined)

        x = self._bottleneck(pooled, noise.astype(self.dtype))

        for level, features in reversed(list(enumerate(self.filters, 1))):
            name = f'decoder_{level}'
            up = ConvTranspose3D(4 * features, dtype=self.dtype, name=f'{name}_up')(x)
            up = join(up, skips[level - 1])
            first = self._conv(up, features, f'{name}_conv_1')
            second = self._conv(join(up, first), features, f'{name}_conv_2')
            x = join(up, second)

        return self._head(x, volume.astype(jnp.float32))

    def _head(self, x: jax.Array, volume: jax.Array) -> jax.Array:
        published = self.head == 'relu'
        output = Conv3D(
            self.patch**2 * (2 if self.head == 'blend' else 1),
            1,
            dtype=self.dtype,
            # Anything but zero starts as harm that has to be unlearned first.
            kernel_init=keras_uniform if published else nn.initializers.zeros,
            name='head',
        )(x)
        if isinstance(output, Blocks):
            output = merge_depth(output)
        output = _channels_to_patches(output, self.patch).astype(jnp.float32)
        if published:
            return nn.relu(output)
        opacity, lung = jnp.split(output, 2, axis=-1)
        lung = self.input_shift + lung / self.input_scale
        return volume - nn.sigmoid(opacity - 2.0) * _relu_that_revives(volume - lung)

    def _conv(self, x: jax.Array, features: int, name: str, kernel_size: int = 3) -> jax.Array:
        x = Conv3D(features, kernel_size, dtype=self.dtype, name=name)(x)
        if self.use_norm:
            x = GroupNorm(self.dtype, name=f'{name}_norm')(x)
        return jax.tree.map(partial(nn.leaky_relu, negative_slope=self.negative_slope), x)

    def _bottleneck(self, pooled: jax.Array, noise: jax.Array) -> jax.Array:
        x = join(pooled, self._conv(pooled, self.bottleneck_filters, 'bottleneck_conv_1'))
        noisy = join(x, noise)
        branches = [
            self._conv(noisy, self.branch_filters, f'bottleneck_branch_{size}', size)
            for size in (1, 3, 5)
        ]
        x = x + jnp.concatenate(branches, axis=-1)
        return join(pooled, self._conv(x, self.bottleneck_filters, 'bottleneck_conv_2'))

    def _check(self, volume_shape: Sequence[int], noise_shape: Sequence[int]) -> None:
        if self.head not in ('relu', 'blend'):
            raise ValueError(f"Generator: head={self.head!r}; use 'relu' or 'blend'")
        channels = self.patch**2 + sum(self.filters) + self.bottleneck_filters
        if 3 * self.branch_filters != channels:
            raise ValueError(
                f'Generator: branch_filters={self.branch_filters}; three branches must fill the '
                f"bottleneck's patch² + sum(filters) + bottleneck_filters = {channels} channels"
            )
        expected = self.noise_shape(volume_shape)
        if tuple(noise_shape) != expected:
            raise ValueError(f'Generator: noise of {tuple(noise_shape)}; make it {expected}')


class Discriminator(nn.Module):
    """Published discriminator: is this volume real and healthy? 282,378 parameters.

    Three valid 3×3×3 convolutions, each with ReLU and max-pooling, global average, dense layers
    with dropout between them. Dropout draws from the 'dropout' key.
    """

    filters: Sequence[int] = (32, 64, 128)  # of the convolutions
    units: Sequence[int] = (32, 16, 8)  # of the hidden dense layers
    dropout_rate: float = 0.5
    dtype: Any = jnp.float32  # of the arithmetic

    @nn.compact
    def __call__(self, volume: jax.Array, *, train: bool = False) -> jax.Array:
        """(B, D, H, W, 1) in [0, 1], each of D, H, W at least 22 with three filters → (B, 2)
        float32 probabilities of "generated" and "real healthy". `train`: with dropout."""
        x, depth = volume.astype(self.dtype), volume.shape[1]
        slices = 2 ** len(self.filters)
        if platform() == 'tpu' and depth % slices == 0:
            x = split_depth(x, depth // slices)
        for index, features in enumerate(self.filters, 1):
            conv = Conv3D(features, 3, padding='VALID', dtype=self.dtype, name=f'conv_{index}')
            x = max_pool(jax.tree.map(nn.relu, conv(x)))
            depth = (depth - 2) // 2
        if isinstance(x, Blocks):
            x = merge_depth(x)[:, :depth]  # what follows reaches past the volume
        x = x.mean(axis=(1, 2, 3), dtype=jnp.float32)
        for index, features in enumerate(self.units, 1):
            x = nn.relu(_dense(features, f'dense_{index}')(x))
            if index < len(self.units):
                x = Dropout(self.dropout_rate)(x, train=train)
        return nn.softmax(_dense(2, 'head')(x))


class PatchDiscriminator(nn.Module):
    """Discriminator of the default recipe: one logit for each patch, spectrally normalised.

    Strided convolutions of kernel 4 with LeakyReLU 0.2, then a convolution of kernel 3 to one
    logit; no dropout and no batch statistics, so that real and generated volumes may come in one
    batch or apart. Patches as in Isola et al. (CVPR 2017), spectral normalisation as in Miyato et
    al. (ICLR 2018): the collection 'spectral' holds the power iterations' vectors and moves on with
    train=True where it is mutable.
    """

    filters: Sequence[int] = (16, 32, 64)  # one stride of 2 for each
    dtype: Any = jnp.float32  # of the arithmetic

    @nn.compact
    def __call__(self, volume: jax.Array, *, train: bool = False) -> jax.Array:
        """(B, D, H, W, 1) → (B, d, h, w, 1) float32 logits, high for "real healthy"; sizes are
        divided by 2 ** len(filters), rounded up. `train` lets the power iterations move on."""
        x = volume
        for index, features in enumerate(self.filters, 1):
            options = {'use_spectral_norm': True, 'dtype': self.dtype, 'name': f'conv_{index}'}
            x = nn.leaky_relu(Conv3D(features, 4, 2, **options)(x, train=train), 0.2)
        head = Conv3D(1, 3, use_spectral_norm=True, dtype=self.dtype, name='head')
        return head(x, train=train).astype(jnp.float32)


def _dense(features: int, name: str) -> nn.Dense:
    return nn.Dense(features, kernel_init=keras_uniform, name=name)


def _patches_to_channels(x: jax.Array, patch: int) -> jax.Array:
    """(B, D, H, W, C) → (B, D, H/p, W/p, p²·C)."""
    if patch == 1:
        return x
    batch, depth, height, width, channels = x.shape
    x = x.reshape(batch, depth, height // patch, patch, width // patch, patch, channels)
    x = x.transpose(0, 1, 2, 4, 3, 5, 6)
    return x.reshape(batch, depth, height // patch, width // patch, patch**2 * channels)


def _channels_to_patches(x: jax.Array, patch: int) -> jax.Array:
    """The way back of `_patches_to_channels`."""
    if patch == 1:
        return x
    batch, depth, height, width, channels = x.shape
    x = x.reshape(batch, depth, height, width, patch, patch, channels // patch**2)
    x = x.transpose(0, 1, 2, 4, 3, 5, 6)
    return x.reshape(batch, depth, height * patch, width * patch, channels // patch**2)
