"""Steps that are not finite."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from covseg_jax.training.step import SKIPPED, skip_non_finite


@struct.dataclass
class State:
    step: jnp.ndarray
    weight: jnp.ndarray


@pytest.mark.parametrize(
    ('loss', 'norm', 'skipped'),
    [(1.0, 2.0, 0.0), (np.nan, 2.0, 1.0), (1.0, np.inf, 1.0), (-np.inf, np.nan, 1.0)],
)
def test_a_step_without_finite_loss_and_gradient_moves_its_number_alone(loss, norm, skipped):
    def step(state, batch):
        metrics = {'loss/total': (jnp.float32(loss), 8.0), 'norm': (jnp.float32(norm), 1.0)}
        return State(state.step + 1, state.weight - batch), metrics

    before = State(jnp.int32(4), jnp.array([1.0, 2.0]))
    after, metrics = skip_non_finite(step)(before, jnp.array([0.5, jnp.nan if skipped else 0.5]))
    assert int(after.step) == 5
    assert after.weight.tolist() == ([1.0, 2.0] if skipped else [0.5, 1.5])
    # what is logged: means over the steps that were taken
    counted = [float(x) for x in metrics['loss/total']]
    assert counted == ([0.0, 0.0] if skipped else [1.0, 8.0])
    assert [float(x) for x in metrics[SKIPPED]] == [skipped, 1.0]
