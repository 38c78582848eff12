"""A run whose work directory is in a bucket, killed while it uploads and gone on with elsewhere."""

import json
import pathlib

import numpy as np
import orbax.checkpoint as ocp
import pytest

from covseg_jax.bucket import LIST
from tests.bucket_server import BucketServer
from tests.program import assert_one_line_error, run

TINY = '--config=configs/transunet.py:tiny'
ONE = 'gs://b/runs/one'


@pytest.fixture(scope='module')
def server():
    server = BucketServer('b')
    with server.serving() as server.address:
        yield server


def run_with(server, *flags, **arguments):
    return run(TINY, *flags, variables={'STORAGE_EMULATOR_HOST': server.address}, **arguments)


def losses(workdir: pathlib.Path) -> list[dict]:
    rows = map(json.loads, (workdir / 'transunet' / 'metrics.jsonl').read_text().splitlines())
    return [{k: v for k, v in row.items() if not k.startswith('speed/')} for row in rows]


def newest_state(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    folder = workdir / 'transunet' / 'checkpoints' / '8' / 'state'
    return ocp.StandardCheckpointer().restore(folder)


def listed(server) -> dict:
    return json.loads(server.buckets['b'][f'runs/one/{LIST}'].content)


def test_a_run_killed_while_it_uploads_ends_elsewhere_with_the_same_numbers(server, tmp_path):
    # The last checkpoint is whole on the first host, and comes to the bucket in part.
    server.hold = 'transunet/checkpoints/8/'
    flags = f'--workdir={ONE}', f'--bucket_cache={tmp_path / "first"}'
    done = run_with(server, *flags, kill_at=server.held)
    assert done.returncode == -9, done.stderr[-3000:]
    server.hold = None
    checkpoints = 'transunet/checkpoints/'
    whole = {name.split('/')[2] for name in listed(server)['files'] if checkpoints in name}
    assert whole == {'4', '6'}
    assert any(f'{checkpoints}8/' in name for name in listed(server)['coming'])

    flags = f'--workdir={ONE}', f'--bucket_cache={tmp_path / "second"}'
    done = run_with(server, *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    for stage in ('prepare', 'gan', 'synthesize'):
        assert f'{stage}: done before with the same settings, skipped' in done.stdout
    first, second = (tmp_path / each / 'b%2Fruns%2Fone' / 'one' for each in ('first', 'second'))
    assert losses(second) == losses(first)
    states = newest_state(first), newest_state(second)
    assert states[0].keys() == states[1].keys()
    for name, values in states[0].items():
        np.testing.assert_array_equal(states[1][name], values)

    # The bucket has what the work directory has, and the list names all of it.
    names = server.names('b', 'runs/one/') - {LIST}
    assert names == set(listed(server)['files'])
    files = {path.relative_to(second).as_posix() for path in second.rglob('*') if path.is_file()}
    assert names == {name for name in files if not name.startswith('compile_cache/')}
    assert {'evaluation/report.html', 'progress.png', 'manifests/evaluate.json'} <= names

    # Another host sees where it stands, with little of it.
    flags = f'--workdir={ONE}', f'--bucket_cache={tmp_path / "third"}'
    done = run_with(server, *flags, '--stages=status')
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(' done ') == 5
    assert not list((tmp_path / 'third').rglob('checkpoints'))


def test_a_bucket_that_cannot_be_used_is_one_line(server, tmp_path):
    cache = f'--bucket_cache={tmp_path}'
    done = run_with(server, '--workdir=gs://absent/run', cache)
    assert_one_line_error(done, 'gs://absent/run: there is no bucket gs://absent')
    done = run_with(
        server, f'--workdir={tmp_path}', '--config.data.prepared=gs://b/prepared', cache
    )
    assert_one_line_error(done, 'data.prepared', 'must be on a disk')
