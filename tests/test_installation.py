"""Prediction with nothing but what it needs: the packages of pyproject.toml, without those of its
extras."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import venv

import pytest

import covseg_jax
from covseg_jax.phantom.studies import write_phantom_data_set
from tests.program import ROOT, assert_one_line_error

PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
# What setuptools builds the package from, and the Dockerfile copies.
SOURCES = ['covseg_jax', 'pyproject.toml', 'README.md', 'LICENSE']
TRAINING = ('grain', 'matplotlib', 'optax', 'orbax', 'tensorboard', 'tensorboardX')
LOAD = 'import covseg_jax.main, covseg_jax.predict.studies; covseg_jax.load()'
MAIN = 'from covseg_jax.__main__ import run; run()'


@pytest.fixture(scope='module')
def scan(tmp_path_factory):
    folder = tmp_path_factory.mktemp('phantom')
    write_phantom_data_set(
        folder, num_healthy=0, num_covid=1, num_masked=0, shape=(64, 64, 20),
        spacing_mm=(5.25, 5.25, 16.0), seed=3, num_workers=1,
    )  # fmt: skip
    (path,) = folder.rglob('study_*.nii.gz')
    return path


def name_packages(requirements):
    return {re.match(r'[\w-]+', each)[0].lower() for each in requirements}


def test_requirements_have_every_package_that_the_project_names():
    lines = (ROOT / 'requirements.txt').read_text().splitlines()
    pinned = name_packages(line for line in lines if line and not line.startswith('#'))
    extras = PROJECT['optional-dependencies']
    needed = name_packages([*PROJECT['dependencies'], *extras['train'], *extras['dicom']])
    # The only one that others bring.
    assert needed - pinned == {'absl-py'}


def run_without(packages, code, *flags):
    # As if they were not installed.
    code = f'import sys; sys.modules |= dict.fromkeys({packages})\n{code}'
    return subprocess.run(
        [sys.executable, '-c', code, *flags], cwd=ROOT,
        env=os.environ | {'GLIBC_TUNABLES': '', 'PYTHONPATH': str(ROOT)}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip


def test_prediction_needs_none_of_the_packages_that_are_for_training():
    done = run_without((*TRAINING, 'highdicom'), LOAD)
    assert done.returncode == 0, done.stderr


def test_training_without_its_packages_names_what_brings_them(tmp_path):
    flags = ['--config=configs/transunet.py:tiny', f'--workdir={tmp_path}', '--stages=lungs']
    assert_one_line_error(run_without(TRAINING, MAIN, *flags), "'.[train]'")


def read_dockerfile():
    """Instruction -> what it says; of COPY all that is copied; `pip` -> the arguments of pip."""
    found = {'COPY': []}
    for line in (ROOT / 'Dockerfile').read_text().splitlines():
        if not line or line.startswith('#'):
            continue
        instruction, text = line.split(maxsplit=1)
        if instruction == 'COPY':
            found['COPY'] += text.split()[:-1]
        elif text.startswith('pip '):
            found['pip'] = shlex.split(text.partition('&&')[0])[1:]
        else:
            found[instruction] = text
    return found


def test_image_is_made_of_what_is_there_and_runs_as_no_root():
    made = read_dockerfile()
    assert made['COPY'] == SOURCES
    assert all((ROOT / name).exists() for name in SOURCES)
    ignored = (ROOT / '.dockerignore').read_text().split()
    assert {line[1:] for line in ignored if line.startswith('!')} == set(SOURCES)
    *options, package = made['pip']
    assert options == ['install', '--no-cache-dir']
    folder, extra = re.fullmatch(r'(.+)\[(\w+)\]', package).groups()
    assert folder == '/source'
    assert extra in PROJECT['optional-dependencies']
    least = re.fullmatch(r'>=3\.(\d+)', PROJECT['requires-python'])[1]
    assert int(re.fullmatch(r'python:3\.(\d+)-slim', made['FROM'])[1]) >= int(least)
    assert made['USER'] not in ('root', '0')
    assert json.loads(made['ENTRYPOINT']) == list(PROJECT['scripts'])


def copy_source(folder):
    """The package's sources, because setuptools leaves files where it builds."""
    names = subprocess.run(
        ['git', 'ls-files', '-z', *SOURCES], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split('\0')
    for name in filter(None, names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def test_package_has_its_model_and_its_command(scan, tmp_path):
    source, site = copy_source(tmp_path / 'source'), tmp_path / 'site'
    subprocess.run(
        [sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--target', site, source],
        check=True, capture_output=True,
    )  # fmt: skip
    done = subprocess.run(
        [site / 'bin' / 'covseg', f'--input={scan}', f'--output={tmp_path / "lesions"}'],
        cwd=tmp_path, env=os.environ | {'GLIBC_TUNABLES': '', 'PYTHONPATH': str(site)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f'{site}/covseg_jax/default_model' in done.stdout
    assert (tmp_path / 'lesions' / 'results.csv').read_text().count('\n') == 2


@pytest.mark.slow
def test_pip_installs_a_command_that_segments_a_scan(scan, tmp_path):
    source, environment = copy_source(tmp_path / 'source'), tmp_path / 'environment'
    venv.create(environment, with_pip=True)
    programs = environment / 'bin'
    subprocess.run(
        [programs / 'python', '-m', 'pip', 'install', '--quiet', source],
        check=True, capture_output=True,
    )  # fmt: skip
    listed = subprocess.run(
        [programs / 'python', '-m', 'pip', 'list'], check=True, capture_output=True, text=True
    ).stdout.split()
    assert 'grain' not in listed
    assert listed[listed.index('covseg_jax') + 1] == covseg_jax.__version__
    clean = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'XLA_FLAGS')}
    command = [programs / 'covseg', f'--input={scan}', f'--output={tmp_path / "lesions"}']
    done = subprocess.run(
        command, cwd=tmp_path, env=clean, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'lesions' / 'results.csv').read_text().count('\n') == 2
    helped = subprocess.run([*command, '--help'], env=clean, capture_output=True, text=True)
    assert '--model' in helped.stdout
    trained = subprocess.run(
        [programs / 'covseg', f'--config={ROOT}/configs/transunet.py:tiny', '--stages=lungs'],
        cwd=ROOT, env=clean, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert_one_line_error(trained, "'.[train]'")
    # As the image is made.
    more = [each.replace('/source', str(source)) for each in read_dockerfile()['pip']]
    subprocess.run([programs / 'pip', *more], check=True, capture_output=True)
    subprocess.run([programs / 'python', '-c', 'import highdicom'], check=True)
