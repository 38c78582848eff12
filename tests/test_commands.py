"""Every command of the documents, on the tiny variant in place of the others."""

import importlib.util
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from covseg_jax.predict import default
from tests.bucket_server import BucketServer
from tests.documents import DOCUMENTS, PROGRAM, blocks, commands, read
from tests.imaging.chest import draw_chest
from tests.imaging.test_dicom import write_series
from tests.predict.test_dicom_seg import refer, turn
from tests.program import ROOT, assert_one_line_error, environment, run
from tests.segmentation.test_import_weights import write_weights


def flags_of(program, *names):
    """What follows the program, in each of its commands in the documents of these names."""
    lines = [line for name in names for line in commands(read(name))]
    return [line.removeprefix(program) for line in lines if line.startswith(program)]


# Whose commands of the program are run here, in this order: what one writes, the next may read.
# Those of SLOW take minutes: they train on from the model that comes with the program, or need a
# bucket. The others' are parsed by test_documents.py.
RUN = ('README.md', 'docs/predict.md', 'docs/data.md', 'docs/training.md', 'docs/evaluation.md')
LINES = [line for name in RUN for line in commands(read(name))]
LINES += [line for line in commands(read('docs/tpu.md')) if '--stages=compile_check' in line]
COMMANDS = list(
    dict.fromkeys(line.removeprefix(PROGRAM) for line in LINES if line.startswith(PROGRAM))
)
SLOW = {name: flags_of(PROGRAM, name) for name in ('docs/own_scans.md', 'docs/buckets.md')}
# Of the console command, which is `python -m covseg_jax`.
CONSOLE = flags_of('covseg ', *DOCUMENTS)
TEXTS = '\n'.join(map(read, DOCUMENTS))
SCRIPTS = sorted(set(re.findall(r'\blaunch/\w+\.sh|\b\w+_tpu_vm\.sh|\bfetch_results\.sh', TEXTS)))
BENCHMARKS = sorted(set(re.findall(r'tests[./]benchmarks[./](\w+)', TEXTS)))


def tiny_flags(text):
    """A command's flags for the tiny variant; where all stages would run anew, the first alone."""
    text = re.sub(r'configs/transunet\.py(:\w+)?', 'configs/transunet.py:tiny', text)
    flags = shlex.split(text)
    if '--config.data.folder=mydata' in flags:
        flags.append('--config.phantom.make=false')
        if not any(flag.startswith('--stages') for flag in flags):
            flags.append('--stages=prepare')
    if '--stages=import_weights' in flags:
        flags += ['--workdir=runs/imported', '--config.network.final_width=0']
    return flags


@pytest.fixture(scope='module')
def place(own_tiny_run, tmp_path_factory):
    """A folder as a reader of the documents has it."""
    workdir, place = own_tiny_run, tmp_path_factory.mktemp('reader')
    (place / 'configs').symlink_to(ROOT / 'configs')
    shutil.copytree(workdir, place / 'runs' / 'transunet-tiny')
    for name in ('a', 'b'):
        (place / 'runs' / name).symlink_to(workdir)
    (place / 'data').mkdir()
    for name in ('data/MosMedData', 'mydata'):
        (place / name).symlink_to(workdir / 'studies')
    (place / 'covseg_jax').mkdir()  # no package: it has no __init__.py
    (place / 'covseg_jax' / 'default_model').symlink_to(default.FOLDER)
    (place / 'scans').mkdir()
    (place / 'scan.nii.gz').symlink_to(next((workdir / 'studies' / 'studies' / 'CT-1').iterdir()))
    shutil.copytree(workdir / 'studies' / 'masks', place / 'true_masks')
    for mask in (place / 'true_masks').iterdir():
        (scan,) = (workdir / 'studies' / 'studies').rglob(mask.name.replace('_mask', ''))
        (place / 'scans' / scan.name).symlink_to(scan)
    write_weights(place / 'weights.safetensors')
    write_series(place / 'series', draw_chest('series')[0], turn(10), change=refer)
    return place


def test_documents_have_the_commands_that_are_tested_here():
    assert len(COMMANDS) >= 15
    assert len(CONSOLE) == 2
    assert len(SCRIPTS) >= 7


@pytest.mark.parametrize('text', COMMANDS)
def test_command_of_the_documents_runs(place, text):
    done = run(*tiny_flags(text), cwd=place)
    if '--stages=compile_check' in text and importlib.util.find_spec('libtpu') is None:
        assert_one_line_error(done, 'libtpu')  # docs/tpu.md says that it has to be installed
        return
    assert done.returncode == 0, f'{text}\n{done.stderr[-2000:]}'


@pytest.mark.parametrize('text', CONSOLE)
def test_console_command_of_the_documents_runs(place, text):
    done = run(*shlex.split(text), cwd=place, module='covseg_jax')
    assert done.returncode == 0, done.stderr[-2000:]
    of = 'series' if '--input=series/' in text else 'scan'
    assert (place / 'lesions' / f'{of}_mask.nii.gz').exists()
    if '--dicom_seg' in text:
        assert (place / 'lesions' / 'series_seg.dcm').exists()


@pytest.mark.slow
@pytest.mark.parametrize('text', SLOW['docs/own_scans.md'])
def test_command_for_own_scans_runs(place, text):
    # Its own variant, since the model fits no other, and as many steps as show that it goes on.
    text = re.sub(r'num_steps=\d+', 'num_steps=6', text)
    done = run(*shlex.split(text), cwd=place)
    assert done.returncode == 0, done.stderr[-2000:]
    if folder := re.search(r'--workdir=(\S+)', text):
        assert (place / folder[1] / 'export' / 'model.json').exists()
    else:
        assert list((place / 'masks').glob('*_mask.nii.gz'))


@pytest.mark.slow
def test_commands_for_buckets_run(place, tmp_path):
    server = BucketServer('BUCKET')
    workdir = place / 'runs' / 'transunet-tiny'
    for name, folder in (
        ('MosMedData', workdir / 'studies'),
        ('scans', place / 'scans'),
        ('export', default.MEMBERS[0]),
    ):
        for path in folder.rglob('*'):
            if path.is_file():
                server.put('BUCKET', f'{name}/{path.relative_to(folder)}', path.read_bytes())
    with server.serving() as address:
        for text in SLOW['docs/buckets.md']:
            # The tiny variant would make studies of its own.
            more = ['--config.phantom.make=false'] if '--config=' in text else []
            done = run(
                *tiny_flags(text), *more, f'--bucket_cache={tmp_path}', cwd=place,
                variables={'STORAGE_EMULATOR_HOST': address},
            )  # fmt: skip
            assert done.returncode == 0, f'{text}\n{done.stderr[-2000:]}'
    assert 'results.csv' in server.names('BUCKET', 'masks/')


def test_python_of_the_documents_runs(place):
    (code,) = blocks(read('docs/predict.md'), ('python',))
    code = code.replace('study_0001', sorted((place / 'scans').iterdir())[0].name.split('.')[0])
    done = subprocess.run(
        [sys.executable, '-c', code], cwd=place, env=environment(), capture_output=True, text=True,
        timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert 'CT-' in done.stdout


def test_first_commands_of_the_readme_run_in_an_environment_that_is_there(place):
    assert LINES[0] == 'launch/local.sh predict scan.nii.gz'
    assert LINES[1] == 'launch/local.sh run'
    venv = pathlib.Path(sys.prefix)
    if not (venv / 'requirements.installed').exists():
        pytest.skip('not an environment of launch/local.sh')
    workdir = f'--workdir={place / "runs" / "transunet-tiny"}'
    for arguments, result in (
        (['predict', 'scan.nii.gz', 'marked'], '1 study done'),  # paths as the caller has them
        (['run', '--config=configs/transunet.py:tiny', workdir], 'evaluate: done before'),
    ):
        done = subprocess.run(
            [ROOT / 'launch' / 'local.sh', *arguments], cwd=place,
            env=environment() | {'VENV': str(venv)}, capture_output=True, text=True, timeout=600,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert result in done.stdout
    assert len(list((place / 'marked').glob('*_preview.png'))) == 1
    for name in ('report.html', 'methods.txt', 'scan_results.json'):
        assert (place / 'marked' / name).exists()


@pytest.mark.parametrize('name', SCRIPTS)
def test_script_of_the_documents_is_there(name):
    # What they do is tested by test_launch.py.
    assert (ROOT / 'launch' / name.removeprefix('launch/')).exists()


@pytest.mark.parametrize('name', BENCHMARKS)
def test_benchmark_of_the_documents_starts(name):
    done = run('--help', module=f'tests.benchmarks.{name}')
    assert done.returncode == 0, done.stderr
    assert 'usage' in done.stdout
