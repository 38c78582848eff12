"""Two real processes over loopback, as two hosts that see the same disk."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

import covseg_jax
from tests.program import COMPILED_QUICKLY

ROOT = pathlib.Path(__file__).parents[1]

CALLS = """
import json, sys
from covseg_jax import hosts
number, port = int(sys.argv[1]), sys.argv[2]
hosts.connect({'coordinator': f'localhost:{port}', 'num_processes': 2, 'process_id': number})
items = ['a', 'b', 'c', 'd', 'e']
found = [{'item': item, 'value': 0.1 * ord(item)} for item in hosts.share(items)]
done = []
hosts.first_alone(lambda: done.append(hosts.index()), 'work')
print(json.dumps([hosts.gather(found, 5), done]))
"""


def environment(num_devices):
    flags = f'--xla_force_host_platform_device_count={num_devices}'
    return os.environ | {'XLA_FLAGS': f'{flags} {COMPILED_QUICKLY}'}


def free_port():
    with socket.socket() as listening:
        listening.bind(('localhost', 0))
        return listening.getsockname()[1]


def begin(command, num_devices):
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=environment(num_devices),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(processes):
    """What each wrote, once all ended well."""
    try:
        written = [process.communicate(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, err) in zip(processes, written, strict=True):
        assert process.returncode == 0, err[-3000:]
    return written


def test_items_are_shared_out_and_gathered_in_their_order():
    port = free_port()
    written = end([begin(['-c', CALLS, number, port], 1) for number in range(2)])
    expected = [{'item': item, 'value': 0.1 * ord(item)} for item in 'abcde']
    for number, (out, _) in enumerate(written):
        gathered, done = json.loads(out.splitlines()[-1])
        assert gathered == expected
        assert done == [0][: 1 - number]  # the first host alone


FAIL = """
import sys
from covseg_jax import hosts
from covseg_jax.errors import InputError
number, port = int(sys.argv[1]), sys.argv[2]
hosts.connect({'coordinator': f'localhost:{port}', 'num_processes': 2, 'process_id': number})
print(hosts.first_decides(lambda: {'answer': number, 'of': 'ü'}, 'an answer'))
def fail():
    raise [InputError('scan.nii: is damaged'), OSError(28, 'disk is full', 'a.json')][number_of]
for number_of in range(2):
    try:
        hosts.first_alone(fail, 'work')
    except Exception as error:
        print(f'{type(error).__name__}: {error}', flush=True)
"""


def test_first_host_decides_for_all_and_ends_all_where_it_fails():
    port = free_port()
    processes = [begin(['-c', FAIL, number, port], 1) for number in range(2)]
    try:
        told = [process.communicate(timeout=120)[0].splitlines() for process in processes]
    finally:
        for process in processes:
            process.kill()
    answer, damaged = "{'answer': 0, 'of': 'ü'}", 'InputError: scan.nii: is damaged'
    written = [[line for line in lines if '[Gloo]' not in line] for lines in told]
    assert written[0] == [answer, damaged, "OSError: [Errno 28] disk is full: 'a.json'"]
    assert written[1] == [answer, damaged, 'InputError: a.json: disk is full']


STEPS = """
import json, os, pathlib, signal, sys, time
import grain, jax, jax.numpy as jnp, numpy as np
from flax import struct
from covseg_jax import hosts
from covseg_jax.data.feeds import Feed
from covseg_jax.errors import Stopped
from covseg_jax.training import loop, sharding
from covseg_jax.training.step import skip_non_finite

number, port, folder, moment = int(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3]), sys.argv[4]
hosts.connect({'coordinator': f'localhost:{port}', 'num_processes': 2, 'process_id': number})

@struct.dataclass
class State:
    step: jax.Array

make, abstract = sharding.place_state(lambda: State(jnp.int32(0)), sharding.make_mesh())

@jax.jit
@skip_non_finite
def step(state, batch):
    return state.replace(step=state.step + 1), {'loss/total': (batch['x'].sum(), 1.0)}

def run(name, last, saved_at):
    def step_at(step_number):
        if (name, step_number, number) == ('second', 20, 1) and moment != 'between':
            os.kill(os.getpid(), getattr(signal, moment))
        time.sleep(0.02)  # no host is in step with the other but for the step's number
        return step

    rows = grain.MapDataset.source(np.arange(8)).repeat().map(lambda n: {'x': np.float32(n)})
    loop.run(
        name=name, folder=folder / name, state=make(), abstract_state=abstract,
        feed=Feed(rows.batch(2), {}), step_at=step_at,
        evaluate=lambda state: (state, {}, {}),
        schedule=loop.Schedule(last, 1000, 0, saved_at, (), 3),
    )

run('first', 8, 0)
if moment == 'between' and number == 1:
    os.kill(os.getpid(), signal.SIGTERM)
if moment == 'between':
    time.sleep(3)  # JAX looks for the signal once a second
try:
    run('second', 2000, 15)
except Stopped as stop:
    print(stop, flush=True)
"""


@pytest.mark.parametrize(
    'moment',
    [
        'SIGTERM',
        pytest.param('SIGINT', marks=pytest.mark.slow),
        pytest.param('between', marks=pytest.mark.slow),
    ],
)
def test_all_hosts_save_one_step_and_stop_where_one_is_told_to(tmp_path, moment):
    port = free_port()
    # Nothing is logged before the end, so that nothing but the signal makes the hosts agree.
    written = end([begin(['-c', STEPS, number, port, tmp_path, moment], 1) for number in range(2)])
    stops = {out.splitlines()[-1] for out, _ in written}
    assert len(stops) == 1
    saved = [int(p.name) for p in (tmp_path / 'second' / 'checkpoints').iterdir()]
    if moment == 'between':  # before the first step of a training: there is nothing to save
        assert stops.pop().startswith('second: stopped and saved at step 0;')
        assert not saved
    else:
        assert stops.pop().startswith(f'second: stopped and saved at step {max(saved)};')
        assert 20 < max(saved) < 2000


def run(workdir, num_hosts, *flags):
    """A tiny variant on four devices: the whole pipeline, or what the flags say."""
    port = free_port()
    fields = ('gan.batch_size=4', 'gan.num_steps=20', 'train.num_steps=20')
    command = ['-m', 'covseg_jax.main', '--config=configs/transunet.py:tiny']
    command += [f'--workdir={workdir}', *(f'--config.{field}' for field in fields), *flags]
    if num_hosts == 1:
        return [begin(command, 4)]
    command += [
        f'--config.distributed.coordinator=localhost:{port}',
        f'--config.distributed.num_processes={num_hosts}',
    ]
    return [
        begin([*command, f'--config.distributed.process_id={number}'], 4 // num_hosts)
        for number in range(num_hosts)
    ]


def stop_within(processes, log):
    """SIGTERM for the last of the processes, once the run logs steps."""
    deadline = time.monotonic() + 200
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    processes[-1].send_signal(signal.SIGTERM)


def values_of(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {(row['step'], key): row[key] for row in rows for key in row if 'loss/' in key}


@pytest.fixture(scope='module')
def one_host(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('one')
    end(run(workdir, 1))
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize(('before', 'after'), [(2, 1), (1, 2)])
def test_a_run_begun_on_some_hosts_ends_on_others_as_on_one(one_host, tmp_path, before, after):
    processes = run(tmp_path, before)
    stop_within(processes, tmp_path / 'gan' / 'metrics.jsonl')
    written = end(processes)
    assert 'stopped and saved at step' in written[0][1]
    assert (tmp_path / 'stopped').exists()
    end(run(tmp_path, after))
    for model in ('gan', 'transunet'):
        found, expected = (
            values_of(workdir / model / 'metrics.jsonl') for workdir in (tmp_path, one_host)
        )
        assert found.keys() == expected.keys()
        for key, value in found.items():
            assert value == pytest.approx(expected[key], rel=1e-5, abs=1e-5), key
    for name in ('pseudo_masks/summary.json', 'evaluation/summary.json'):
        found, expected = (
            json.loads((workdir / name).read_text()) for workdir in (tmp_path, one_host)
        )
        assert found['threshold'] == pytest.approx(expected['threshold'], rel=1e-4)
    names = [sorted(p.name for p in (w / 'pseudo_masks').iterdir()) for w in (tmp_path, one_host)]
    assert names[0] == names[1]
    rows = [(w / 'evaluation' / 'cases.csv').read_text().count('\n') for w in (tmp_path, one_host)]
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_hosts_export_one_model_and_share_out_what_it_predicts(one_host, tmp_path):
    end(run(one_host, 2, '--stages=export', f'--output={tmp_path / "export"}'))
    covseg_jax.load(tmp_path / 'export')
    scans = one_host / 'studies' / 'studies' / 'CT-1'
    flags = '--stages=predict', f'--model={tmp_path / "export"}', f'--input={scans}'
    for num_hosts in (1, 2):
        end(run(one_host, num_hosts, *flags, f'--output={tmp_path / str(num_hosts)}'))
    names = sorted(path.name for path in (tmp_path / '1').glob('*.nii.gz'))
    assert len(names) == len(list(scans.iterdir()))
    for name in names:
        assert (tmp_path / '1' / name).read_bytes() == (tmp_path / '2' / name).read_bytes()
    studies = [
        [line.split(',')[0] for line in (tmp_path / each / 'results.csv').read_text().splitlines()]
        for each in ('1', '2')
    ]
    assert studies[0] == studies[1]
    # Each host did its share, and one alone finds nothing left to do.
    assert all((tmp_path / '2' / f'results.{host}.jsonl').exists() for host in (0, 1))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / '2').glob('*.nii.gz')}
    end(run(one_host, 1, *flags, '--resume', f'--output={tmp_path / "2"}'))
    assert {path: path.stat().st_mtime_ns for path in before} == before
