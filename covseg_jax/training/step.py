"""What every training step does around its own loss."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from covseg_jax.data.feeds import in_float32
from covseg_jax.training.optim import once

SKIPPED = 'optimizer/skipped'  # the metric: 1 for a step that was skipped, as (sum, count)


def compile_step(step: Callable[[Any, dict, jax.Array], tuple[Any, dict]]) -> Callable:
    """`step`, a (state, batch, key) -> (state, values), as a jitted (state, batch) -> (state,
    metrics).

    What the batch has in float16 or uint8 `step` gets in float32. The key is `fold_in(state.key,
    state.step)`, the step's number is counted up, and the state is donated. A step whose values are
    not all finite is skipped, see `skip_non_finite`.
    """

    def numbered(state: Any, batch: dict) -> tuple[Any, dict]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        stepped, values = step(state, jax.tree.map(in_float32, batch), key)
        metrics = {name: (value, 1.0) for name, value in values.items()}
        return stepped.replace(step=state.step + 1), metrics

    return jax.jit(skip_non_finite(numbered), donate_argnums=0)


def skip_non_finite(step: Callable[[Any, dict], tuple[Any, dict]]) -> Callable:
    """`step` as a (state, batch) -> (state, metrics) that changes nothing but the step's number
    where one of the metrics is not finite.

    Metrics are (sum, count) pairs; those of a skipped step count nothing. The norms of all
    gradients should be among them: a loss may be finite where they are not.
    """

    def careful(state: Any, batch: dict) -> tuple[Any, dict]:
        stepped, metrics = step(state, batch)
        finite = once(jnp.all(jnp.stack([jnp.isfinite(total) for total, _ in metrics.values()])))
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), stepped, state)
        metrics = {
            name: (jnp.where(finite, total, 0.0), jnp.where(finite, count, 0.0))
            for name, (total, count) in metrics.items()
        }
        metrics[SKIPPED] = (1.0 - finite.astype(jnp.float32), 1.0)
        return kept.replace(step=stepped.step), metrics

    return careful
