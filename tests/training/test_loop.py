"""The training loop with a model of one number: order, resume, stop, faults."""

import json
import os
import resource
import signal
import time

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from covseg_jax.data.feeds import Feed
from covseg_jax.errors import InputError, Stopped
from covseg_jax.training import loop, sharding
from covseg_jax.training.logging import open_log, read_rows
from covseg_jax.training.step import skip_non_finite


@struct.dataclass
class Counter:
    step: jax.Array
    total: jax.Array
    weights: jax.Array


def feed(seed=0):
    numbers = grain.MapDataset.source(np.arange(100)).seed(seed).shuffle().repeat()
    rows = numbers.map(lambda n: {'x': np.float32(n), 'case': np.int32(n)})
    return Feed(rows.batch(8), {'case': tuple(f'study_{n:03d}' for n in range(100))})


def run(
    folder,
    *,
    num_steps=12,
    first_step=0,
    profile=(),
    on_step=lambda number: None,
    poison=(),
    evaluated=None,
    step=None,
):
    """Sums what the feed gives, or runs `step`; `on_step` runs before each step. `first_step` seeds
    the feed. The steps of `poison` have no finite loss."""
    mesh = sharding.make_mesh()
    make, abstract = sharding.place_state(
        lambda: Counter(
            jnp.zeros((), jnp.int32),
            jnp.zeros(()),
            jax.random.normal(jax.random.key(0), (256, 256)),
        ),
        mesh,
    )

    @jax.jit
    @skip_non_finite
    def sum_batch(state, batch):
        assert set(batch) == {'x'}
        loss = batch['x'].sum() / 3  # no whole number: sums depend on their order
        loss = jnp.where(jnp.isin(state.step, jnp.array(poison, jnp.int32)), jnp.nan, loss)
        state = state.replace(step=state.step + 1, total=state.total + loss)
        return state, {'loss/total': (loss, 8.0)}

    def step_at(number):
        on_step(number)
        return step or sum_batch

    def evaluate(state):
        if evaluated is not None:
            evaluated.append(int(state.step))
        return state, {'score': float(state.step)}, {'picture': np.zeros((4, 4))}

    return loop.run(
        name='count',
        folder=folder,
        state=make(),
        abstract_state=abstract,
        feed=feed(first_step),
        step_at=step_at,
        evaluate=evaluate,
        schedule=loop.Schedule(
            num_steps,
            log_every=2,
            evaluate_every=4,
            save_every=3,
            profile_steps=profile,
            max_skipped_steps=3,
        ),
        first_step=first_step,
    )


def kept(folder):
    return sorted(int(p.name) for p in (folder / 'checkpoints').iterdir() if p.name.isdigit())


def log_of(folder):
    return [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]


def losses_of(folder):
    return {row['step']: row['loss/total'] for row in log_of(folder) if 'loss/total' in row}


def test_a_stop_in_the_last_step_stops_what_would_come_after_it(tmp_path):
    def stop_in_the_last(number):
        if number == 11:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped, match='saved at step 12'):
        run(tmp_path, on_step=stop_in_the_last)
    assert kept(tmp_path)[-1] == 12
    assert int(run(tmp_path).step) == 12


def test_run_evaluates_logs_and_saves_on_schedule(tmp_path):
    evaluated = []
    run(tmp_path, evaluated=evaluated)
    assert evaluated == [4, 8, 12]
    assert sorted(losses_of(tmp_path)) == [2, 4, 6, 8, 10, 12]
    assert (tmp_path / 'checkpoints' / '12').is_dir()
    # The two newest are kept.
    assert kept(tmp_path) == [9, 12]


def test_speed_counts_the_wait_for_the_device_to_the_steps_that_it_computes(tmp_path, monkeypatch):
    numbers, device_get = [], jax.device_get

    def wait(tree):
        time.sleep(0.5 if numbers[-1] == 5 else 0)
        return device_get(tree)

    monkeypatch.setattr(jax, 'device_get', wait)
    run(tmp_path, on_step=numbers.append)
    speeds = {
        row['step']: row['speed/steps_per_s']
        for row in log_of(tmp_path)
        if 'speed/steps_per_s' in row
    }
    assert speeds[6] <= 2 / 0.5  # the line of steps 5 and 6


def test_speed_leaves_out_what_compiling_took(tmp_path):
    def compiles_slowly(state, batch):
        time.sleep(1)
        return state.replace(step=state.step + 1), {'loss/total': (batch['x'].sum(), 8.0)}

    run(tmp_path, step=jax.jit(compiles_slowly))
    speeds = [row['speed/steps_per_s'] for row in log_of(tmp_path) if 'speed/steps_per_s' in row]
    assert speeds[0] > 2 / 1


def test_run_stopped_by_a_signal_goes_on_to_the_same_numbers(tmp_path):
    whole = run(tmp_path / 'whole')

    def stop_at_four(number):
        if number == 4:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Stopped, match='saved at step 5'):
        run(tmp_path / 'cut', on_step=stop_at_four)
    assert max(losses_of(tmp_path / 'cut')) == 4  # the line of steps 5 and 6 is half collected
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
        batches = source.start()
        both += [next(batches)['x'].sum() / 3 for _ in range(6)]
    assert float(whole.total) == pytest.approx(sum(both))

    def stop_at_eight(number):
        if number == 8:
            os.kill(os.getpid(), signal.SIGINT)

    run(tmp_path / 'cut', num_steps=6)
    with pytest.raises(Stopped, match='saved at step 9'):
        run(tmp_path / 'cut', num_steps=12, first_step=6, on_step=stop_at_eight)
    run(tmp_path / 'cut', num_steps=6)  # done before: passes through
    resumed = run(tmp_path / 'cut', num_steps=12, first_step=6)
    assert float(resumed.total) == float(whole.total)


def test_steps_that_are_not_finite_change_nothing_and_are_counted(tmp_path):
    sums = [next(batches)['x'].sum() / 3 for batches in [feed().start()] for _ in range(12)]
    state = run(tmp_path, poison=(4, 7, 8))
    assert float(state.total) == pytest.approx(sum(sums) - sums[4] - sums[7] - sums[8])
    assert int(state.step) == 12
    skipped = {r['step']: r['optimizer/skipped'] for r in log_of(tmp_path) if 'loss/total' in r}
    assert skipped == {2: 0, 4: 0, 6: 0.5, 8: 0.5, 10: 0.5, 12: 0}


def test_run_stops_after_skipped_steps_in_a_row_and_writes_their_studies(tmp_path):
    # Steps are counted from 1 in what people read; 5 to 7 are allowed, and the line of 8 stops it.
    with pytest.raises(InputError, match=r'not finite in steps 5 to 8.*not_finite\.json'):
        run(tmp_path, poison=range(4, 12))
    assert 3 in kept(tmp_path)
    written = json.loads((tmp_path / 'not_finite.json').read_text())
    assert [each['step'] for each in written] == [5, 6, 7, 8]
    batches = feed().start(4)
    numbers = sorted(next(batches)['case'])
    assert written[0]['studies'] == [f'study_{n:03d}' for n in numbers]


def damage(path, how):
    largest = max((p for p in path.rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)
    whole = largest.read_bytes()
    if how == 'flipped':
        middle = len(whole) // 2
        whole = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    largest.write_bytes(whole[: len(whole) // 2] if how == 'shortened' else whole)


@pytest.mark.parametrize('how', ['flipped', 'shortened'])
def test_run_falls_back_to_the_checkpoint_before_a_damaged_one(tmp_path, capsys, how):
    whole = run(tmp_path / 'whole')
    run(tmp_path / 'cut', num_steps=8)
    damage(tmp_path / 'cut' / 'checkpoints' / '8', how)
    resumed = run(tmp_path / 'cut')
    assert 'the checkpoint is damaged' in capsys.readouterr().err
    assert float(resumed.total) == float(whole.total)
    assert losses_of(tmp_path / 'cut') == losses_of(tmp_path / 'whole')
    assert (tmp_path / 'cut' / 'damaged_checkpoints' / '8').is_dir()


def test_run_says_beforehand_that_the_disk_is_too_small(tmp_path, monkeypatch):
    usage = type('Usage', (), {'free': 10})
    monkeypatch.setattr('covseg_jax.training.checkpoint.shutil.disk_usage', lambda path: usage)
    with pytest.raises(InputError, match=r'10 bytes are free and its checkpoints need 786,456'):
        run(tmp_path)  # a state is 4 + 4 + 256 · 256 · 4 bytes, and three may be there at a time


@pytest.mark.parametrize(('limit', 'what'), [(16, 'the log'), (20_000, 'a checkpoint')])
def test_disk_that_fills_up_costs_no_checkpoint(tmp_path, limit, what):
    def fill(number):
        while number == 5 and kept(tmp_path) != [3]:
            time.sleep(0.01)  # saving is asynchronous
        if number == 5:  # files may not grow beyond this from here on
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(InputError, match=what) as caught:
            run(tmp_path, on_step=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(tmp_path) in str(caught.value)
    assert kept(tmp_path) == [3]
    whole = run(tmp_path / 'whole')
    assert float(run(tmp_path).total) == float(whole.total)


def test_tensorboard_shows_every_step_once_after_a_resume(tmp_path):
    class Killed(Exception):
        pass

    def die_at(step):
        def die(number):
            if number == step:
                raise Killed

        return die

    for step in (2, 8):  # before the first checkpoint, and after step 6's
        with pytest.raises(Killed):
            run(tmp_path, on_step=die_at(step))
    run(tmp_path)
    events = EventAccumulator(str(tmp_path / 'tensorboard')).Reload()
    assert [event.step for event in events.Scalars('loss/total')] == [2, 4, 6, 8, 10, 12]
    assert [event.step for event in events.Images('pictures/picture')] == [4, 8, 12]


def test_mean_metrics_weighs_by_count():
    means = loop.mean_metrics([{'a': (3.0, 1.0), 'b': (0.0, 0.0)}, {'a': (1.0, 3.0)}])
    assert means['a'] == 1.0  # (3 + 1) / (1 + 3)
    assert np.isnan(means['b'])


def test_chosen_steps_are_traced(tmp_path):
    run(tmp_path, num_steps=4, profile=(1, 2))
    traces = list((tmp_path / 'profile').rglob('*.xplane.pb'))
    assert len(traces) == 1
    assert traces[0].stat().st_size > 0


def test_a_line_that_is_half_written_is_no_row(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    path.write_text('{"step": 2, "loss/total": 0.1}\n{"step": 4, "lo')
    assert read_rows(path) == [{'step': 2, 'loss/total': 0.1}]


def test_host_that_is_not_the_first_logs_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr('covseg_jax.hosts._index', 1)
    log = open_log(tmp_path / 'run', start_step=0)
    log.write(2, {'loss/total': 0.1})
    log.write_image(2, 'picture', np.zeros((4, 4)))
    log.sync()
    log.close()
    assert list(tmp_path.iterdir()) == []
