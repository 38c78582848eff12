"""Tests run on the CPU, on eight simulated devices, whatever the machine has."""

import fcntl
import json
import os
import pathlib
import shutil
import time
import types
import zlib

from tests.program import COMPILED_QUICKLY, run

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = (
    os.environ.get('XLA_FLAGS', '')
    + ' --xla_force_host_platform_device_count=8'
    + ' --xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT'  # as `cpu` does
    + f' {COMPILED_QUICKLY}'
).strip()
# Tests, and the commands that they start, compile the same programs again and again: compilation is
# most of their time. All processes share what was compiled, and it stays for the next call.
os.environ['JAX_COMPILATION_CACHE_DIR'] = os.path.join(
    os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache'), 'covseg_jax_tests'
)
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'  # they are many small ones

import hypothesis
import numpy as np
import pytest

# The same examples in every run; the first of them waits for a compilation.
hypothesis.settings.register_profile('fixed', derandomize=True, deadline=None, max_examples=20)
hypothesis.settings.load_profile('fixed')

SHARED = pathlib.Path(__file__).resolve().parents[2] / 'shared'


def pytest_configure() -> None:
    """Programs of two weeks ago are compiled anew: code has changed since, and disks fill up."""
    if 'PYTEST_XDIST_WORKER' not in os.environ:
        for file in pathlib.Path(os.environ['JAX_COMPILATION_CACHE_DIR']).glob('*'):
            if time.time() - file.stat().st_mtime > 14 * 24 * 3600:
                file.unlink(missing_ok=True)


# They take minutes, and begin first: all would wait for one that begins last. Those from
# test_commands.py on use what test_main.py compiles.
LONG = (
    'test_main.py',
    'test_quality.py',
    'test_configs.py',
    'test_steps.py',
    'test_lanes.py',
    'test_import_weights.py',
    'test_export.py',
    'test_commands.py',
    'test_bucket_run.py',
    'test_notebooks.py',
    'test_interrupts.py',
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONG)))


@pytest.fixture(scope='session')
def shared_data() -> pathlib.Path:
    """The folder with real CT scans; tests that want it are skipped where it is not there."""
    folder = SHARED / 'data'
    if not folder.is_dir():
        pytest.skip(f'no folder {folder}')
    return folder


@pytest.fixture(scope='session')
def tiny_run(tmp_path_factory):
    """A work directory in which every stage of the tiny variant has run, and what the program said.

    It is made once for all processes that test; test_main.py alone uses it, the others copies.
    """
    shared = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ:
        shared = shared.parent
    workdir, said = shared / 'tiny', shared / 'tiny.json'
    with (shared / 'tiny.lock').open('w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not said.exists():
            done = run('--config=configs/transunet.py:tiny', f'--workdir={workdir}')
            if done.returncode == 0:
                shutil.copytree(workdir, shared / 'tiny_copy')
            said.write_text(json.dumps(vars(done)))
    done = types.SimpleNamespace(**json.loads(said.read_text()))
    assert done.returncode == 0, done.stderr[-3000:]
    return workdir, done


@pytest.fixture(scope='module')
def own_tiny_run(tiny_run, tmp_path_factory):
    """The same work directory, of a module's own."""
    copy = tiny_run[0].with_name('tiny_copy')
    return shutil.copytree(copy, tmp_path_factory.mktemp('run') / 'tiny')


@pytest.fixture(scope='session')
def reference() -> pathlib.Path:
    """The folder with numbers of other implementations."""
    return pathlib.Path(__file__).parent / 'reference'


def write_case(
    folder: pathlib.Path, study_id: str, category: str | None, *, shape=(16, 32, 32), masked=False
) -> None:
    """A prepared case: noise, seeded by its name, in a box of lungs."""
    case = folder / study_id
    case.mkdir(parents=True)
    rng = np.random.default_rng(zlib.crc32(study_id.encode()))
    lungs = np.zeros(shape, np.uint8)
    lungs[2:-2, 4:-4, 4:-4] = 1
    image = (rng.uniform(0.05, 0.3, shape) * lungs).astype(np.float16)
    np.save(case / 'image.npy', image)
    np.save(case / 'lungs.npy', lungs)
    if masked:
        np.save(case / 'lesion.npy', lungs)
    description = {'study_id': study_id, 'category': category, 'data_set': 'made'}
    (case / 'geometry.json').write_text(json.dumps(description))


@pytest.fixture
def prepared(tmp_path: pathlib.Path) -> pathlib.Path:
    """Six healthy, eight COVID and three masked COVID cases."""
    for number in range(6):
        write_case(tmp_path, f'study_{number:04d}', 'CT-0')
    for number in range(6, 14):
        write_case(tmp_path, f'study_{number:04d}', 'CT-2')
    for number in range(14, 17):
        write_case(tmp_path, f'study_{number:04d}', 'CT-1', masked=True)
    return tmp_path
