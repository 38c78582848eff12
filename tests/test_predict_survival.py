"""A hundred studies in one call, killed twice, resumed: all there, none done twice."""

import collections
import csv
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import pytest

from configs import transunet
from covseg_jax.imaging import nifti
from covseg_jax.imaging.masks import MaskSettings
from covseg_jax.phantom import studies as phantom
from covseg_jax.predict import export
from covseg_jax.prepare.prepare_studies import PrepareSettings
from covseg_jax.segmentation import train as segmentation

ROOT = pathlib.Path(__file__).parents[1]
NUM_STUDIES, BROKEN = 100, (7, 50, 93)
ENVIRONMENT = os.environ | {'XLA_FLAGS': ''}  # one device
# A process that is killed may leave half a program in the tests' cache: they have one of their own.
_CACHE = tempfile.TemporaryDirectory(prefix='covseg_jax_killed_')  # removed at the end
ENVIRONMENT['JAX_COMPILATION_CACHE_DIR'] = _CACHE.name


def write_studies(folder):
    """A hundred phantoms; three of their files are broken, each in another way."""
    data = folder.parent / 'data'
    phantom.write_phantom_data_set(
        data, num_healthy=10, num_covid=90, num_masked=0, seed=0, shape=(256, 256, 32),
        spacing_mm=(1.3, 1.3, 10.0), num_workers=2,
    )  # fmt: skip
    folder.mkdir()
    for number, path in enumerate(sorted(data.rglob('study_*.nii.gz'))):
        target = folder / f'study_{number:04d}.nii.gz'
        shutil.move(path, target)
        content = bytearray(target.read_bytes())
        if number == BROKEN[0]:
            target.write_bytes(content[: len(content) // 2])
        elif number == BROKEN[1]:
            content[len(content) // 2] ^= 1
            target.write_bytes(content)
        elif number == BROKEN[2]:
            target.write_bytes(b'not a scan')


def write_model(folder):
    config = transunet.get_config('phantom')
    network = segmentation.make_network(config)
    image = np.zeros((1, *config.prepare.grid[1:], 1), np.float32)

    # Of fresh weights the probability lies near that of `initial_logit`.
    export.write_export(
        folder,
        network,
        jax.jit(network.init)(jax.random.key(0), image),
        export.Exported(
            PrepareSettings(**config.prepare),
            segmentation.volume_settings(config),
            MaskSettings(0.0475, 0.0475, 0.1),
            {'licence': 'none'},
        ),
    )


def start(tmp_path, *flags):
    return subprocess.Popen(
        [
            sys.executable, '-m', 'covseg_jax.main', f'--model={tmp_path / "export"}',
            f'--input={tmp_path / "scans"}', f'--output={tmp_path / "masks"}', *flags,
        ],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def read_journal(tmp_path):
    path = tmp_path / 'masks' / 'results.0.jsonl'
    text = path.read_text() if path.exists() else ''
    return [json.loads(line) for line in text.splitlines() if line.endswith('}')]


def wait_for(process, tmp_path, number):
    while len(read_journal(tmp_path)) < number:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)


def resident_mb(process):
    """Of the process and its children together."""
    parents, sizes = {}, {}
    for path in pathlib.Path('/proc').glob('[0-9]*'):
        try:
            fields = (path / 'stat').read_text().rsplit(')', 1)[1].split()
        except OSError:  # it ended meanwhile
            continue
        parents[int(path.name)], sizes[int(path.name)] = int(fields[1]), int(fields[21])
    family = {process.pid}
    for _ in range(3):
        family |= {pid for pid, parent in parents.items() if parent in family}
    return sum(sizes.get(pid, 0) for pid in family) * os.sysconf('SC_PAGE_SIZE') / 1e6


@pytest.mark.slow
def test_hundred_studies_killed_twice_are_all_there_and_none_is_done_twice(tmp_path):
    write_studies(tmp_path / 'scans')
    write_model(tmp_path / 'export')
    for number, flags in ((12, ()), (30, ('--resume',))):
        process = start(tmp_path, *flags)
        wait_for(process, tmp_path, number)
        process.kill()
        process.communicate()
        time.sleep(1)  # its children follow it
    kept = {
        entry['study_id']: (tmp_path / 'masks' / entry['row']['mask']).stat().st_mtime_ns
        for entry in read_journal(tmp_path)
    }
    began = time.monotonic()
    process = start(tmp_path, '--resume')
    first_ten, rest = 0.0, 0.0
    while process.poll() is None:
        done = len(read_journal(tmp_path)) - len(kept)
        if done <= 10:
            first_ten = max(first_ten, resident_mb(process))
        else:
            rest = max(rest, resident_mb(process))
        time.sleep(0.1)
    seconds = (time.monotonic() - began) / (NUM_STUDIES - len(kept))
    _, err = process.communicate()
    assert process.returncode == 1
    (line,) = [each for each in err.splitlines() if each.startswith('error: ')]
    names = [f'study_{number:04d}' for number in range(NUM_STUDIES)]
    broken = [names[number] for number in BROKEN]
    assert '3 of 100 studies set aside' in line
    assert all(f'{name}.nii.gz' in line for name in broken)

    with (tmp_path / 'masks' / 'results.csv').open() as file:
        rows = list(csv.DictReader(file))
    assert [row['study_id'] for row in rows] == names
    assert [row['study_id'] for row in rows if row['status'] != 'ok'] == broken
    for row in rows:
        if row['status'] != 'ok':
            continue
        mask = nifti.read_volume(tmp_path / 'masks' / row['mask'])
        scan = nifti.read_volume(tmp_path / 'scans' / f'{row["study_id"]}.nii.gz')
        assert mask.lies_on_grid_of(scan)
        assert float(row['lesion_ml']) == pytest.approx(
            mask.as_stored.sum() * mask.voxel_ml, abs=1e-3
        )
    times_done = collections.Counter(entry['study_id'] for entry in read_journal(tmp_path))
    assert times_done == dict.fromkeys(set(names) - set(broken), 1)
    for name, written in kept.items():
        assert (tmp_path / 'masks' / f'{name}_mask.nii.gz').stat().st_mtime_ns == written
    assert not list((tmp_path / 'masks').glob('.tmp-*'))
    print(
        f'{len(kept)} were done before; {seconds:.2f} s a study after; '
        f'{first_ten:.0f} MB in the first ten, {rest:.0f} MB in the rest'
    )
    assert rest < 1.5 * first_ten
