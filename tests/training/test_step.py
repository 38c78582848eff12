"""What every compiled step does beside its own loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from covseg_jax.training.step import SKIPPED, compile_step, skip_non_finite


@struct.dataclass
class State:
    step: jnp.ndarray
    weight: jnp.ndarray
    key: jnp.ndarray | None = None


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


def test_compiled_step_draws_from_the_key_and_its_number_and_counts_it():
    def step(state, batch, key):
        drawn = jax.random.uniform(key)
        return state.replace(weight=state.weight + batch), {'drawn': drawn}

    # the state is donated, its key too: no other array may share its memory
    state = State(jnp.int32(4), jnp.array(1.0), jax.random.key_data(jax.random.key(7)))
    state, metrics = compile_step(step)(state, jnp.array(0.5))
    assert (int(state.step), float(state.weight)) == (5, 1.5)
    expected = jax.random.uniform(jax.random.fold_in(jax.random.key(7), 4))
    assert float(metrics['drawn'][0]) == float(expected)
    assert float(metrics['drawn'][1]) == 1.0


def test_compiled_step_gets_in_float32_what_was_read_in_less():
    found = {}

    def step(state, batch, key):
        found.update({name: array.dtype for name, array in batch.items()})
        return state, {'sum': batch['lungs'].sum()}

    state = State(jnp.int32(0), jnp.array(1.0), jax.random.key_data(jax.random.key(0)))
    batch = {
        'image': np.ones(2, np.float16),
        'lungs': np.full(300, 1, np.uint8),  # more than uint8 holds
        'label': np.ones(2, np.int32),
    }
    _, metrics = compile_step(step)(state, batch)
    assert found == {'image': np.float32, 'lungs': np.float32, 'label': np.int32}
    assert float(metrics['sum'][0]) == 300.0
