"""Ctrl-C, and the same command again."""

import json
import signal
import subprocess
import time

import pytest

from tests.program import ROOT, command, environment, run


@pytest.mark.slow  # what a training does when it is told to stop is tested by test_loop.py, too
def test_main_stopped_by_ctrl_c_goes_on(own_tiny_run, tmp_path):
    flags = (
        '--config=configs/transunet.py:tiny',
        f'--workdir={tmp_path}',
        f'--config.data.prepared={own_tiny_run / "prepared"}',
        '--stages=gan',
        '--config.gan.num_steps=80',
        '--config.gan.save_every=1000',
        '--config.gan.evaluate_every=40',
        '--config.gan.adversarial_every=0',  # one program to compile in place of two
    )
    process = subprocess.Popen(
        command(*flags), cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True
    )
    log = tmp_path / 'gan' / 'metrics.jsonl'
    deadline = time.monotonic() + 600
    while not (log.exists() and log.read_text().count('\n') >= 3):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=300) == 0
    assert 'run the same command again' in process.stderr.read()
    stopped_at = max(int(p.name) for p in (tmp_path / 'gan' / 'checkpoints').iterdir())
    assert 0 < stopped_at < 80
    done = run(*flags)
    assert done.returncode == 0, done.stderr
    steps = [
        row['step'] for row in map(json.loads, log.read_text().splitlines()) if 'loss/total' in row
    ]
    assert steps == list(range(2, 81, 2))


def test_main_predict_stopped_by_ctrl_c_says_how_to_go_on_and_does(own_tiny_run, tmp_path):
    scan = next((own_tiny_run / 'studies' / 'studies' / 'CT-1').iterdir())
    (tmp_path / 'scans').mkdir()
    for number in range(16):
        (tmp_path / 'scans' / f'study_{number:02d}.nii.gz').symlink_to(scan)
    flags = ('--config=configs/transunet.py:tiny', f'--workdir={own_tiny_run}', '--stages=predict',
             f'--input={tmp_path / "scans"}', f'--output={tmp_path / "masks"}')  # fmt: skip
    process = subprocess.Popen(
        command(*flags), cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True
    )
    journal = tmp_path / 'masks' / 'results.0.jsonl'
    while not journal.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=300) == 130
    assert 'run it again with --resume' in process.stderr.read()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / 'masks').glob('*_mask.nii.gz')}
    assert 0 < len(before) < 16
    done = run(*flags, '--resume')
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / 'masks').glob('*_mask.nii.gz'))) == 16
    assert {path: path.stat().st_mtime_ns for path in before} == before
