"""Two processes as two hosts with a disk each, whose work directory is in a bucket."""

import json
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest

from covseg_jax.bucket import LIST
from tests.bucket_server import BucketServer
from tests.test_hosts import begin, end, free_port

CALLS = """
import contextlib, json, shutil, sys
import jax, numpy as np
from covseg_jax import bucket, hosts, mirror
from covseg_jax.errors import InputError
from covseg_jax.training import sharding
from covseg_jax.training.checkpoint import Checkpoints, restore_for_inference
number, port, cache = int(sys.argv[1]), sys.argv[2], sys.argv[3]
hosts.connect({'coordinator': f'localhost:{port}', 'num_processes': 2, 'process_id': number})
bucket.use_cache(cache)
folder = bucket.local_path('gs://b/run')
def read():
    files = [p for p in folder.rglob('*.txt') if 'commit' not in p.name]  # Orbax's
    return {str(p.relative_to(folder)): p.read_text() for p in files}
told = []
with mirror.opened('gs://b/run', is_workdir=True):
    (folder / 'shared').mkdir(parents=True, exist_ok=True)
    (folder / 'shared' / f'{number}.txt').write_text(str(number))
    (folder / 'both.txt').write_text(f'of {number}')
    mirror.share()
    told.append(read())
    if number == 0:
        (folder / 'log.txt').write_text('of step 3')
    make, abstract = sharding.place_state(
        lambda: {'weights': jax.numpy.arange(6.0), 'step': jax.numpy.int32(3)}, sharding.make_mesh()
    )
    checkpoints = Checkpoints(folder / 'checkpoints')
    checkpoints.save(3, make(), {'loss': 0.5})
    checkpoints.close()
    (folder / 'shared' / f'{number}.txt').unlink()
    checkpoints = Checkpoints(folder / 'checkpoints')
    told.append(read())
    found = checkpoints.restore(abstract)
    checkpoints.close()
    local = sharding.abstract(abstract, sharding.replicated(sharding.make_local_mesh()))
    state, step = restore_for_inference(folder / 'checkpoints', local)
    told += [found.step, found.progress, np.asarray(found.state['weights']).tolist(), step]
    told.append(np.asarray(state['weights']).tolist())
# What a process that was killed had not taken to the bucket yet.
(folder / f'late {number}.txt').write_text('late')
with mirror.opened('gs://b/run', is_workdir=True):
    told.append(read())
    checkpoints = Checkpoints(folder / 'checkpoints')
    if number == 1:
        shutil.rmtree(folder / 'checkpoints' / '3' / 'state')
    for work in (
        lambda: checkpoints.restore(abstract),
        lambda: contextlib.ExitStack().enter_context(mirror.opened('gs://b/other')),
    ):
        try:
            work()
        except InputError as error:
            told.append(str(error))
        bucket.use_cache(sys.argv[4])  # the other host's too
print(json.dumps(told))
"""


@pytest.fixture
def server(monkeypatch):
    server = BucketServer('b')
    with server.serving() as address:
        monkeypatch.setenv('STORAGE_EMULATOR_HOST', address)
        yield server


def test_hosts_with_a_disk_each_have_what_the_others_wrote(server, tmp_path):
    port = free_port()
    caches = [[tmp_path / str(number), tmp_path / 'shared'] for number in range(2)]
    flags = [['-c', CALLS, number, port, *each] for number, each in enumerate(caches)]
    numbers = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    late = {'late 0.txt': 'late', 'late 1.txt': 'late'}
    for out, _ in end([begin(each, 1) for each in flags]):
        first, second, *rest, damaged, taken = json.loads(out.splitlines()[-1])
        assert first == {'shared/0.txt': '0', 'shared/1.txt': '1', 'both.txt': 'of 0'}
        assert second == {'both.txt': 'of 0', 'log.txt': 'of step 3'}
        assert rest == [3, {'loss': 0.5}, numbers, 3, numbers, second | late]
        # What ends one of them ends both.
        assert 'checkpoints/3: the checkpoint does not fit the config or is damaged' in damaged
        assert taken.startswith('gs://b/other: another run on this host works there;')
    assert {'both.txt', 'log.txt', *late} == {
        name for name in server.names('b', 'run/') if name.endswith('.txt') and 'commit' not in name
    }


def run(run_name, caches, *flags):
    """The tiny pipeline on two hosts, in gs://b/RUN_NAME."""
    command = ['-m', 'covseg_jax.main', '--config=configs/transunet.py:tiny', *flags]
    command += [
        f'--workdir=gs://b/{run_name}',
        '--config.train.num_steps=40',
        f'--config.distributed.coordinator=localhost:{free_port()}',
        '--config.distributed.num_processes=2',
    ]
    return [
        begin([*command, f'--config.distributed.process_id={number}', f'--bucket_cache={cache}'], 1)
        for number, cache in enumerate(caches)
    ]


def assert_whole(server, run_name, caches):
    """The bucket holds what its list names, and each host the same; returns the names."""
    names = server.names('b', f'{run_name}/') - {LIST}
    listed = json.loads(server.buckets['b'][f'{run_name}/{LIST}'].content)
    assert listed.keys() == {'files', 'moving', 'going'}
    assert names == set(listed['files'])
    for cache in caches:
        folder = cache / f'b%2F{run_name}' / run_name
        files = {p.relative_to(folder).as_posix() for p in folder.rglob('*') if p.is_file()}
        assert {name for name in files if not name.startswith('compile_cache/')} == names
    return names


def read(folder, name):
    rows = map(json.loads, (folder / name).read_text().splitlines())
    return [{k: v for k, v in row.items() if not k.startswith('speed/')} for row in rows]


@pytest.mark.slow
def test_a_run_that_loses_a_host_goes_on_with_the_same_numbers(server, tmp_path):
    whole, first, second = (
        [tmp_path / f'{name} {number}' for number in range(2)] for name in ('whole', 'cut', 'new')
    )
    end(run('whole', whole))
    names = assert_whole(server, 'whole', whole)
    assert {'evaluation/report.html', 'manifests/evaluate.json'} <= names
    assert len([name for name in names if name.endswith('/geometry.json')]) == 10

    # One of them goes away in the midst of the training, and the other cannot go on.
    log = 'transunet/metrics.jsonl'
    processes = run('cut', first)
    try:
        while f'cut/{log}' not in server.names('b'):
            time.sleep(0.02)
            assert processes[1].poll() is None
        processes[1].kill()
        processes[0].communicate(timeout=600)
    finally:
        for process in processes:
            process.kill()
    assert processes[0].returncode != 0

    # Its successor has an empty disk.
    second[0] = first[0]
    written = end(run('cut', second))
    for stage in ('prepare', 'gan', 'synthesize'):
        assert f'{stage}: done before with the same settings, skipped' in written[0][0]
    by_chance = 'tensorboard', '/d/'  # names of event files, and in Orbax's folders
    one, other = (
        {name for name in each if not any(part in name for part in by_chance)}
        for each in (names, assert_whole(server, 'cut', second))
    )
    assert one == other
    folders = [tmp_path / 'whole 0' / 'b%2Fwhole' / 'whole', first[0] / 'b%2Fcut' / 'cut']
    for name in ('gan/metrics.jsonl', log):
        assert read(folders[0], name) == read(folders[1], name)
    tables = [(folder / 'evaluation' / 'cases.csv').read_text() for folder in folders]
    assert tables[0] == tables[1]
    states = [
        ocp.StandardCheckpointer().restore(folder / 'transunet' / 'checkpoints' / '40' / 'state')
        for folder in folders
    ]
    assert states[0].keys() == states[1].keys()
    for name, values in states[0].items():
        np.testing.assert_array_equal(states[1][name], values)
