"""Runs that are killed and stopped, again and again, against one that was left alone."""

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.program import COMPILED_QUICKLY

ROOT = pathlib.Path(__file__).parents[1]
# Log, evaluation and saves fall on different steps; dropout, augmentation, averaged weights and a
# plateau that cuts are on.
SETTINGS = {
    'gan': {
        'gan.num_steps': 300,
        'gan.log_every': 7,
        'gan.evaluate_every': 33,
        'gan.save_every': 6,
    },
    'train': {
        'train.num_steps': 300,
        'train.log_every': 7,
        'train.evaluate_every': 33,
        'train.save_every': 6,
        'train.schedule': 'plateau',
        'train.plateau_patience': 0,
        'network.dropout_rate': 0.1,
    },
}
ENVIRONMENT = os.environ | {'XLA_FLAGS': COMPILED_QUICKLY}  # one device
# A process that is killed may leave half a program in the tests' cache: they have one of their own.
_CACHE = tempfile.TemporaryDirectory(prefix='covseg_jax_killed_')  # removed at the end
ENVIRONMENT['JAX_COMPILATION_CACHE_DIR'] = _CACHE.name
FOLDERS = {'gan': 'gan', 'train': 'transunet'}


def start(workdir, stages):
    fields = [f'--config.{key}={value}' for key, value in SETTINGS.get(stages, {}).items()]
    return subprocess.Popen(
        [
            sys.executable, '-m', 'covseg_jax.main', '--config=configs/transunet.py:tiny',
            f'--workdir={workdir}', f'--stages={stages}', *fields,
        ],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def finish(workdir, stages):
    process = start(workdir, stages)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return out, err


def wait_for_steps(process, log):
    """Until the run logs a step, or ends."""
    size = log.stat().st_size if log.exists() else 0
    while process.poll() is None and (not log.exists() or log.stat().st_size <= size):
        time.sleep(0.005)


def losses(folder):
    rows = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith('speed/')} for row in rows]


def newest_state(folder):
    steps = [int(path.name) for path in (folder / 'checkpoints').iterdir() if path.name.isdigit()]
    path = folder / 'checkpoints' / str(max(steps)) / 'state'
    flat = ocp.StandardCheckpointer().restore(path.resolve())
    return max(steps), flat


def assert_same_run(workdir, alone, stage):
    folder, expected = workdir / FOLDERS[stage], alone / FOLDERS[stage]
    assert losses(folder) == losses(expected)
    (step, state), (expected_step, expected_state) = map(newest_state, (folder, expected))
    assert step == expected_step
    for (path, found), (_, wanted) in zip(
        *(sorted(_leaves(each)) for each in (state, expected_state)), strict=True
    ):
        np.testing.assert_array_equal(found, wanted, err_msg=path)
    left = [p for p in workdir.rglob('*') if '.tmp-' in p.name or 'checkpoint-tmp' in p.name]
    assert not left
    assert not processes_of(workdir)


def _leaves(tree, prefix=''):
    if isinstance(tree, dict | list):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for key, value in items:
            yield from _leaves(value, f'{prefix}/{key}')
    elif tree is not None:
        yield prefix, np.asarray(tree)


def processes_of(workdir):
    found = []
    for path in pathlib.Path('/proc').glob('[0-9]*/cmdline'):
        try:
            if str(workdir).encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:  # it ended meanwhile
            continue
    return found


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    """A work directory with everything before the network's training, and one run of each stage."""
    workdir = tmp_path_factory.mktemp('survival') / 'base'
    finish(workdir, 'prepare,gan,synthesize')
    shutil.rmtree(workdir / 'gan')
    shutil.rmtree(workdir / 'manifests')
    return workdir


def begin_beside_one_left_alone(base, stage, name):
    """A fresh work directory for a stage, and one in which it ran without a break."""
    workdir, alone = (base.parent / f'{stage}-{each}' for each in (name, 'alone'))
    if not alone.exists():
        shutil.copytree(base, alone)
        finish(alone, stage)
    shutil.copytree(base, workdir)
    return workdir, alone


@pytest.mark.slow
@pytest.mark.parametrize('stage', ['gan', 'train'])
def test_run_killed_twenty_times_ends_in_the_same_bits(base, stage):
    workdir, alone = begin_beside_one_left_alone(base, stage, 'killed')
    rng = random.Random(0)
    log, kills, in_save = workdir / FOLDERS[stage] / 'metrics.jsonl', 0, 0
    while True:
        process = start(workdir, stage)
        if rng.random() < 0.8:
            wait_for_steps(process, log)
            time.sleep(rng.uniform(0, 0.15))
        else:  # anywhere, starting included
            time.sleep(rng.uniform(0, 6))
        if process.poll() is not None or kills >= 24:
            break
        process.kill()
        process.communicate()
        kills += 1
        in_save += any('checkpoint-tmp' in p.name for p in log.parent.rglob('*'))
    process.communicate()
    finish(workdir, stage)
    print(f'{stage}: {kills} kills, {in_save} of them while a checkpoint was being written')
    assert kills >= 20
    assert_same_run(workdir, alone, stage)


@pytest.mark.slow
@pytest.mark.parametrize('stage', ['gan', 'train'])
def test_run_stopped_five_times_ends_in_the_same_bits(base, stage):
    workdir, alone = begin_beside_one_left_alone(base, stage, 'stopped')
    log = workdir / FOLDERS[stage] / 'metrics.jsonl'
    for number in range(5):
        process = start(workdir, stage)
        wait_for_steps(process, log)
        process.send_signal(signal.SIGTERM if number % 2 else signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0
        assert 'stopped and saved at step' in err
        assert 'run the same command again' in err
    finish(workdir, stage)
    assert_same_run(workdir, alone, stage)
