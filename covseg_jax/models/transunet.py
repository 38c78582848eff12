"""TransUNet: convolutional encoder, vision transformer on its coarsest grid, decoder with skips.

Chen et al., TransUNet (arXiv 2102.04306), in the form of the published PyTorch code (method.md
section 3). Images are (B, H, W, 1) in [0, 1].
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import export, lax

from covseg_jax.models.convolution import product
from covseg_jax.models.layers import BatchNorm, Conv2D, Dropout, torch_uniform

GRID_STEP = 16  # pixels a patch token stands for, in H and in W


class Segmentation(NamedTuple):
    """What a segmentation network returns, float32."""

    logits: jax.Array  # (B, H, W, num_classes), before the sigmoid
    features: jax.Array  # (B, F), one vector an image, for the contrastive loss


class TransUNet(nn.Module):
    """TransUNet; 66,870,129 parameters at 128 × 128 with the default fields.

    Fields:
      width: channels C of the stem; the transformer has 8 C.
      final_width: channels of the decoder's last level, at full resolution; 0 means width / 8, the
        published number. Two or four of them are too few for a narrow network: behind the last
        ReLU they can all die in the first steps, and the network answers "nothing" ever after.
      num_heads, mlp_dim, num_blocks: of the transformer.
      num_classes: channels of the logits.
      published_attention: multiply the attention scores by √(head width), as the published code
        does, instead of dividing. Published weights need it.
      dropout_rate: in the transformer, from the 'dropout' key.
      initial_logit: where the head's bias starts; published 0. Lesion is rare, and a bias has to
        walk down to its log odds first (Lin et al., ICCV 2017, section 3.3).
      dtype: of the arithmetic. Parameters, statistics, softmax and outputs are float32.

    Variables: 'params' and 'batch_stats'. The position embedding has 1 + (H/16)(W/16) tokens of the
    size at init; `interpolate_positions` fits it to another.
    """

    width: int = 128
    final_width: int = 0
    num_heads: int = 4
    mlp_dim: int = 512
    num_blocks: int = 8
    num_classes: int = 1
    published_attention: bool = False
    dropout_rate: float = 0.1
    initial_logit: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool = False) -> Segmentation:
        """(B, H, W, 1) in [0, 1] → logits (B, H, W, num_classes) and features (B, 8 · width), the
        mean of the transformer's patch tokens. `train`: statistics of the batch, and dropout.

        Raises:
          ValueError: H or W is no multiple of 16, or the position embedding is for another size.
        """
        if image.ndim != 4 or any(size % GRID_STEP for size in image.shape[1:3]):
            raise ValueError(
                f'TransUNet: image of {image.shape}; make it (B, H, W, 1), H and W multiples of 16'
            )
        x = image.astype(self.dtype)
        x = Conv2D(self.width, 7, 2, use_bias=False, name='stem_conv', dtype=self.dtype)(x)
        x = nn.relu(BatchNorm(self.dtype, name='stem_norm')(x, train=train))
        skips = [x]
        for level in (1, 2, 3):
            block = EncoderBottleneck(2**level * self.width, self.dtype, name=f'encoder_{level}')
            x = block(x, train=train)
            skips.append(x)
        tokens = VisionTransformer(
            num_heads=self.num_heads,
            mlp_dim=self.mlp_dim,
            num_blocks=self.num_blocks,
            published_attention=self.published_attention,
            dropout_rate=self.dropout_rate,
            dtype=self.dtype,
            name='vit',
        )(x.reshape(x.shape[0], -1, x.shape[-1]), train=train)
        x = Conv2D(4 * self.width, 3, name='neck_conv', dtype=self.dtype)(tokens.reshape(x.shape))
        x = nn.relu(BatchNorm(self.dtype, name='neck_norm')(x, train=train))
        final_width = self.final_width or self.width // 8
        channels = (2 * self.width, self.width, self.width // 2, final_width)
        skips = (*skips[2::-1], None)
        for level, (features, skip) in enumerate(zip(channels, skips, strict=True), 1):
            block = DecoderBottleneck(features, self.dtype, name=f'decoder_{level}')
            x = block(x, skip, train=train)
        bias_init = nn.initializers.constant(self.initial_logit)
        logits = Conv2D(self.num_classes, 1, bias_init=bias_init, name='head')(x)
        return Segmentation(logits, features=jnp.mean(tokens, axis=1, dtype=jnp.float32))


class EncoderBottleneck(nn.Module):
    """Residual bottleneck of stride 2: 1×1, 3×3 stride 2, 1×1, beside a strided 1×1 shortcut."""

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """(B, H, W, C) → (B, H/2, W/2, features)."""

        def convolve(x, name, *sizes):
            options = {'use_bias': False, 'dtype': self.dtype, 'name': f'{name}_conv'}
            conv = Conv2D(self.features, *sizes, **options)
            return BatchNorm(self.dtype, name=f'{name}_norm')(conv(x), train=train)

        shortcut = convolve(x, 'shortcut', 1, 2)
        x = nn.relu(convolve(x, 'first', 1))
        x = nn.relu(convolve(x, 'second', 3, 2))
        return nn.relu(convolve(x, 'third', 1) + shortcut)


class DecoderBottleneck(nn.Module):
    """Bilinear ×2 with aligned corners, join with the skip, twice 3×3 → BatchNorm → ReLU."""

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, skip: jax.Array | None, *, train: bool) -> jax.Array:
        """x (B, H, W, C), skip (B, 2H, 2W, c) or None → (B, 2H, 2W, features)."""
        x = Conv2D(self.features, 3, name='first_conv', dtype=self.dtype)(skip, below=x)
        x = nn.relu(BatchNorm(self.dtype, name='first_norm')(x, train=train))
        x = Conv2D(self.features, 3, name='second_conv', dtype=self.dtype)(x)
        return nn.relu(BatchNorm(self.dtype, name='second_norm')(x, train=train))


class VisionTransformer(nn.Module):
    """Post-norm transformer over the patch tokens of one grid, with a class token on the way."""

    num_heads: int
    mlp_dim: int
    num_blocks: int
    published_attention: bool
    dropout_rate: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array, *, train: bool) -> jax.Array:
        """(B, T, F) → (B, T, F): the class token is put in front and dropped at the end."""
        batch, count, features = tokens.shape
        shape, name = (1 + count, features), 'position_embedding'
        if self.has_variable('params', name):
            found, _ = self.get_variable('params', name).shape
            if found != 1 + count:
                raise ValueError(
                    f'TransUNet: position embedding of {found} tokens, this image has {1 + count}; '
                    'use interpolate_positions'
                )
        positions = self.param(name, nn.initializers.uniform(1.0), shape).astype(self.dtype)
        class_token = self.param('class_token', nn.initializers.normal(1.0), (features,))
        class_token = jnp.broadcast_to(class_token.astype(self.dtype), (batch, 1, features))
        x = _dense(features, self.dtype, 'projection')(tokens)
        x = jnp.concatenate([class_token, x], axis=1) + positions
        x = Dropout(self.dropout_rate)(x, train=train)
        for index in range(self.num_blocks):
            x = TransformerBlock(
                num_heads=self.num_heads,
                mlp_dim=self.mlp_dim,
                published_attention=self.published_attention,
                dropout_rate=self.dropout_rate,
                dtype=self.dtype,
                name=f'block_{index}',
            )(x, train=train)
        return x[:, 1:]


class TransformerBlock(nn.Module):
    """x = LN(x + drop(attention(x))); x = LN(x + MLP(x)), MLP with exact GELU."""

    num_heads: int
    mlp_dim: int
    published_attention: bool
    dropout_rate: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """(B, T, F) → (B, T, F)."""

        def drop(x):
            return Dropout(self.dropout_rate)(x, train=train)

        def normalise(x, name):
            # linen's own epsilon is 1e-6, PyTorch's 1e-5; one pass loses digits
            options = {'epsilon': 1e-5, 'use_fast_variance': False}
            return nn.LayerNorm(dtype=self.dtype, name=name, **options)(x)

        x = normalise(x + drop(self._attend(x)), 'norm_1')
        y = _dense(self.mlp_dim, self.dtype, 'mlp_1')(x)
        y = drop(nn.gelu(y, approximate=False))
        y = drop(_dense(x.shape[-1], self.dtype, 'mlp_2')(y))
        return normalise(x + y, 'norm_2')

    def _attend(self, x: jax.Array) -> jax.Array:
        batch, count, features = x.shape
        head_width = features // self.num_heads
        kernel = _Kernel(3 * features, name='qkv')(features).astype(self.dtype)
        # The published layout of the fused output is (head width, q k v, heads), heads fastest.
        # Tokens or weights are put in another order, whichever are fewer: each head in channels of
        # its own, so that no axis of heads has to be carried past that of the tokens.
        layout, groups = (head_width, 3, self.num_heads), 3 * self.num_heads
        if not export.is_symbolic_dim(batch) and batch * count < features:
            fused = product(x, kernel).reshape(batch, count, *layout).transpose(3, 4, 0, 1, 2)
            fused = fused.reshape(groups, batch, count, head_width)
            parts = [part[0] for part in lax.split(fused, (1,) * groups)]
        else:
            kernel = kernel.reshape(features, *layout).transpose(0, 2, 3, 1)
            parts = jnp.split(product(x, kernel.reshape(features, -1)), groups, axis=-1)
        root = head_width**0.5
        scale = root if self.published_attention else 1 / root
        mixed = []
        for head in range(self.num_heads):
            query, key, value = parts[head :: self.num_heads]
            scores = jnp.einsum('bqd,bkd->bqk', query, key, preferred_element_type=jnp.float32)
            weights = nn.softmax(scores * scale).astype(self.dtype)
            mixed.append(jnp.einsum('bqk,bkd->bqd', weights, value))
        mixed = jnp.concatenate(mixed, axis=-1)
        return _dense(features, self.dtype, 'out', use_bias=False)(mixed)


class _Kernel(nn.Module):
    """The kernel (inputs, features) of a dense layer without bias."""

    features: int

    @nn.compact
    def __call__(self, inputs: int) -> jax.Array:
        return self.param('kernel', torch_uniform, (inputs, self.features))


class ProjectionHead(nn.Module):
    """Two-layer perceptron between an image's features and the contrastive loss.

    As in Chen et al., SimCLR (ICML 2020), section 4.2; its parameters are apart from the network's.
    Features are first standardised over the batch, without parameters: token means of a layer norm
    nearly coincide, and cosines of nearly equal vectors have no gradient to part them with.
    """

    dim: int = 128  # of the output
    hidden: int | None = None  # width; None: that of the features
    dtype: Any = jnp.float32  # of the arithmetic

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        """(B, F) → (B, dim) float32."""
        hidden = self.hidden or features.shape[-1]
        centred = features - features.mean(axis=0)
        standardised = centred / jnp.sqrt(jnp.square(centred).mean(axis=0) + 1e-8)
        x = nn.relu(_dense(hidden, self.dtype, 'first')(standardised))
        return _dense(self.dim, self.dtype, 'second')(x).astype(jnp.float32)


def interpolate_positions(
    params: Mapping[str, Any], from_grid: tuple[int, int], to_grid: tuple[int, int]
) -> dict[str, Any]:
    """A copy of a TransUNet's 'params' whose position embedding fits images of another size.

    The grid's embeddings are interpolated bilinearly (half-pixel centres, without anti-aliasing);
    the class token's is kept. The grids are (H / 16, W / 16) of the two image sizes.

    Raises:
      ValueError: the embedding is not one of from_grid.
    """
    positions = jnp.asarray(params['vit']['position_embedding'])
    tokens, features = positions.shape
    if tokens != 1 + from_grid[0] * from_grid[1]:
        raise ValueError(f'position embedding of {tokens} tokens: not 1 + {from_grid}')
    grid = positions[1:].reshape(*from_grid, features)
    grid = jax.image.resize(grid, (*to_grid, features), 'linear', antialias=False)
    positions = jnp.concatenate([positions[:1], grid.reshape(-1, features)])
    return {**params, 'vit': {**params['vit'], 'position_embedding': positions}}


def _dense(features: int, dtype: Any, name: str, use_bias: bool = True) -> nn.Dense:
    options = {'dtype': dtype, 'kernel_init': torch_uniform, 'dot_general': _dense_product}
    return nn.Dense(features, use_bias=use_bias, name=name, **options)


def _dense_product(x: jax.Array, kernel: jax.Array, axes: Any, precision: None) -> jax.Array:
    del axes, precision  # x's last and the kernel's first; the default one
    return product(x, kernel)
