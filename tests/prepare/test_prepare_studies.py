"""Prepared cases are right, kept while nothing changed, and never half-written."""

import contextlib
import dataclasses
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from covseg_jax.errors import InputError
from covseg_jax.imaging import geometry, nifti, studies
from covseg_jax.prepare import prepare_studies
from tests.benchmarks import prepare_study
from tests.imaging.chest import AFFINE, SHAPE, write_stored, write_study
from tests.settings import prepare_settings

SETTINGS = prepare_settings(grid=(16, 32, 32))


@pytest.fixture
def data_set(tmp_path):
    folder = tmp_path / 'data'
    write_study(folder, 'a')
    write_study(folder, 'b', lesion=False)
    return folder


def _prepare(data_set, **changes):
    options = {'num_workers': 0, **changes}
    settings = options.pop('settings', SETTINGS)
    found = studies.find_studies(data_set)
    return prepare_studies.prepare_studies(found, data_set.parent / 'prepared', settings, **options)


def test_case_in_memory_is_what_was_drawn(data_set):
    case = prepare_studies.prepare_volume(studies.find_studies(data_set)[0], SETTINGS)
    assert (case.image.dtype, case.lungs.dtype, case.lesion.dtype) == (
        np.float16,
        np.uint8,
        np.uint8,
    )
    assert case.image.shape == case.lungs.shape == case.lesion.shape == (16, 32, 32)
    assert (case.image[case.lungs == 0] == 0).all()
    # Window -1000..400: parenchyma (-850 + 1000) / 1400, opacity (-500 + 1000) / 1400.
    healthy = case.image[(case.lungs == 1) & (case.lesion == 0)]
    assert np.median(healthy) == pytest.approx(150 / 1400, abs=2e-3)
    assert case.image[case.lesion == 1].max() == pytest.approx(500 / 1400, abs=2e-3)
    # Two ellipsoids: 2 · 4/3 · π · 50 · 75 · 95 mm³; a sphere of radius 20 mm is 33.5 ml.
    assert case.lung_ml == pytest.approx(2 * 4 / 3 * np.pi * 50 * 75 * 95 / 1000, rel=0.03)
    assert case.lesion.sum() * case.geometry.voxel_ml == pytest.approx(33.5, rel=0.2)
    # Low x in an LAS file is the patient's right: the low half of canonical x.
    assert case.lesion[:, :, :16].sum() == case.lesion.sum()
    assert case.lesion.sum() > 0


def test_window_bounds_the_image_whatever_the_scan_holds(data_set):
    write_study(data_set, 'a', opacity_hu=3000)
    case = prepare_studies.prepare_volume(studies.find_studies(data_set)[0], SETTINGS)
    assert case.image.min() == 0
    assert case.image.max() == 1


def test_written_case_equals_the_case_in_memory(data_set):
    report = _prepare(data_set)
    assert (report.made, report.kept, report.bad) == (['a', 'b'], [], {})
    study = studies.find_studies(data_set)[0]
    case = prepare_studies.prepare_volume(study, SETTINGS)
    folder = data_set.parent / 'prepared' / 'a'
    for name in ('image', 'lungs', 'lesion'):
        written = np.load(folder / f'{name}.npy', mmap_mode='r', allow_pickle=False)
        np.testing.assert_array_equal(written, getattr(case, name))
    text = prepare_studies.read_geometry_file(folder)
    assert geometry.Geometry.from_json(text['geometry']) == case.geometry
    assert text['study_id'] == 'a'
    assert text['source_crc32'] == case.crc32 == nifti.source_crc32(study.image)
    assert text['settings']['grid'] == [16, 32, 32]
    assert text['lung_ml'] == pytest.approx(case.lung_ml)
    assert text['lesion_mask'] == str(study.lesion_mask)
    assert not (data_set.parent / 'prepared' / 'b' / 'lesion.npy').exists()


def test_second_run_keeps_what_is_unchanged_and_makes_what_is_not(data_set):
    _prepare(data_set)
    assert _prepare(data_set).kept == ['a', 'b']
    write_study(data_set, 'b', opacity_hu=-400, lesion=False)
    report = _prepare(data_set)
    assert (report.made, report.kept) == (['b'], ['a'])
    # The mask is a source too, and so is its absence.
    (data_set / 'a_mask.nii.gz').unlink()
    report = _prepare(data_set)
    assert (report.made, report.kept) == (['a'], ['b'])
    assert not (data_set.parent / 'prepared' / 'a' / 'lesion.npy').exists()
    wider = dataclasses.replace(SETTINGS, margin_mm=10.0)
    assert _prepare(data_set, settings=wider).made == ['a', 'b']
    (data_set.parent / 'prepared' / 'a' / 'geometry.json').write_text('{"cut')
    assert _prepare(data_set, settings=wider).made == ['a']


def test_bad_study_is_reported_and_the_others_are_made(data_set):
    content = bytearray((data_set / 'a.nii.gz').read_bytes())
    content[-6] ^= 1
    (data_set / 'a.nii.gz').write_bytes(content)
    report = _prepare(data_set)
    assert report.made == ['b']
    assert report.bad['a'].startswith('a.nii.gz: gzip CRC does not match')
    assert [path.name for path in (data_set.parent / 'prepared').iterdir()] == ['b']
    with pytest.raises(InputError, match=r'^a\.nii\.gz: gzip CRC'):
        _prepare(data_set, on_bad_study='stop')


def test_scan_without_lungs_is_refused_by_name(data_set):
    image = nifti.read_volume(data_set / 'a.nii.gz').as_stored.copy()
    image[10:-10, 10:-10] = 40
    write_stored(data_set / 'a.nii.gz', image, AFFINE)
    with pytest.raises(InputError, match=r'^a\.nii\.gz: no lungs found .*; give a chest CT'):
        prepare_studies.prepare_volume(studies.find_studies(data_set)[0], SETTINGS)


@pytest.mark.parametrize(
    ('mask', 'affine', 'words'),
    [
        (np.zeros((80, 64, 27), np.uint8), AFFINE, 'shape'),
        (np.zeros(SHAPE, np.uint8), AFFINE + 0.01 * np.eye(4), 'affine'),
        (np.full(SHAPE, 2, np.uint8), AFFINE, 'labels 2; only 0 and 1'),
    ],
)
def test_mask_that_does_not_fit_its_image_is_refused(data_set, mask, affine, words):
    write_stored(data_set / 'a_mask.nii.gz', mask, affine)
    with pytest.raises(InputError, match=rf'^a_mask\.nii\.gz: .*{words}'):
        prepare_studies.prepare_volume(studies.find_studies(data_set)[0], SETTINGS)


def test_lung_mask_file_is_used_where_the_settings_say_so(data_set):
    lungs = np.zeros(SHAPE, np.uint8)
    lungs[20:30, 30:40, 10:20], lungs[50:60, 30:40, 10:20] = 1, 2
    write_stored(data_set / 'a_lungs.nii.gz', lungs, AFFINE)
    settings = dataclasses.replace(SETTINGS, lungs_source='file')
    first, second = studies.find_studies(data_set)
    # 2000 voxels of 4 · 4 · 8 mm³
    assert prepare_studies.prepare_volume(first, settings).lung_ml == pytest.approx(256.0)
    with pytest.raises(InputError, match=r'^b\.nii\.gz: has no lung mask file'):
        prepare_studies.prepare_volume(second, settings)


@pytest.mark.parametrize(
    'change',
    [{'lungs_source': 'treshold'}, {'grid': (32, 128)}, {'window_hu': (400, -1000)}],
)
def test_settings_that_cannot_be_used_are_refused(change):
    with pytest.raises(InputError, match=next(iter(change))):
        prepare_settings(**change)


def test_failure_in_the_middle_of_writing_leaves_nothing_or_the_old_case(data_set, monkeypatch):
    target = data_set.parent / 'prepared'
    save = np.save

    def fail_on_lungs(path, array):
        if path.name == 'lungs.npy':
            raise OSError('disk full')
        save(path, array)

    monkeypatch.setattr(prepare_studies.np, 'save', fail_on_lungs)
    with pytest.raises(OSError, match='disk full'):
        _prepare(data_set)
    assert list(target.iterdir()) == []
    monkeypatch.setattr(prepare_studies.np, 'save', save)
    _prepare(data_set)
    monkeypatch.setattr(prepare_studies.np, 'save', fail_on_lungs)
    with pytest.raises(OSError, match='disk full'):
        _prepare(data_set, settings=dataclasses.replace(SETTINGS, margin_mm=10.0))
    monkeypatch.undo()
    assert sorted(path.name for path in target.iterdir()) == ['a', 'b']
    assert _prepare(data_set).kept == ['a', 'b']


PROGRAM = f"""
import signal, sys, time
from covseg_jax.prepare import prepare_studies
from covseg_jax.imaging import studies
if __name__ == '__main__':
    found = studies.find_studies(sys.argv[1])
    # A shell that puts the tests in the background has them ignore Ctrl-C, and so would this.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    print('started', flush=True)
    settings = prepare_studies.{SETTINGS}
    prepare_studies.prepare_studies(found, sys.argv[2], settings, num_workers=2)
"""
# The second worker is still starting when the first has made a case.
SLOW_START = """
else:
    try:
        open(sys.argv[2] + '.first', 'x')
    except FileExistsError:
        time.sleep(4)
"""


def _living_members(group):
    # A process that has ended and waits for a reaper (state Z) is not alive.
    members = []
    for file in pathlib.Path('/proc').glob('[0-9]*/stat'):
        with contextlib.suppress(OSError):
            state, _, member_group = file.read_text().rsplit(')', 1)[1].split()[:3]
            if int(member_group) == group and state != 'Z':
                members.append(file.parent.name)
    return members


def test_killed_run_leaves_nothing_half_made_and_the_next_one_finishes(data_set, tmp_path):
    for number in range(10):
        write_study(data_set, f's{number:03d}', lesion=False)
    (tmp_path / 'program.py').write_text(PROGRAM.replace('num_workers=2', 'num_workers=1'))
    target = tmp_path / 'prepared'
    process = subprocess.Popen(
        [sys.executable, tmp_path / 'program.py', data_set, target],
        stdout=subprocess.DEVNULL,
        env={**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)},
    )
    deadline = time.monotonic() + 60
    while not list(target.glob('[!.]*')) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    process.wait()
    host = socket.gethostname().replace('-', '_')
    # as a kill in the middle of writing leaves it, and as another process or another host has it
    (target / f'.tmp-{host}-{process.pid}-s009').mkdir(exist_ok=True)
    others = [f'.tmp-{host}-{os.getppid()}-s009', f'.tmp-other-{process.pid}-s009']
    for name in others:
        (target / name).mkdir()
    done = sorted(path.name for path in target.glob('[!.]*'))
    assert 0 < len(done) < 12
    report = _prepare(data_set)
    assert report.kept == done
    assert len(report.made) == 12 - len(done)
    assert {path.name for path in target.glob('.tmp*')} == set(others)


def test_killed_parent_leaves_no_worker(data_set, tmp_path):
    for number in range(40):
        write_study(data_set, f's{number:03d}', lesion=False)
    (tmp_path / 'program.py').write_text(PROGRAM)
    process = subprocess.Popen(
        [sys.executable, tmp_path / 'program.py', data_set, tmp_path / 'prepared'],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)},
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not list((tmp_path / 'prepared').glob('[!.]*')) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert _living_members(process.pid)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while _living_members(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert _living_members(process.pid) == []


def test_of_two_studies_with_one_image_one_is_set_aside(data_set):
    # The copy is another file: of float32, and with its first axis the other way round.
    volume = nifti.read_volume(data_set / 'a.nii.gz')
    flip = np.diag([-1.0, 1.0, 1.0, 1.0])
    flip[0, 3] = len(volume.as_stored) - 1
    flipped = volume.as_stored[::-1].astype(np.float32)
    write_stored(data_set / 'copy.nii.gz', flipped, volume.affine @ flip)
    report = _prepare(data_set)
    assert report.made == ['a', 'b']
    assert report.bad == {'copy': 'copy.nii.gz: the same image as study a; remove one of the two'}
    assert not (data_set.parent / 'prepared' / 'copy').exists()


def test_disk_that_is_too_small_is_told_before_the_work(data_set, monkeypatch):
    usage = shutil.disk_usage('/')._replace(free=1000)
    monkeypatch.setattr(prepare_studies.shutil, 'disk_usage', lambda _: usage)
    with pytest.raises(InputError, match=r'2 cases need 0\.0 GB.*; make room'):
        _prepare(data_set)


def test_case_of_a_study_that_was_spoilt_since_is_gone(data_set):
    _prepare(data_set)
    (data_set / 'a.nii.gz').write_bytes(b'spoilt')
    assert list(_prepare(data_set).bad) == ['a']
    assert [path.name for path in (data_set.parent / 'prepared').iterdir()] == ['b']


@pytest.mark.parametrize('name', ['slice_01.dcm', 'notes.txt'])
def test_folder_that_is_no_prepared_case_is_left_and_named(data_set, name):
    if name == 'notes.txt':  # in a case's own folder
        _prepare(data_set)
    folder = data_set.parent / 'prepared' / 'a'
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text('mine')
    (data_set / 'a.nii.gz').write_bytes(b'spoilt')
    with pytest.raises(InputError, match=r'a: is in the way.*data.prepared'):
        _prepare(data_set)
    assert (folder / name).read_text() == 'mine'


@pytest.mark.skipif(not pathlib.Path('/proc/self/stat').exists(), reason='reads /proc')
def test_interrupt_leaves_whole_cases_and_no_process(data_set, tmp_path):
    for number in range(22):
        write_study(data_set, f's{number:03d}', lesion=False)
    (tmp_path / 'program.py').write_text(PROGRAM + SLOW_START)
    target = tmp_path / 'prepared'
    process = subprocess.Popen(
        [sys.executable, tmp_path / 'program.py', data_set, target],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # the signal goes to this group, as from a terminal
        env={**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)},
    )
    deadline = time.monotonic() + 60
    while not list(target.glob('[!.]*')) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert errors.count('KeyboardInterrupt') == 1, errors  # the parent's alone
    while _living_members(process.pid) and time.monotonic() < deadline:
        time.sleep(0.02)  # multiprocessing's resource tracker ends a moment after its parent
    assert _living_members(process.pid) == []
    assert list(target.glob('.tmp*')) == []
    done = [path.name for path in target.iterdir()]
    assert 0 < len(done) < 24
    assert all((target / name / 'geometry.json').is_file() for name in done)
    report = _prepare(data_set)
    assert report.kept == sorted(done)
    assert len(report.made) == 24 - len(done)


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_memory_is_bounded_by_the_scan(tmp_path):
    image = prepare_study.write_large(tmp_path, (512, 512, 160))
    megabytes = 2 * 512 * 512 * 160 / 1e6
    assert 1000 * prepare_study.measure_peak_gb(image) < 3 * megabytes + 300
