"""Two processes as two hosts with a disk each, whose work directory is in a bucket."""

import json

import pytest

from covseg_jax.bucket import LIST
from tests.bucket_server import BucketServer
from tests.test_hosts import begin, end, free_port

CALLS = """
import json, sys
import jax, numpy as np
from covseg_jax import bucket, hosts, mirror
from covseg_jax.training import sharding
from covseg_jax.training.checkpoint import Checkpoints, restore_for_inference
number, port, cache = int(sys.argv[1]), sys.argv[2], sys.argv[3]
hosts.connect({'coordinator': f'localhost:{port}', 'num_processes': 2, 'process_id': number})
bucket.use_cache(cache)
folder = bucket.local_path('gs://b/run')
def read():
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob('*.txt')}
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
    flags = [['-c', CALLS, number, port, tmp_path / str(number)] for number in range(2)]
    numbers = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    for out, _ in end([begin(each, 1) for each in flags]):
        first, second, *rest = json.loads(out.splitlines()[-1])
        assert first == {'shared/0.txt': '0', 'shared/1.txt': '1', 'both.txt': 'of 0'}
        assert second == {'both.txt': 'of 0', 'log.txt': 'of step 3'}
        assert rest == [3, {'loss': 0.5}, numbers, 3, numbers]
    assert {'both.txt', 'log.txt'} == {
        name for name in server.names('b', 'run/') if name.endswith('.txt')
    }


@pytest.mark.slow
def test_a_run_on_two_hosts_with_a_disk_each_is_whole_in_the_bucket(server, tmp_path):
    port = free_port()
    flags = [
        *('-m', 'covseg_jax.main', '--config=configs/transunet.py:tiny', '--workdir=gs://b/run'),
        f'--config.distributed.coordinator=localhost:{port}',
        '--config.distributed.num_processes=2',
    ]
    end(
        [
            begin(
                [*flags, f'--config.distributed.process_id={number}', f'--bucket_cache={cache}'], 2
            )
            for number, cache in enumerate([tmp_path / '0', tmp_path / '1'])
        ]
    )
    names = server.names('b', 'run/') - {LIST}
    assert {'evaluation/report.html', 'manifests/evaluate.json'} <= names
    assert len([name for name in names if name.endswith('/geometry.json')]) == 10
    for number in range(2):
        folder = tmp_path / str(number) / 'b%2Frun' / 'run'
        files = {p.relative_to(folder).as_posix() for p in folder.rglob('*') if p.is_file()}
        assert {name for name in files if not name.startswith('compile_cache/')} == names
