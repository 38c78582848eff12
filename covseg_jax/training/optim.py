"""Adam with warm-up, cosine or plateau schedules."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax


def reduce_on_plateau(
    *,
    factor: float = 0.1,
    patience: int = 10,
    rtol: float = 1e-4,
    atol: float = 0.0,
    cooldown: int = 0,
    min_scale: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Scales updates down when `value` stops falling, with patience as PyTorch counts it.

    torch.optim.lr_scheduler.ReduceLROnPlateau cuts once the number of evaluations without
    improvement is *greater* than patience; optax.contrib.reduce_on_plateau once it is equal. Feed
    it one positive value to be minimised per evaluation, not per step: `update(updates, state,
    value=...)`. The scale so far is `state.scale`.
    """
    return optax.contrib.reduce_on_plateau(
        factor=factor,
        patience=patience + 1,
        rtol=rtol,
        atol=atol,
        cooldown=cooldown,
        min_scale=min_scale,
    )


def learning_rate_schedule(
    *, peak: float, schedule: str, warmup_steps: int, num_steps: int
) -> optax.Schedule:
    """Linear warm-up to `peak`, then a cosine to a hundredth of it, or constant (for 'plateau', in
    which the state's scale cuts, and 'constant').

    Raises:
      ValueError: the schedule is not one of 'cosine', 'plateau', 'constant'.
    """
    if schedule == 'cosine':
        return optax.warmup_cosine_decay_schedule(
            init_value=0.0,
            peak_value=peak,
            warmup_steps=warmup_steps,
            decay_steps=max(num_steps, warmup_steps + 1),
            end_value=peak / 100,
        )
    if schedule in ('plateau', 'constant'):
        return optax.linear_schedule(0.0 if warmup_steps else peak, peak, max(warmup_steps, 1))
    raise ValueError(f"schedule {schedule!r} is not one of 'cosine', 'plateau', 'constant'")


def restarting_schedule(
    *, peak: float, schedule: str, warmup_steps: int, ends: Sequence[int]
) -> optax.Schedule:
    """`learning_rate_schedule` for each of several rounds of training, one after the other.

    Args:
      peak, schedule, warmup_steps: of each round.
      ends: the step after the last of each round, ascending.

    Raises:
      ValueError: as `learning_rate_schedule`.
    """
    lengths = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    parts = [
        learning_rate_schedule(
            peak=peak, schedule=schedule, warmup_steps=warmup_steps, num_steps=length
        )
        for length in lengths
    ]
    return optax.join_schedules(parts, list(ends[:-1]))


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


def update_ema(ema, new, step: jax.Array, decay: float):
    """Exponential moving average of a tree; early on the decay is (1 + step) / (10 + step), so that
    the start is forgotten."""
    decay = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda old, value: decay * old + (1 - decay) * value, ema, new)
