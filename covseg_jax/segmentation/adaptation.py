"""A network adapts to scans of another kind than it learned from, without a step: its batch
statistics become theirs (Li et al., Revisiting batch normalization for practical domain adaptation,
2016)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from covseg_jax.data import feeds
from covseg_jax.models.layers import BatchNorm
from covseg_jax.segmentation.steps import SegmentationParts, SegmentationState
from covseg_jax.segmentation.volumes import resample_slices, smooth_slices
from covseg_jax.training.flat import flatten_as, unflatten
from covseg_jax.training.loop import Evaluate
from covseg_jax.training.sharding import shard_batch

_NUM_BATCHES = 64
Adapt = Callable[[SegmentationState, feeds.Feed], SegmentationState]


def make_adapt(parts: SegmentationParts, smoothing_pixels: float, pixels: tuple[int, int]) -> Adapt:
    """(state, feed) -> the state whose averaged weights, in `ema`, have the batch statistics of the
    slices in the feed's first batches, the means of each batch's own.

    The network sees the slices as in a prediction, of H × W `pixels` and smoothed by
    `smoothing_pixels`, without painted opacities and augmentation.
    """

    network = parts.network
    if hasattr(network, 'dropout_rate'):  # a prediction drops nothing
        network = network.clone(dropout_rate=0.0)

    # Compiled as a whole, so that a state on several hosts can adapt, too.
    @jax.jit
    def begin(ema):
        return jax.tree.map(jnp.zeros_like, unflatten(ema['batch_stats']))

    @jax.jit
    def add(total, ema, image: jax.Array):
        variables = unflatten(ema)
        # Running statistics of 0 become a share of the batch's own.
        variables['batch_stats'] = jax.tree.map(jnp.zeros_like, variables['batch_stats'])
        _, seen = network.apply(variables, image, train=True, mutable=['batch_stats'])
        return jax.tree.map(jnp.add, total, seen['batch_stats'])

    @jax.jit
    def end(total, ema):
        share = _NUM_BATCHES * (1 - BatchNorm.momentum)
        return flatten_as(jax.tree.map(lambda each: each / share, total), ema['batch_stats'])

    def adapt(state: SegmentationState, feed: feeds.Feed) -> SegmentationState:
        total = begin(state.ema)
        for number in range(_NUM_BATCHES):
            image = as_predicted(feed.batches[number], smoothing_pixels, pixels)
            image = shard_batch({feeds.IMAGE: image}, parts.mesh)[feeds.IMAGE]
            total = add(total, state.ema, image)
        return state.replace(ema=state.ema | {'batch_stats': end(total, state.ema)})

    return adapt


def as_predicted(
    batch: dict[str, np.ndarray], smoothing_pixels: float, pixels: tuple[int, int]
) -> np.ndarray:
    """(B, H, W, 1) float32: the images of a batch as a network of H × W `pixels` sees them in a
    prediction."""
    image, inside = (batch[name][..., 0] for name in (feeds.IMAGE, feeds.LUNGS))
    image, inside = resample_slices(image.astype(np.float32), inside, pixels)
    return smooth_slices(image, inside, smoothing_pixels)[..., None]


def evaluate_adapted(adapt: Adapt, feed: feeds.Feed, evaluate: Evaluate) -> Evaluate:
    """Adapts before each evaluation, that at the end of a round among them, and what is saved then
    is adapted. In between statistics go on from there, averaged with the training's."""
    return lambda state: evaluate(adapt(state, feed))
