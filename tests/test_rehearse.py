"""The rehearsal is of the default run: what it overrides, and what it makes of its times."""

import json
import pathlib
import subprocess
import sys
import time

import pytest

from configs import transunet
from launch import rehearse

# Steps, batches, places; and attention, which published weights need.
OVERRIDDEN = {
    'gan.num_steps', 'gan.batch_size', 'gan.log_every', 'train.num_steps', 'train.batch_size',
    'train.epoch_steps', 'train.contrastive_steps', 'train.log_every', 'data.folder',
    'network.published_attention',
}  # fmt: skip


def test_rehearsal_overrides_steps_batches_and_places_alone(tmp_path):
    steps = rehearse.list_steps(tmp_path)
    assert list(steps)[:5] == transunet.get_config().stages.split(',')
    flags = [flag for each in steps.values() for flag in each]
    fields = {flag.split('=')[0].removeprefix('--config.') for flag in flags if '--config.' in flag}
    assert fields == OVERRIDDEN
    assert {flag for flag in flags if flag.startswith('--config=')} == {
        '--config=configs/transunet.py'
    }


def test_time_for_mosmed_is_of_all_its_studies_and_the_default_steps(tmp_path):
    assert rehearse.seconds_for_mosmed(tmp_path, 'prepare', 24.0) == pytest.approx(24 / 12 * 1110)
    assert rehearse.seconds_for_mosmed(tmp_path, 'export', 24.0) is None
    log = tmp_path / 'run' / 'transunet' / 'metrics.jsonl'
    log.parent.mkdir(parents=True)
    rows = [{'speed/steps_per_s': speed} for speed in (0.01, 0.5, 0.5, 0.5)]  # the first compiles
    log.write_text('\n'.join(map(json.dumps, rows)))
    config = transunet.get_config().train
    expected = config.num_steps * 2.0 * config.batch_size / rehearse.TRAIN_BATCH
    assert rehearse.seconds_for_mosmed(tmp_path, 'train', 99.0) == pytest.approx(expected)


@pytest.mark.skipif(not pathlib.Path('/proc/self/smaps_rollup').exists(), reason='reads /proc')
def test_memory_is_of_a_process_and_those_that_it_started():
    # The child starts one of its own, that holds 100 MB.
    program = "held = bytearray(100_000_000); held[::4096] = b'x' * len(held[::4096]); input()"
    starts = f'import subprocess, sys; subprocess.run([sys.executable, "-c", {program!r}])'
    with subprocess.Popen([sys.executable, '-c', starts], stdin=subprocess.PIPE) as child:
        deadline = time.monotonic() + 60
        while sum(map(rehearse._proportional_bytes, rehearse._process_tree(child.pid))) < 1e8:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert len(rehearse._process_tree(child.pid)) == 2
        child.communicate(b'\n')
