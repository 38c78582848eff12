"""Models side by side, as a person asks for it: phantoms, real scans, the table, and its faults."""

import csv
import shutil

import pytest

from configs import transunet
from covseg_jax.imaging.masks import MaskSettings
from launch import measure
from tests.imaging.chest import write_study
from tests.predict.test_export import make_variables, write

TINY = {'shape': (64, 64, 20), 'spacing_mm': (5.25, 5.25, 16.0)}


@pytest.fixture(scope='module')
def exports(tmp_path_factory):
    """Two networks that were never trained: the cuts divide their answers."""
    config, folder = transunet.get_config('tiny').unlock(), tmp_path_factory.mktemp('exports')
    for name, seed in (('a', 1), ('b', 2)):
        write(config, make_variables(config, seed), folder / name, masks=MaskSettings(0.4, 0.4, 0))
    return folder


@pytest.fixture
def phantoms(monkeypatch):
    """Phantoms that are quick to make."""
    make = measure.make_phantoms
    monkeypatch.setattr(
        measure, 'make_phantoms', lambda folder, num, **_: make(folder, num, **TINY)
    )


@pytest.mark.usefixtures('phantoms')
def test_exports_are_measured_on_phantoms_and_real_scans_once(exports, tmp_path, capsys):
    write_study(tmp_path / 'slices', 'p1')
    write_study(tmp_path / 'healthy', 'h1', lesion=False)
    flags = [
        f'--real_slices={tmp_path / "slices"}', f'--healthy={tmp_path / "healthy"}',
        '--phantoms=1', '--num_workers=0',
    ]  # fmt: skip
    folder = tmp_path / 'measured'
    assert measure.main([str(folder), str(exports / 'a'), *flags]) == 0
    before = (folder / 'scores.csv').read_text()
    with (folder / 'scores.csv').open(newline='') as file:
        rows = list(csv.DictReader(file))
    assert [(row['set'], row['study_id'], row['status']) for row in rows] == [
        ('phantoms', 'study_0001', 'ok'), ('healthy_phantoms', 'study_0001', 'ok'),
        ('real_slices', 'p1', 'ok'), ('healthy_scans', 'h1', 'ok'),
    ]  # fmt: skip
    assert float(rows[0]['true_ml']) > 0
    # Another model beside it: the first is not asked again.
    shutil.copytree(exports, tmp_path / 'moved')
    (tmp_path / 'moved' / 'a' / 'function_tpu.bin').touch()
    models = [str(tmp_path / 'moved' / name) for name in 'ab']
    capsys.readouterr()
    assert measure.main([str(folder), *models, *flags]) == 0
    assert (folder / 'scores.csv').read_text().startswith(before)
    printed = capsys.readouterr().out
    assert (folder / 'table.md').read_text() in printed
    names = [line.split('|')[1:3] for line in printed.splitlines() if line.startswith('| ')]
    assert [tuple(map(str.strip, each)) for each in names[1:]] == [
        ('phantoms', 'a'), ('phantoms', 'b'), ('real', 'a'), ('real', 'b')
    ]  # fmt: skip


@pytest.mark.usefixtures('phantoms')
def test_what_cannot_be_measured_is_said_in_one_line(exports, tmp_path, capsys):
    def fault(*arguments):
        assert measure.main([str(tmp_path / 'out'), *map(str, arguments), '--phantoms=0']) == 1
        line = capsys.readouterr().err
        assert line.startswith('error: ')
        assert line.count('\n') == 1
        return line

    good = exports / 'a'
    assert 'named twice' in fault(good, good)
    assert 'nor an export' in fault(exports)
    assert 'give --real_slices or --healthy' in fault(good)
    write_study(tmp_path / 'healthy', 'h1', lesion=False)
    assert 'has a lesion mask' in fault(good, f'--real_slices={tmp_path / "healthy"}')
    (tmp_path / 'out').mkdir(exist_ok=True)
    (tmp_path / 'out' / 'table.md').write_text('mine')
    assert 'table.md: is in the way' in fault(good, f'--healthy={tmp_path / "healthy"}')


def test_runs_of_one_recipe_are_a_row(tmp_path):
    for name in ('a/export/SHA256SUMS', 'b_0/SHA256SUMS', 'b_1/transunet/config.json'):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    named = measure.name_models([f'{tmp_path}/a/export/', f'{tmp_path}/b_0,{tmp_path}/b_1'])
    assert named == {
        'a/export': {'a/export': tmp_path / 'a' / 'export'},
        'b_0,b_1': {'b_0': tmp_path / 'b_0', 'b_1': tmp_path / 'b_1'},
    }
