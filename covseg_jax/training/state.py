"""What a run carries from step to step."""

from typing import Any

import jax
from flax import struct


@struct.dataclass
class SegmentationState:
    """State of the TransUNet's (or U-Net's) training.

    `params` holds 'network' and 'projection' (the contrastive head). `ema` holds the averaged
    {'params', 'batch_stats'} of the network, which evaluation and prediction use. `plateau` is the
    state of `optim.reduce_on_plateau`; its scale multiplies the updates. Randomness in a step is
    `fold_in(key, step)`.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    ema: Any
    plateau: Any
    key: jax.Array


@struct.dataclass
class GANState:
    """State of the GAN's training. `ema` averages the generator's parameters."""

    step: jax.Array
    generator: Any
    discriminator: Any
    discriminator_stats: Any
    generator_opt: Any
    discriminator_opt: Any
    ema: Any
    key: jax.Array
