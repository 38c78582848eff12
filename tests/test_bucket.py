"""Folders in buckets, against a bucket on loopback."""

import contextlib
import itertools
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import transunet
from covseg_jax import bucket, hosts, mirror
from covseg_jax.errors import InputError
from covseg_jax.stages import buckets
from covseg_jax.training.checkpoint import Checkpoints
from tests.bucket_server import BucketServer, Refused

ROOT = pathlib.Path(__file__).parents[1]
URL = 'gs://b/runs/one'


class CutOff(BucketServer):
    """Refuses the calls of which `is_cut_off` tells that, by their numbers from 0."""

    is_cut_off = staticmethod(lambda number: False)
    number = -1

    def answer(self, *request):
        self.number += 1
        if self.is_cut_off(self.number):
            raise Refused(403)
        return super().answer(*request)


@pytest.fixture
def server(monkeypatch, tmp_path):
    server = CutOff('b')
    monkeypatch.setattr(bucket, '_cache', tmp_path / 'cache')
    with server.serving() as address:
        monkeypatch.setenv('STORAGE_EMULATOR_HOST', address)
        yield server


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """Goes to another host, whose disk has nothing."""
    numbers = iter(range(1000))
    return lambda: monkeypatch.setattr(bucket, '_cache', tmp_path / f'host {next(numbers)}')


def write(files):
    folder = bucket.local_path(URL)
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        if text is not None:
            path.write_text(text)


def read():
    folder = bucket.local_path(URL)
    paths = [path for path in folder.rglob('*') if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_text() for path in paths}


def in_bucket(server):
    """The objects, without the list."""
    found = server.buckets['b']
    names = server.names('b', 'runs/one/') - {bucket.LIST}
    return {name: found[f'runs/one/{name}'].content.decode(errors='replace') for name in names}


OLD = {'log': 'one', 'checkpoints/4/state': 'four', 'checkpoints/4/sum': '4', 'manifests/a': 'old'}
NEW = {'log': 'one two', 'checkpoints/8/state': 'eight', 'checkpoints/8/sum': '8'}
GONE = dict.fromkeys(('checkpoints/4/state', 'checkpoints/4/sum', 'manifests/a'))


def test_a_mirror_brings_and_takes_what_changed(server, elsewhere):
    with mirror.opened(URL):
        write(OLD | {'compile_cache/of_this_host': '', '.tmp-host-1-log': 'half'})
    assert in_bucket(server) == OLD
    elsewhere()
    with mirror.opened(URL):
        assert read() == OLD
        write(NEW | GONE)
    assert in_bucket(server) == NEW
    number = len(server.calls)
    elsewhere()
    with mirror.opened(URL):
        assert read() == NEW
    # Listed and read, and nothing written.
    assert {method for method, _ in server.calls[number:]} == {'GET'}


@pytest.mark.parametrize('is_for_good', [True, False])
def test_a_push_cut_off_at_any_call_is_there_as_a_whole_or_not_at_all(
    server, elsewhere, is_for_good
):
    with mirror.opened(URL):
        write(OLD)
    before, number = dict(server.buckets['b']), len(server.calls)
    elsewhere()
    with mirror.opened(URL):
        write(NEW | GONE)
    found = []
    for calls in range(len(server.calls) - number):
        server.buckets['b'] = dict(before)
        elsewhere()
        server.number = -1
        server.is_cut_off = calls.__le__ if is_for_good else calls.__eq__
        with contextlib.suppress(InputError), mirror.opened(URL):
            write(NEW | GONE)
        server.is_cut_off = lambda number: False
        elsewhere()
        with mirror.opened(URL):
            found.append(read())
        assert found[-1] == in_bucket(server)  # the list names all that is there
    assert [each for each in found if each not in (OLD, NEW)] == []
    assert OLD in found
    assert found[-1] == NEW
    if is_for_good:  # a call that is refused once may be one that is made again
        assert sum(one != other for one, other in itertools.pairwise(found)) == 1


def test_changes_that_did_not_reach_the_bucket_stay_until_another_host_writes(server, elsewhere):
    with mirror.opened(URL):
        write(OLD)
    here = bucket._cache
    write(NEW)  # and the process was killed
    (bucket.local_path(URL) / 'manifests/a').unlink()  # a cache may lose files
    with mirror.opened(URL):
        assert read() == OLD | NEW
    write({'log': 'of the killed'})
    elsewhere()
    with mirror.opened(URL):
        write({'log': 'of the other host', 'checkpoints/8/sum': None})
    expected = in_bucket(server)
    bucket.use_cache(here)
    with mirror.opened(URL):
        assert read() == expected
        assert not (bucket.local_path(URL) / 'checkpoints' / '9').exists()


def test_nothing_of_a_person_is_written_over(server, elsewhere):
    server.put('b', 'runs/one/notes.txt', b'mine')
    with pytest.raises(InputError, match=r'one/notes.txt: is in the way.* name another'):
        contextlib.ExitStack().enter_context(mirror.opened(URL))
    del server.buckets['b']['runs/one/notes.txt']
    with mirror.opened(URL):
        write(OLD)
    theirs = server.put('b', 'runs/one/checkpoints/8/sum', b'mine')
    with pytest.raises(InputError, match=r'8/sum: is not the object.* move it'), mirror.opened(URL):
        write(NEW)
    assert server.buckets['b']['runs/one/checkpoints/8/sum'] is theirs
    elsewhere()
    with mirror.opened(URL):
        assert read() == OLD


def test_a_damaged_object_is_named_and_may_be_removed(server, elsewhere):
    with mirror.opened(URL):
        write(OLD)
    elsewhere()
    key = 'runs/one/checkpoints/4/sum'
    good = server.buckets['b'][key]
    server.put('b', key, b'5')
    with pytest.raises(InputError, match=r'4/sum: is damaged.* restore it, or remove it'):
        contextlib.ExitStack().enter_context(mirror.opened(URL))
    server.buckets['b'][key] = good._replace(content=b'5')  # on the way
    with pytest.raises(InputError, match=r'4/sum: arrived with another checksum'):
        contextlib.ExitStack().enter_context(mirror.opened(URL))
    assert not (bucket.local_path(URL) / 'checkpoints/4/sum').exists()
    del server.buckets['b'][key]
    with mirror.opened(URL):
        assert read() == {name: text for name, text in OLD.items() if not name.endswith('/sum')}


def test_what_the_bucket_refuses_is_said_in_one_line(server):
    for url, line in (
        ('gs://absent/run', r'gs://absent/run: there is no bucket gs://absent; make it'),
        ('gs://b', r'gs://b: is not a folder in a bucket'),
        ('gs://b/../x', r'gs://b/../x: is not a folder'),
    ):
        with pytest.raises(InputError, match=line):
            contextlib.ExitStack().enter_context(mirror.opened(url))
    with mirror.opened(URL):
        write(OLD)
    for method, status, line in (
        ('GET', 401, r'one: no credentials .* run `gcloud auth'),
        ('GET', 403, r'one: permission is missing \(403\).*objectUser\) on gs://b'),
        ('POST', 403, r'bucket.json: permission is missing \(403\)'),
    ):
        server.refuse = {method: status}
        with pytest.raises(InputError, match=line), mirror.opened(URL):
            write({'log': 'more'})


def test_a_run_that_another_host_took_over_changes_nothing_more(server, elsewhere, capsys):
    with mirror.opened(URL):
        write(OLD)
    first = bucket.local_path(URL)
    with contextlib.ExitStack() as stack:
        stack.enter_context(pytest.raises(InputError, match='another run works there'))
        stack.enter_context(mirror.opened(URL, is_workdir=True))
        elsewhere()
        with mirror.opened(URL):
            write(NEW)
        (first / 'log').write_text('late')
        mirror.push()
    assert in_bucket(server) == OLD | NEW
    assert capsys.readouterr().err.startswith('note: gs://b/runs/one: another run works there;')


def test_who_looks_sees_no_file_that_the_run_has_removed(server, elsewhere, monkeypatch):
    with mirror.opened(URL):
        write({'stopped': 'at 4', 'log': 'one'})
    of_run = bucket._cache
    elsewhere()
    of_watcher = bucket._cache
    mirror.look(URL, lambda name: name in ('stopped', 'log'))
    assert read() == {'stopped': 'at 4', 'log': 'one'}
    monkeypatch.setattr(bucket, '_cache', of_run)
    with mirror.opened(URL):
        write({'stopped': None, 'log': 'one two'})
    monkeypatch.setattr(bucket, '_cache', of_watcher)
    mirror.look(URL, lambda name: name in ('stopped', 'log'))
    assert read() == {'log': 'one two'}


def test_several_hosts_write_predictions_on_a_disk_that_they_share(monkeypatch):
    monkeypatch.setattr(hosts, '_num_hosts', 2)
    given = dict.fromkeys(('input', 'output', 'reference', 'model')) | {'output': URL}
    with pytest.raises(InputError, match='several hosts write into a folder on a disk'):
        contextlib.ExitStack().enter_context(buckets.opened(None, URL, ['predict'], given))


@pytest.mark.parametrize(
    ('field', 'value'),
    [('data.prepared', URL), ('prepare.lung_network', URL), ('train.init', URL),
     ('train.init', f'default,{URL}')],
)  # fmt: skip
def test_a_setting_that_must_be_on_a_disk_is_refused_in_a_bucket(field, value):
    config = transunet.get_config()
    config.update_from_flattened_dict({field: value})
    given = dict.fromkeys(('input', 'output', 'reference', 'model'))
    with pytest.raises(InputError, match=f"{field}='{value}': is in a bucket"):
        contextlib.ExitStack().enter_context(buckets.opened(config, '', ['train'], given))


def test_two_runs_on_one_host_do_not_share_a_folder(server):
    with mirror.opened(URL):
        write(OLD)
        # Locks are a process's.
        code = (
            'import sys; from covseg_jax import bucket\n'
            'bucket.use_cache(sys.argv[1])\n'
            'with bucket.LocalFolder(sys.argv[2]).locked() as is_free: print(is_free)'
        )
        done = subprocess.run(
            [sys.executable, '-c', code, str(bucket._cache), URL],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout == 'False\n'


def test_fetch_brings_what_is_new_and_drops_what_is_gone(server, elsewhere):
    for name in ('a.nii', 'deep/b.nii', 'deep/c.nii'):
        server.put('b', f'data/{name}', name.encode())
    server.put('b', 'data/deep/', b'')  # as consoles make folders
    folder = bucket.fetch('gs://b/data/')
    assert folder.name == 'data'  # data sets are told apart by it
    first = {path: path.stat().st_mtime_ns for path in folder.rglob('*.nii')}
    assert sorted(path.read_bytes() for path in first) == [b'a.nii', b'deep/b.nii', b'deep/c.nii']
    server.put('b', 'data/a.nii', b'other')
    del server.buckets['b']['data/deep/c.nii']
    (folder / 'deep/b.nii').write_bytes(b'spoilt')
    number = len(server.calls)
    bucket.fetch('gs://b/data')
    assert {path.name: path.read_bytes() for path in folder.rglob('*.nii')} == {
        'a.nii': b'other', 'b.nii': b'deep/b.nii'
    }  # fmt: skip
    bucket.fetch('gs://b/data')
    assert len(server.calls) - number == 4  # two lists, two objects
    times = {path.name: path.stat().st_mtime_ns for path in folder.rglob('*.nii')}
    assert bucket.fetch('gs://b/data/a.nii').read_bytes() == b'other'
    elsewhere()  # `predict --resume` knows scans by their times
    found = bucket.fetch('gs://b/data').rglob('*.nii')
    assert {path.name: path.stat().st_mtime_ns for path in found} == times
    with pytest.raises(InputError, match=r'gs://b/nothing: nothing is there'):
        bucket.fetch('gs://b/nothing')
    server.put('b', 'bad/../../escape', b'')
    with pytest.raises(InputError, match='no file can have this name'):
        bucket.fetch('gs://b/bad')


def test_a_large_file_goes_in_parts_and_one_that_grows_as_it_was(server):
    folder = bucket.local_path(URL)
    with mirror.opened(URL, is_workdir=True):
        folder.mkdir(parents=True)
        (folder / 'large').write_bytes(b'0123456789' * 1_000_000)  # in several requests
        with (folder / 'log').open('w') as log:
            log.write('one\n')
            log.flush()
            mirror.push_after(lambda: None)
            mirror.join()
            log.write('two\n')
    assert server.buckets['b']['runs/one/large'].content == (folder / 'large').read_bytes()
    assert in_bucket(server)['log'] == 'one\ntwo\n'
    assert ('PUT', 'list') in server.calls
    files = json.loads(server.buckets['b'][f'runs/one/{bucket.LIST}'].content)['files']
    assert files['log'] == {'bytes': 8, 'crc32c': server.buckets['b']['runs/one/log'].crc32c}


def test_checkpoints_and_their_log_go_on_elsewhere_from_the_last_whole_push(server, elsewhere):
    def state(step):
        return {'weights': jnp.arange(5.0) * step, 'step': jnp.int32(step)}

    with mirror.opened(URL, is_workdir=True):
        folder = bucket.local_path(URL)
        checkpoints = Checkpoints(folder / 'checkpoints')
        for step in (2, 4, 6):
            write({'log': f'of step {step}'})
            checkpoints.save(step, state(step), {'loss': step / 2})
        checkpoints.close()
        server.refuse = {'POST': 403}  # what comes after is lost with the host
        checkpoints = Checkpoints(folder / 'checkpoints')
        write({'log': 'of step 8'})
        checkpoints.save(8, state(8), {})
        with pytest.raises(InputError, match='permission is missing'):
            checkpoints.close()
        server.refuse = {}
        lost = dict(server.buckets['b'])
    whole = {name.split('/')[1] for name in in_bucket(server) if '/' in name}
    assert whole == {'6', '8'}  # what was refused came at the end
    server.buckets['b'] = lost
    elsewhere()
    with mirror.opened(URL, is_workdir=True):
        folder = bucket.local_path(URL)
        assert (folder / 'log').read_text() == 'of step 6'
        checkpoints = Checkpoints(folder / 'checkpoints')
        found = checkpoints.restore(jax.eval_shape(lambda: state(0)))
        checkpoints.close()
        assert (found.step, found.progress) == (6, {'loss': 3.0})
        np.testing.assert_array_equal(found.state['weights'], state(6)['weights'])
        kept = {path.name for path in (folder / 'checkpoints').iterdir()}
    assert kept == {'4', '6'}
