"""The segmentation network's compiled steps: contrastive, segmentation, combined, evaluation."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct

from covseg_jax.data.feeds import IMAGE, LABEL, LUNGS, TARGET, VALID, WEIGHT
from covseg_jax.data.streams import stream_key
from covseg_jax.errors import InputError
from covseg_jax.training import losses
from covseg_jax.training.flat import Flat, flatten_as, unflatten
from covseg_jax.training.optim import update_ema
from covseg_jax.training.parts import Parts
from covseg_jax.training.sharding import replicated
from covseg_jax.training.step import compile_step


@dataclasses.dataclass(frozen=True)
class SegmentationLosses:
    """Weights and settings of method.md section 4's three losses.

    Attributes:
      contrastive, mse, sensitivity: weights in the sum.
      temperature: of the contrastive loss.
      positive_weight: w of the enhanced contrastive loss.
      beta: extra weight of missed lesion in the BCE.
      contrastive_features: 'projection' of the encoder's pooled tokens; or, as published, 'logits',
        the flattened logit map.
      contrastive_labels: 'infection', high or low; or 'one', the published labels: all are 1, so no
        pair is negative and the loss is 0 and without gradient.
      include_self: count a slice's pair with itself among the positives, as published.
      mse_on: 'probability' or, as published, 'logits'.
      clip_targets: to [0, 1]; not published, where a target is a signed difference.
      binary_targets: cut soft targets at 0.5.
      doubtful: pixels whose soft target lies between these two say neither lesion nor healthy and
        have no weight in MSE and BCE; () counts all. It is the target as the step gets it: one
        of 0 and 1 that was zoomed and shifted has such pixels along its borders.
    """

    contrastive: float
    mse: float
    sensitivity: float
    temperature: float
    positive_weight: float
    beta: float
    contrastive_features: str
    contrastive_labels: str
    include_self: bool
    mse_on: str
    clip_targets: bool
    binary_targets: bool
    doubtful: tuple[float, float] | tuple[()]

    def __post_init__(self):
        for name, value, known in (
            ('features', self.contrastive_features, ('projection', 'logits')),
            ('labels', self.contrastive_labels, ('infection', 'one')),
        ):
            if value not in known:
                raise InputError(f'train.losses.contrastive_{name}={value!r} is not one of {known}')


def sharpen_targets(batch: dict, settings: SegmentationLosses) -> dict:
    """The batch with a WEIGHT for each pixel, 0 where its soft TARGET is doubtful; with
    `binary_targets`, TARGET is cut at 0.5."""
    target, weight = batch[TARGET], jnp.ones_like(batch[TARGET])
    if settings.doubtful:
        low, high = settings.doubtful
        weight = 1.0 - ((target > low) & (target < high)).astype(jnp.float32)
    if settings.binary_targets:
        target = (target >= 0.5).astype(jnp.float32)
    return batch | {TARGET: target, WEIGHT: weight}


@struct.dataclass
class SegmentationState:
    """State of the TransUNet's (or U-Net's) training.

    `params` holds 'network' and 'projection' (the contrastive head). `ema` holds the averaged
    {'params', 'batch_stats'} of the network, which evaluation and prediction use. `plateau` is the
    state of `optim.reduce_on_plateau`; its scale multiplies the updates.
    """

    step: jax.Array
    params: dict[str, Flat | Any]
    batch_stats: Flat | Any
    opt_state: Any
    ema: dict[str, Flat | Any]
    plateau: Any
    key: jax.Array


@dataclasses.dataclass(frozen=True)
class SegmentationParts(Parts):
    """What a config's `network` and `train` groups describe."""

    network: nn.Module  # maps (B, H, W, 1) to a Segmentation; has batch statistics
    projection: nn.Module  # maps its features to the contrastive space
    optimizer: optax.GradientTransformation  # of both
    plateau: optax.GradientTransformationExtraArgs  # optim.reduce_on_plateau
    image_size: tuple[int, int]  # (H, W)

    def init_state(self) -> SegmentationState:
        key = stream_key(self.seed, 'segmentation')
        network_key, projection_key, steps_key = jax.random.split(key, 3)
        image = jnp.zeros((1, *self.image_size, 1))
        output, variables = self.network.init_with_output(network_key, image)
        network = {name: self.to_hold(variables[name]) for name in ('params', 'batch_stats')}
        params = {
            'network': network['params'],
            'projection': self.to_hold(
                self.projection.init(projection_key, output.features)['params']
            ),
        }
        return SegmentationState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            batch_stats=network['batch_stats'],
            opt_state=self.optimizer.init(params),
            ema=network,
            plateau=self.plateau.init(params),
            key=jax.random.key_data(steps_key),
        )

    def start_from(self, variables: Any) -> SegmentationState:
        """`make_state` with the weights and batch statistics of a trained network, in the averaged
        ones too; `variables` is a nested dict.

        Raises:
          InputError: they are another network's.
        """
        expected = jax.eval_shape(unflatten, self.abstract_state.ema)
        shapes, wanted = (
            jax.tree.map(lambda leaf: leaf.shape, tree) for tree in (variables, expected)
        )
        if shapes != wanted:
            raise InputError(
                "train.init: the model's weights do not have the shapes of the network that its "
                'model.json describes; copy or export it again'
            )

        # Copied, and twice: what jit only hands through would share its memory, and states are
        # donated.
        hold = jax.jit(
            lambda tree: {name: self.to_hold(jax.tree.map(jnp.copy, tree[name])) for name in tree},
            out_shardings=replicated(self.mesh),
        )
        state, network = self.make_state(), hold(variables)
        params = state.params | {'network': network['params']}
        return state.replace(params=params, batch_stats=network['batch_stats'], ema=hold(variables))


def make_segmentation_step(
    parts: SegmentationParts,
    settings: SegmentationLosses,
    augment: Callable[[jax.Array, dict], dict] | None,
    *,
    terms: tuple[str, ...],
    ema_decay: float,
    micro_batches: int = 1,
    unroll: bool = False,
) -> Callable[[SegmentationState, dict], tuple[SegmentationState, dict]]:
    """A jitted (state, batch) -> (state, metrics) that minimises the weighted sum of `terms`.

    The batch has IMAGE, TARGET, LUNGS (B, H, W, 1) and LABEL (B,), split over the mesh or not; the
    state is donated. `augment` is (key, batch) -> batch. Metrics are (sum, count) pairs.

    With micro_batches n > 1 the gradient is the mean of those of n parts of the batch, one after
    the other in the memory of one. Batch statistics and the contrastive loss are then each part's.
    `unroll` writes the parts out instead of looping over them: XLA for CPUs computes convolutions
    within a loop on one core, at a fifth of the speed.
    """
    differentiate = _make_gradient(parts, settings, terms)
    if micro_batches > 1:
        differentiate = _over_parts(differentiate, (*terms, 'total'), micro_batches, unroll)

    def step(
        state: SegmentationState, batch: dict, key: jax.Array
    ) -> tuple[SegmentationState, dict]:
        augment_key, dropout_key = jax.random.split(key)
        if augment is not None:
            batch = augment(augment_key, batch)
        batch = sharpen_targets(batch, settings)
        (gradients, values), batch_stats = differentiate(
            state.params, state.batch_stats, batch, dropout_key
        )
        updates, opt_state = parts.optimizer.update(gradients, state.opt_state, state.params)
        scale = state.plateau.scale
        params = optax.apply_updates(state.params, jax.tree.map(lambda u: scale * u, updates))
        averaged = {'params': params['network'], 'batch_stats': batch_stats}
        values = {f'loss/{name}': value for name, value in values.items()} | {
            'optimizer/gradient_norm': optax.global_norm(gradients),
            'optimizer/learning_rate': parts.learning_rate(state.step) * scale,
        }
        state = state.replace(
            params=params,
            batch_stats=batch_stats,
            opt_state=opt_state,
            ema=update_ema(state.ema, averaged, state.step, ema_decay),
        )
        return state, values

    return compile_step(step)


def _make_gradient(
    parts: SegmentationParts, settings: SegmentationLosses, terms: tuple[str, ...]
) -> Callable:
    """(params, batch statistics, batch, key) -> (gradients, values of the losses), statistics.
    Gradients are in the form of the params, Flats or trees."""

    def loss(params: Any, batch_stats: Any, batch: dict, key: jax.Array):
        output, updated = parts.network.apply(
            {'params': params['network'], 'batch_stats': batch_stats},
            batch[IMAGE],
            train=True,
            rngs={'dropout': key},
            mutable=['batch_stats'],
        )
        values = {}
        if 'contrastive' in terms:
            if settings.contrastive_features == 'logits':
                features = output.logits.reshape(output.logits.shape[0], -1)
            else:
                variables = {'params': params['projection']}
                features = parts.projection.apply(variables, output.features)
            labels = batch[LABEL]
            if settings.contrastive_labels == 'one':
                labels = jnp.ones_like(labels)
            values['contrastive'] = losses.contrastive_loss(
                features,
                labels,
                temperature=settings.temperature,
                sensitivity_weight=settings.positive_weight,
                include_self=settings.include_self,
            )
        pixels = (output.logits, batch[TARGET])
        options = {'weights': batch[WEIGHT], 'clip': settings.clip_targets}
        if 'mse' in terms:
            values['mse'] = losses.mse_loss(*pixels, on=settings.mse_on, **options)
        if 'sensitivity' in terms:
            values['sensitivity'] = losses.sensitivity_loss(*pixels, beta=settings.beta, **options)
        total = sum(getattr(settings, name) * value for name, value in values.items())
        return total, (values, updated['batch_stats'])

    def differentiate(params: dict[str, Any], batch_stats: Any, batch: dict, key: jax.Array):
        (total, (values, stats)), gradients = jax.value_and_grad(loss, has_aux=True)(
            unflatten(params), unflatten(batch_stats), batch, key
        )
        gradients = {name: flatten_as(part, params[name]) for name, part in gradients.items()}
        return (gradients, values | {'total': total}), flatten_as(stats, batch_stats)

    return differentiate


def _over_parts(
    differentiate: Callable, names: tuple[str, ...], num_parts: int, unroll: bool
) -> Callable:
    """As `differentiate`, means over equal parts of the batch; `names` are the losses'."""

    # Every n-th pair of rows is a part's: high and low infection stay balanced, and rows stay on
    # their devices.
    def split(rows: jax.Array) -> jax.Array:
        pairs = rows.reshape(-1, num_parts, 2, *rows.shape[1:])
        return jnp.moveaxis(pairs, 1, 0).reshape(num_parts, -1, *rows.shape[1:])

    def accumulate(params: Any, batch_stats: Any, batch: dict, key: jax.Array):
        def add(carry, part):
            sums, batch_stats = carry
            found, batch_stats = differentiate(params, batch_stats, *part)
            return (jax.tree.map(jnp.add, sums, found), batch_stats), None

        zeros = (jax.tree.map(jnp.zeros_like, params), dict.fromkeys(names, 0.0))
        parts = (jax.tree.map(split, batch), jax.random.split(key, num_parts))
        (sums, batch_stats), _ = jax.lax.scan(add, (zeros, batch_stats), parts, unroll=unroll)
        return jax.tree.map(lambda each: each / num_parts, sums), batch_stats

    return accumulate


def make_evaluation_step(
    *, share_of_max: float = 0.0, target_share_of_max: float = 0.0
) -> Callable[[jax.Array, dict], dict]:
    """A jitted (what `make_predict` gives of the batch's images, batch) -> (sum, count) pairs,
    against the batch's targets.

    'mse' is of that output inside the lungs. 'dice' is that of all slices taken together, output
    and target each cut at 0.5, or where its share is above 0 at what exceeds that share of its
    highest value in the batch, which stands for the study here. Its sum is 2 TP and its count
    2 TP + FP + FN, so that batches merge exactly.
    """

    def cut(values: jax.Array, inside: jax.Array, share: float) -> jax.Array:
        marked = values > share * jnp.max(values * inside) if share else values >= 0.5
        return marked * inside

    @jax.jit
    def evaluate(probability: jax.Array, batch: dict) -> dict:
        inside = batch[LUNGS] * batch[VALID][:, None, None, None]
        truth = cut(batch[TARGET], inside, target_share_of_max)
        found = cut(probability, inside, share_of_max)
        squared = jnp.square(probability - batch[TARGET]) * inside
        return {
            'mse': (squared.sum(), inside.sum()),
            'dice': (2 * (truth * found).sum(), truth.sum() + found.sum()),
        }

    return evaluate
