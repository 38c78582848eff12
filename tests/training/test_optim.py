"""Schedules and the plateau rule."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from covseg_jax.training import optim
from covseg_jax.training.parts import make_learning_rate


def test_reduce_on_plateau_cuts_after_more_than_patience_bad_evaluations():
    transform = optim.reduce_on_plateau(patience=2, factor=0.5)
    updates = {'w': jnp.ones(3)}
    state = transform.init(updates)
    scales = []
    for value in (1.0, 1.0, 1.0, 1.0, 0.5, 0.5):
        _, state = transform.update(updates, state, value=value)
        scales.append(float(state.scale))
    # PyTorch counts bad evaluations 1, 2, 3 at the second to fourth, and cuts at 3 > 2.
    assert scales == [1.0, 1.0, 1.0, 0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ('patience', 'cooldown', 'rtol'), [(4, 0, 1e-4), (4, 2, 1e-4), (0, 0, 1e-3)]
)
def test_reduce_on_plateau_equals_pytorch(reference, patience, cooldown, rtol):
    numbers = np.load(reference / 'losses_reference.npz')
    start = 5e-5
    transform = optim.reduce_on_plateau(
        patience=patience, factor=0.5, rtol=rtol, cooldown=cooldown, min_scale=1e-7 / start
    )
    updates = {'w': jnp.ones(1)}
    state, rates = transform.init(updates), []
    step = jax.jit(lambda state, value: transform.update(updates, state, value=value)[1])
    for value in numbers['plateau_values']:
        state = step(state, value)
        rates.append(start * float(state.scale))
    expected = numbers[f'plateau_lr_patience{patience}_cooldown{cooldown}_threshold{rtol}']
    np.testing.assert_allclose(rates, expected, rtol=1e-6)


def test_learning_rate_schedule_warms_up_and_falls_to_a_hundredth():
    rate = optim.learning_rate_schedule(
        peak=1e-2, schedule='cosine', warmup_steps=10, num_steps=110
    )
    assert float(rate(0)) == 0
    assert float(rate(5)) == pytest.approx(5e-3)
    assert float(rate(10)) == pytest.approx(1e-2)
    # Half-way down the cosine: the mean of both ends.
    assert float(rate(60)) == pytest.approx((1e-2 + 1e-4) / 2)
    assert float(rate(110)) == pytest.approx(1e-4)


def test_learning_rate_warms_up_over_half_of_a_short_round():
    rate = optim.learning_rate_schedule(
        peak=1e-2, schedule='cosine', warmup_steps=500, num_steps=20
    )
    assert [float(rate(n)) for n in (0, 5, 10, 20)] == pytest.approx([0, 5e-3, 1e-2, 1e-4])


@pytest.mark.parametrize('schedule', ['plateau', 'constant'])
def test_learning_rate_schedule_stays_at_its_peak(schedule):
    rate = optim.learning_rate_schedule(peak=1e-2, schedule=schedule, warmup_steps=0, num_steps=100)
    assert [float(rate(step)) for step in (0, 50, 1000)] == pytest.approx([1e-2] * 3)


def test_learning_rate_schedule_refuses_another_name():
    with pytest.raises(ValueError, match='linear'):
        optim.learning_rate_schedule(peak=1, schedule='linear', warmup_steps=0, num_steps=1)


def test_restarting_schedule_rises_and_falls_in_each_round():
    schedule = optim.restarting_schedule(peak=1.0, schedule='cosine', warmup_steps=2, ends=[10, 30])
    assert [float(schedule(step)) for step in (0, 2, 10, 12)] == pytest.approx([0, 1, 0, 1])
    assert float(schedule(9)) < 0.1
    assert float(schedule(30)) == pytest.approx(0.01)


@pytest.mark.parametrize(('of', 'peak'), [(0, 1e-3), (32, 1e-3 * 8**0.5), (256, 1e-3)])
def test_rate_of_another_batch_size_is_scaled_by_the_square_root(of, peak):
    group = ml_collections.ConfigDict({
        'learning_rate': 1e-3, 'learning_rate_batch_size': of, 'batch_size': 256,
        'schedule': 'constant', 'warmup_steps': 10,
    })  # fmt: skip
    rate = make_learning_rate('train', group, [100])
    assert float(rate(5)) == pytest.approx(peak / 2)
    assert float(rate(50)) == pytest.approx(peak)


def test_update_ema_forgets_its_start():
    ema = jnp.float32(100.0)
    for step in range(50):
        ema = optim.update_ema(ema, jnp.float32(1.0), jnp.int32(step), 0.99)
    # At step 0 the decay is 1/10, so that nine tenths of a wrong start are gone at once.
    np.testing.assert_allclose(ema, 1.0, atol=0.01)
