"""Models side by side, as a person asks for it: phantoms, real scans, the table, and its faults."""

import csv
import dataclasses
import pathlib

import pytest

from covseg_jax.predict import default
from launch import measure
from tests.evaluation.test_model_scores import MODEL, mark_opacity
from tests.imaging.chest import write_study

TINY = {'shape': (64, 64, 20), 'spacing_mm': (5.25, 5.25, 16.0)}


@pytest.fixture
def models(tmp_path):
    """Folders that pass for exports, though none can be loaded."""
    for name in 'ab':
        (tmp_path / name).mkdir()
        (tmp_path / name / 'SHA256SUMS').touch()
    return [str(tmp_path / name) for name in 'ab']


@pytest.fixture
def asked(monkeypatch):
    """The model of each study that is predicted; models are stand-ins, and phantoms small."""
    asked, make = [], measure.make_phantoms

    def load(path):
        def mark(image, lungs):
            asked.append(path.name)
            return mark_opacity(image, lungs)

        return dataclasses.replace(MODEL, probabilities=(mark,), identity=path.name)

    def make_tiny(folder, num, seed, **grid):
        assert grid == {'shape': (192, 192, 40), 'spacing_mm': (1.75, 1.75, 8.0)}
        return make(folder, num, seed, **TINY)

    monkeypatch.setattr(measure, 'load_model', load)
    monkeypatch.setattr(measure, 'make_phantoms', make_tiny)
    return asked


def test_models_are_measured_on_phantoms_and_real_scans_once(models, asked, tmp_path, capsys):
    write_study(tmp_path / 'slices', 'p1')
    write_study(tmp_path / 'healthy', 'h1', lesion=False)
    flags = [
        f'--real_slices={tmp_path / "slices"}', f'--healthy={tmp_path / "healthy"}',
        '--phantoms=1', '--num_workers=0',
    ]  # fmt: skip
    folder = tmp_path / 'measured'
    assert measure.main([str(folder), models[0], *flags]) == 0
    before = (folder / 'scores.csv').read_text()
    with (folder / 'scores.csv').open(newline='') as file:
        rows = list(csv.DictReader(file))
    assert [(row['set'], row['study_id'], row['status']) for row in rows] == [
        ('phantoms', 'study_0001', 'ok'), ('healthy_phantoms', 'study_0001', 'ok'),
        ('real_slices', 'p1', 'ok'), ('healthy_scans', 'h1', 'ok'),
    ]  # fmt: skip
    assert float(rows[0]['true_ml']) > 0
    # Another model beside it: the first is not asked again.
    capsys.readouterr()
    assert measure.main([str(folder), *models, *flags]) == 0
    assert asked == ['a'] * 4 + ['b'] * 4
    assert (folder / 'scores.csv').read_text().startswith(before)
    printed = capsys.readouterr().out
    assert (folder / 'table.md').read_text() in printed
    names = [line.split('|')[1:3] for line in printed.splitlines() if line.startswith('| ')]
    assert [tuple(map(str.strip, each)) for each in names[1:]] == [
        ('phantoms', 'a'), ('phantoms', 'b'), ('real', 'a'), ('real', 'b')
    ]  # fmt: skip


def test_what_cannot_be_measured_is_said_in_one_line(models, tmp_path, capsys):
    def fault(*arguments):
        assert measure.main([str(tmp_path / 'out'), *map(str, arguments), '--phantoms=0']) == 1
        line = capsys.readouterr().err
        assert line.startswith('error: ')
        assert line.count('\n') == 1
        return line

    good = models[0]
    assert 'named twice' in fault(good, good)
    assert 'nor an export' in fault(tmp_path)
    assert 'give --real_slices or --healthy' in fault(good)
    write_study(tmp_path / 'healthy', 'h1', lesion=False)
    assert 'has a lesion mask' in fault(good, f'--real_slices={tmp_path / "healthy"}')
    healthy = f'--healthy={tmp_path / "healthy"}'
    assert 'SHA256SUMS: says nothing of model.json' in fault(good, healthy)
    (tmp_path / 'out' / 'table.md').write_text('mine')
    assert 'table.md: is in the way' in fault(good, healthy)


def test_runs_of_one_recipe_are_a_row(tmp_path):
    for name in ('a/export/SHA256SUMS', 'b_0/SHA256SUMS', 'b_1/transunet/config.json'):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    named = measure.name_models([f'{tmp_path}/a/export/', f'{tmp_path}/b_0,{tmp_path}/b_1'])
    assert named == {
        'a/export': {'a/export': (tmp_path / 'a' / 'export',)},
        'b_0,b_1': {'b_0': (tmp_path / 'b_0',), 'b_1': (tmp_path / 'b_1',)},
    }


def test_averaged_models_are_one_run(models, asked, tmp_path, capsys):
    (tmp_path / 'c+d').mkdir()
    (tmp_path / 'c+d' / 'SHA256SUMS').touch()
    a, b = map(pathlib.Path, models)
    named = measure.name_models([f'{a}+{b},{b}', f'{a}', f'{tmp_path}/c+d'])
    assert named == {
        'a+b,b': {'a+b': (a, b), 'b': (b,)}, 'a': {'a': (a,)}, 'c+d': {'c+d': (tmp_path / 'c+d',)}
    }  # fmt: skip
    write_study(tmp_path / 'slices', 'p1')
    flags = [f'--real_slices={tmp_path / "slices"}', '--phantoms=0', '--num_workers=0']
    assert measure.main([str(tmp_path / 'out'), f'{a}+{b}', *flags]) == 0
    assert sorted(asked) == ['a', 'b']
    assert '| a+b ' in capsys.readouterr().out
    assert measure.main([str(tmp_path / 'out'), f'{a}+{a}', *flags]) == 1
    assert capsys.readouterr().err.startswith(f'error: {a}: is named twice')
    # Each network weighs as much as another, as in `predict --model=default,a`.
    (of_default,) = measure.name_models([f'default+{a}']).values()
    assert list(of_default.values()) == [(*default.MEMBERS, a)]
