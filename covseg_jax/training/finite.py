"""Steps whose loss or gradient is not finite change nothing, and are counted."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

SKIPPED = 'optimizer/skipped'  # the metric: 1 for a step that was skipped, as (sum, count)


def skip_non_finite(step: Callable[[Any, dict], tuple[Any, dict]]) -> Callable:
    """`step` as a (state, batch) -> (state, metrics) that leaves the state as it was, but for its
    number, where one of the step's metrics is not finite.

    Metrics are (sum, count) pairs; those of a skipped step count nothing. The norms of all
    gradients should be among them: a loss may be finite where they are not.
    """

    def careful(state: Any, batch: dict) -> tuple[Any, dict]:
        stepped, metrics = step(state, batch)
        finite = jnp.all(jnp.stack([jnp.isfinite(total) for total, _ in metrics.values()]))
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), stepped, state)
        metrics = {
            name: (jnp.where(finite, total, 0.0), jnp.where(finite, count, 0.0))
            for name, (total, count) in metrics.items()
        }
        metrics[SKIPPED] = (1.0 - finite.astype(jnp.float32), 1.0)
        return kept.replace(step=stepped.step), metrics

    return careful
