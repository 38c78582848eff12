"""Plain 2D U-Net, the baseline that a TransUNet has to beat; same interface."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from covseg_jax.models.layers import BatchNorm, Conv2D, max_pool
from covseg_jax.models.transunet import Segmentation


class UNet(nn.Module):
    """U-Net of Ronneberger et al. (MICCAI 2015) with BatchNorm, padding and bilinear up-sampling.

    Fields:
      widths: channels of the levels, from the finest; the last is the bottleneck.
      num_classes: channels of the logits.
      initial_logit: where the head's bias starts, see `TransUNet`.
      dtype: of the arithmetic. Parameters, statistics and outputs are float32.

    Variables: 'params' and 'batch_stats'.
    """

    widths: Sequence[int] = (32, 64, 128, 256)
    num_classes: int = 1
    initial_logit: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool = False) -> Segmentation:
        """(B, H, W, 1) in [0, 1] → logits (B, H, W, num_classes) and features (B, widths[-1]), the
        mean of the bottleneck. `train`: statistics of the batch.

        Raises:
          ValueError: H or W is no multiple of 2 ** (len(widths) − 1).
        """
        step = 2 ** (len(self.widths) - 1)
        if image.ndim != 4 or any(size % step for size in image.shape[1:3]):
            raise ValueError(
                f'UNet: image of {image.shape}; make it (B, H, W, 1), H and W multiples of {step}'
            )
        x = image.astype(self.dtype)
        skips = []
        for level, width in enumerate(self.widths[:-1], 1):
            x = self._convolve_twice(x, width, f'encoder_{level}', train)
            skips.append(x)
            x = max_pool(x)
        x = self._convolve_twice(x, self.widths[-1], 'bottleneck', train)
        features = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        for level, skip in reversed(list(enumerate(skips, 1))):
            width, name = self.widths[level - 1], f'decoder_{level}'
            x = self._convolve_twice(skip, width, name, train, below=x)
        bias_init = nn.initializers.constant(self.initial_logit)
        head = Conv2D(self.num_classes, 1, bias_init=bias_init, name='head')
        return Segmentation(logits=head(x), features=features)

    def _convolve_twice(
        self, x: jax.Array, width: int, name: str, train: bool, below: jax.Array | None = None
    ) -> jax.Array:
        for part in ('first', 'second'):
            conv_name = f'{name}_{part}_conv'
            conv = Conv2D(width, 3, use_bias=False, dtype=self.dtype, name=conv_name)
            norm = BatchNorm(self.dtype, name=f'{name}_{part}_norm')
            x, below = nn.relu(norm(conv(x, below), train=train)), None
        return x
