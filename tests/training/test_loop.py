"""The training loop with a model of one number: order, resume, stop, faults."""

import json
import os
import signal

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from covseg_jax.errors import InputError, Stopped
from covseg_jax.training import loop, sharding


@struct.dataclass
class Counter:
    step: jax.Array
    total: jax.Array


def feed(seed=0):
    numbers = (
        grain.MapDataset.source(np.arange(100.0, dtype=np.float32)).seed(seed).shuffle().repeat()
    )
    return iter(numbers.map(lambda x: {'x': x}).batch(8).to_iter_dataset())


def run(
    folder,
    *,
    num_steps=12,
    first_step=0,
    profile=(),
    on_step=lambda number: None,
    poison=None,
    evaluated=None,
):
    """Sums what the feed gives; `on_step` runs before each step. `first_step` seeds the feed."""
    mesh = sharding.make_mesh()
    make, abstract = sharding.place_state(
        lambda: Counter(jnp.zeros((), jnp.int32), jnp.zeros(())), mesh
    )

    @jax.jit
    def step(state, batch):
        loss = batch['x'].sum()
        if poison is not None:
            loss = jnp.where(state.step == poison, jnp.nan, loss)
        state = state.replace(step=state.step + 1, total=state.total + loss)
        return state, {'loss/total': (loss, 8.0)}

    def step_at(number):
        on_step(number)
        return step

    def evaluate(state):
        if evaluated is not None:
            evaluated.append(int(state.step))
        return state, {'validation/score': float(state.step)}, {'picture': np.zeros((4, 4))}

    return loop.run(
        name='count',
        folder=folder,
        state=make(),
        abstract_state=abstract,
        data=feed(first_step),
        step_at=step_at,
        shard=lambda batch: sharding.shard_batch(batch, mesh),
        evaluate=evaluate,
        schedule=loop.Schedule(
            num_steps, log_every=2, evaluate_every=4, save_every=3, profile=profile
        ),
        best='validation/score',
        first_step=first_step,
    )


def log_of(folder):
    return [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]


def losses_of(folder):
    return {row['step']: row['loss/total'] for row in log_of(folder) if 'loss/total' in row}


def test_run_evaluates_logs_and_saves_on_schedule(tmp_path):
    evaluated = []
    run(tmp_path, evaluated=evaluated)
    assert evaluated == [4, 8, 12]
    assert sorted(losses_of(tmp_path)) == [2, 4, 6, 8, 10, 12]
    assert (tmp_path / 'checkpoints' / '12').is_dir()
    # The newest and the best are kept, and here they are the same.
    assert [p.name for p in (tmp_path / 'checkpoints').iterdir() if p.name.isdigit()] == ['12']


def test_run_stopped_by_a_signal_goes_on_to_the_same_numbers(tmp_path):
    whole = run(tmp_path / 'whole')

    def stop_at_five(number):
        if number == 5:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Stopped, match='saved at step 6'):
        run(tmp_path / 'cut', on_step=stop_at_five)
    assert max(losses_of(tmp_path / 'cut')) == 6
    resumed = run(tmp_path / 'cut')
    assert float(resumed.total) == float(whole.total)
    assert losses_of(tmp_path / 'cut') == losses_of(tmp_path / 'whole')
    steps = [row['step'] for row in log_of(tmp_path / 'cut')]
    assert steps == sorted(steps)


def test_run_killed_between_saves_leaves_no_doubled_step(tmp_path):
    whole = run(tmp_path / 'whole')

    class Killed(Exception):
        pass

    def die_at_eight(number):
        if number == 8:
            raise Killed

    with pytest.raises(Killed):
        run(tmp_path / 'cut', on_step=die_at_eight)
    resumed = run(tmp_path / 'cut')  # from step 6, though steps up to 8 were logged
    assert float(resumed.total) == float(whole.total)
    rows = [row['step'] for row in log_of(tmp_path / 'cut') if 'loss/total' in row]
    assert rows == [2, 4, 6, 8, 10, 12]


def test_run_begins_a_second_feed_at_its_start_and_resumes_within_it(tmp_path):
    run(tmp_path / 'whole', num_steps=6)
    whole = run(tmp_path / 'whole', num_steps=12, first_step=6)
    both = []
    for seed in (0, 6):
        source = feed(seed)
        both += [float(next(source)['x'].sum()) for _ in range(6)]
    assert float(whole.total) == sum(both)

    def stop_at_eight(number):
        if number == 8:
            os.kill(os.getpid(), signal.SIGINT)

    run(tmp_path / 'cut', num_steps=6)
    with pytest.raises(Stopped, match='saved at step 9'):
        run(tmp_path / 'cut', num_steps=12, first_step=6, on_step=stop_at_eight)
    run(tmp_path / 'cut', num_steps=6)  # done before: passes through
    resumed = run(tmp_path / 'cut', num_steps=12, first_step=6)
    assert float(resumed.total) == float(whole.total)


def test_run_names_the_steps_of_a_loss_that_is_not_finite(tmp_path):
    with pytest.raises(InputError, match='not finite in steps 5 to 6'):
        run(tmp_path, poison=4)
    assert (tmp_path / 'checkpoints' / '3').is_dir()


def test_mean_metrics_weighs_by_count():
    means = loop.mean_metrics([{'a': (3.0, 1.0), 'b': (0.0, 0.0)}, {'a': (1.0, 3.0)}])
    assert means['a'] == 1.0  # (3 + 1) / (1 + 3)
    assert np.isnan(means['b'])


def test_chosen_steps_are_traced(tmp_path):
    run(tmp_path, num_steps=4, profile=(1, 2))
    traces = list((tmp_path / 'profile').rglob('*.xplane.pb'))
    assert len(traces) == 1
    assert traces[0].stat().st_size > 0
