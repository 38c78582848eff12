"""Adam with warm-up, cosine or plateau schedules."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from covseg_jax.training.flat import Flat, flatten_as, unflatten

SCHEDULES = ('cosine', 'plateau', 'constant')


def once(scalar: jax.Array) -> jax.Array:
    """The scalar, computed by itself: XLA for CPUs else fuses what leads to it (cosines of a
    schedule) into the loops that use it, for each weight anew."""
    two = jnp.where(jnp.arange(2) == 0, scalar, jnp.zeros_like(scalar))
    return two.any() if scalar.dtype == bool else two.sum(dtype=scalar.dtype)


def reduce_on_plateau(
    *, patience: int = 10, **settings: float
) -> optax.GradientTransformationExtraArgs:
    """Scales updates down when `value` stops falling, with patience as PyTorch counts it.

    torch.optim.lr_scheduler.ReduceLROnPlateau cuts once the number of evaluations without
    improvement is *greater* than patience; optax.contrib.reduce_on_plateau, which takes the other
    settings (factor, rtol, atol, cooldown, min_scale), once it is equal. Feed it one positive value
    to be minimised per evaluation, not per step: `update(updates, state, value=...)`. The scale so
    far is `state.scale`.
    """
    return optax.contrib.reduce_on_plateau(patience=patience + 1, **settings)


def learning_rate_schedule(
    *, peak: float, schedule: str, warmup_steps: int, num_steps: int
) -> optax.Schedule:
    """Linear warm-up to `peak`, over half of the steps at most, then a cosine to a hundredth of it,
    or constant (for 'plateau', in which the state's scale cuts, and 'constant').

    Raises:
      ValueError: the schedule is not one of SCHEDULES.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f'schedule {schedule!r} is not one of {SCHEDULES}')
    warmup_steps = min(warmup_steps, num_steps // 2)
    if schedule == 'cosine':
        return optax.warmup_cosine_decay_schedule(
            init_value=0.0,
            peak_value=peak,
            warmup_steps=warmup_steps,
            decay_steps=num_steps,
            end_value=peak / 100,
        )
    return optax.linear_schedule(0.0 if warmup_steps else peak, peak, max(warmup_steps, 1))


def restarting_schedule(*, ends: Sequence[int], **settings: Any) -> optax.Schedule:
    """`learning_rate_schedule` of the settings for each of several rounds of training, which end
    before the steps `ends`, ascending."""
    lengths = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    parts = [learning_rate_schedule(num_steps=length, **settings) for length in lengths]
    joined = optax.join_schedules(parts, list(ends[:-1]))
    return lambda step: once(joined(step))


def make_adam(
    learning_rate: optax.Schedule | float,
    *,
    b1: float = 0.9,
    epsilon: float = 1e-8,
    clip_norm: float = 0.0,
) -> optax.GradientTransformation:
    """Adam; gradients are scaled down to `clip_norm` in global norm where that is above 0.
    PyTorch's epsilon is 1e-8, Keras's 1e-7."""
    adam = optax.adam(learning_rate, b1=b1, eps=epsilon)
    if clip_norm <= 0:
        return adam
    return optax.chain(optax.clip_by_global_norm(clip_norm), adam)


def minimise(
    loss: Callable[..., tuple[jax.Array, Any]],
    optimizer: optax.GradientTransformation,
    params: Flat | Any,
    opt_state: Any,
    *arguments: Any,
) -> tuple[tuple[jax.Array, Any], Flat | Any, Any, jax.Array]:
    """One update of the params, a tree or a Flat, against loss(their tree, *arguments) -> (value,
    more).

    Returns:
      What the loss gave, the new params, the new state of the optimizer, and the global norm of the
      gradient.
    """
    found, gradients = jax.value_and_grad(loss, has_aux=True)(unflatten(params), *arguments)
    gradients = flatten_as(gradients, params)
    updates, opt_state = optimizer.update(gradients, opt_state)
    return found, optax.apply_updates(params, updates), opt_state, optax.global_norm(gradients)


def update_ema(ema, new, step: jax.Array, decay: float):
    """Exponential moving average of a tree; early on the decay is (1 + step) / (10 + step), so that
    the start is forgotten."""
    decay = once(jnp.minimum(decay, (1.0 + step) / (10.0 + step)))
    return jax.tree.map(lambda old, value: decay * old + (1 - decay) * value, ema, new)
