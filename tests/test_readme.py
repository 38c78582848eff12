"""Every command of the README runs, on the tiny variant in place of the others."""

import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import safetensors.numpy

from configs import transunet
from tests.program import ROOT, environment, run
from tests.training.test_published_weights import make_variables, to_pytorch

README = (ROOT / 'README.md').read_text(encoding='utf-8')
BLOCKS = [text for kind, text in re.findall(r'```(\w*)\n(.*?)```', README, re.S) if not kind]
LINES = [
    line.split('  #')[0].strip()
    for block in BLOCKS
    for line in re.sub(r'\\\n\s*', '', block).splitlines()
]
PROGRAM = 'python -m covseg_jax.main '
COMMANDS = [line.removeprefix(PROGRAM) for line in LINES if line.startswith(PROGRAM)]
SCRIPTS = sorted(set(re.findall(r'\blaunch/\w+\.sh|\b\w+_tpu_vm\.sh|\bfetch_results\.sh', README)))
BENCHMARKS = sorted(set(re.findall(r'tests[./]benchmarks[./](\w+)', README)))


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
def place(finished, tmp_path_factory):
    """A folder as the README's reader has it."""
    workdir, _ = finished
    place = tmp_path_factory.mktemp('reader')
    (place / 'configs').symlink_to(ROOT / 'configs')
    shutil.copytree(workdir, place / 'runs' / 'transunet-tiny')
    for name in ('a', 'b'):
        (place / 'runs' / name).symlink_to(workdir)
    (place / 'data').mkdir()
    for name in ('data/MosMedData', 'mydata'):
        (place / name).symlink_to(workdir / 'studies')
    scans = sorted((workdir / 'studies' / 'studies' / 'CT-1').iterdir())
    (place / 'scans').mkdir()
    for scan in scans[:2]:
        (place / 'scans' / scan.name).symlink_to(scan)
    for name in ('masks', 'true_masks'):
        shutil.copytree(workdir / 'studies' / 'masks', place / name)
    config = transunet.get_config('tiny').unlock()
    config.network.final_width = 0
    weights = to_pytorch(config, make_variables(config))
    safetensors.numpy.save_file(weights, place / 'weights.safetensors')
    return place


def test_readme_has_the_commands_that_are_tested_here():
    assert len(COMMANDS) >= 15
    assert len(SCRIPTS) >= 7


# In the README's order: what one writes, the next may read.
@pytest.mark.parametrize('text', COMMANDS)
def test_command_of_the_readme_runs(place, text):
    done = run(*tiny_flags(text), cwd=place)
    if '--stages=compile_check' in text and done.returncode:
        assert 'libtpu' in done.stderr  # which is not in requirements.txt, and the README says so
        return
    assert done.returncode == 0, f'{text}\n{done.stderr[-2000:]}'


def test_python_of_the_readme_runs(place):
    (code,) = re.findall(r'```python\n(.*?)```', README, re.S)
    code = code.replace('study_0001', sorted((place / 'scans').iterdir())[0].name.split('.')[0])
    done = subprocess.run(
        [sys.executable, '-c', code], cwd=place, env=environment(), capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert 'CT-' in done.stdout


def test_first_command_of_the_readme_runs_in_an_environment_that_is_there(place):
    assert LINES[0].startswith('launch/local.sh run')
    venv = pathlib.Path(sys.prefix)
    if not (venv / 'requirements.installed').exists():
        pytest.skip('not an environment of launch/local.sh')
    workdir = f'--workdir={place / "runs" / "transunet-tiny"}'
    done = subprocess.run(
        [ROOT / 'launch' / 'local.sh', 'run', '--config=configs/transunet.py:tiny', workdir],
        env=environment() | {'VENV': str(venv)}, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert 'evaluate: done before' in done.stdout


@pytest.mark.parametrize('name', SCRIPTS)
def test_script_of_the_readme_is_there(name):
    # What they do is tested by test_launch.py.
    assert (ROOT / 'launch' / name.removeprefix('launch/')).exists()


@pytest.mark.parametrize('name', BENCHMARKS)
def test_benchmark_of_the_readme_starts(name):
    arguments = [sys.executable, '-m', f'tests.benchmarks.{name}', '--help']
    done = subprocess.run(
        arguments, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert 'usage' in done.stdout
