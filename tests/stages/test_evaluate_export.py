"""Any data set with masks: scored by an export, and by a work directory, without healthy scans."""

import csv
import json
import pathlib

import numpy as np
import pytest

import covseg_jax
from configs import transunet
from covseg_jax import written
from covseg_jax.errors import InputError
from covseg_jax.evaluation import evaluate_cases
from covseg_jax.imaging.masks import MaskSettings
from covseg_jax.stages import inputs, pipeline
from covseg_jax.stages.inputs import Request
from covseg_jax.stages.on_request import ON_INPUT
from tests.imaging.chest import AFFINE, draw_chest, write_stored
from tests.predict.test_export import make_variables, write

# Of a layout's study: its image, its lesion mask.
LAYOUTS = {
    'plain': ('{}.nii.gz', '{}_mask.nii.gz'),
    'nnunet': ('imagesTr/{}_0000.nii.gz', 'labelsTr/{}.nii.gz'),
    'zenodo': ('COVID-19-CT-Seg_20cases/{}.nii.gz', 'Infection_Mask/{}.nii.gz'),
    'covid19_20': ('volume-covid19-A-{}_ct.nii.gz', 'volume-covid19-A-{}_seg.nii.gz'),
}


def write_data_set(folder, layout, masked=('p1_a', 'p1_b', 'p2_a'), label=1):
    """Studies with masks in a layout, and one without."""
    image_name, mask_name = LAYOUTS[layout]
    if layout == 'zenodo':
        (folder / 'Lung_Mask').mkdir(parents=True)
    for name in (*masked, 'p3_a'):
        image, opacity = draw_chest(name)
        write_stored(folder / image_name.format(name), image, AFFINE)
        if name in masked:
            mask = (label * opacity).astype(np.uint8)
            write_stored(folder / mask_name.format(name), mask, AFFINE)
    return folder


@pytest.fixture(scope='module')
def config():
    return transunet.get_config('tiny').unlock()


@pytest.fixture(scope='module')
def export(config, tmp_path_factory):
    """A network that was never trained: the cut divides its answers."""
    folder = tmp_path_factory.mktemp('run') / 'export'
    return write(config, make_variables(config, 1), folder, masks=MaskSettings(0.4, 0.4, 0.0))


@pytest.fixture
def undrawn(monkeypatch):
    """Evaluations without pictures, which take the time."""
    for module, name in (
        *(
            (evaluate_cases.figures, f'plot_{each}')
            for each in ('agreement', 'calibration', 'overlay')
        ),
        (evaluate_cases.tensorboard, 'write_board'),
        (evaluate_cases.report, 'write_report'),
    ):
        monkeypatch.setattr(module, name, lambda *_: None)
    monkeypatch.setattr(evaluate_cases.figures, 'plot_against_infection', lambda *_: [])


def evaluate(config=None, **given):
    ON_INPUT['evaluate'](config, pathlib.Path('no_workdir'), Request(num_workers=1, **given))


def read_rows(folder, name='cases.csv'):
    with (folder / name).open(newline='') as file:
        return list(csv.DictReader(file))


def test_evaluation_of_an_export_has_all_that_a_runs_has(export, tmp_path):
    data, output = write_data_set(tmp_path / 'data', 'plain'), tmp_path / 'scores'
    evaluate(model=str(export), input=data, output=output)
    assert {path.name for path in output.iterdir() if path.name != written.RECORD} == {
        'prepared', 'cases.csv', 'slices.csv', 'summary.json', 'report.html', 'figures',
        'tensorboard',
    }  # fmt: skip
    report = (output / 'report.html').read_text()
    assert 'p2_a' in report
    assert str(export) in report
    # Again, which replaces it; but not what somebody changed in it since.
    evaluate(model=str(export), input=data, output=output)
    assert len(list((output / 'tensorboard').glob('events*'))) == 1
    (output / 'cases.csv').write_text('mine')
    with pytest.raises(InputError, match=r'cases\.csv: is in the way'):
        evaluate(model=str(export), input=data, output=output)
    assert (output / 'cases.csv').read_text() == 'mine'


@pytest.mark.usefixtures('undrawn')
@pytest.mark.parametrize('layout', LAYOUTS)
def test_export_is_evaluated_on_any_layout_without_a_config(export, tmp_path, layout):
    data, output = write_data_set(tmp_path / 'data', layout), tmp_path / 'scores'
    evaluate(model=str(export), input=data, output=output)
    summary = json.loads((output / 'summary.json').read_text())
    assert set(summary['protocols']) == {'volume', 'slice_infection_over_1pct', 'slice_all'}
    assert (summary['studies'], summary['pseudo_masks'], summary['threshold']) == (3, None, 0.4)
    rows = read_rows(output)
    assert len(rows) == 3
    assert len({path.name for path in (output / 'prepared').iterdir()}) == 3  # not the unmasked one
    # The very mask that the export predicts, against the truth.
    image_name, _ = LAYOUTS[layout]
    _, truth = draw_chest('p1_a')
    mask = covseg_jax.load(export).predict(data / image_name.format('p1_a')).mask
    dice = 2 * (mask * truth).sum() / (mask.sum() + truth.sum())
    assert 0 < dice < 1
    assert float(rows[0]['dice']) == pytest.approx(dice)


@pytest.mark.usefixtures('undrawn')
def test_export_is_evaluated_as_the_config_says_and_again(export, config, tmp_path):
    data = write_data_set(tmp_path / 'data', 'nnunet', label=255)
    broken = data / 'imagesTr' / 'p2_a_0000.nii.gz'
    broken.write_bytes(broken.read_bytes()[:-50])
    changed = config.copy_and_resolve_references()
    changed.data.folder = str(data)
    changed.data.num_workers = 1
    changed.data.subject_pattern = '(p.)_'
    changed.data.healthy_pattern = 'p3_.*'  # of no study with a mask
    changed.prepare.lesion_labels = (255,)
    changed.prepare.grid = (16, 48, 48)  # the export's own preparation counts
    output = tmp_path / 'scores'
    evaluate(changed, model=f'{export},{export}', output=output)
    summary = json.loads((output / 'summary.json').read_text())
    assert [summary[key] for key in ('studies', 'subjects', 'studies_set_aside')] == [2, 1, 1]
    for name in ('cases.csv', 'slices.csv'):
        assert {row['subject'] for row in read_rows(output, name)} == {'p1'}
    assert np.load(output / 'prepared' / 'p1_a' / 'image.npy').shape == (16, 32, 32)

    before = {path: path.stat().st_mtime_ns for path in (output / 'prepared').rglob('*.npy')}
    scores = (output / 'cases.csv').read_bytes()
    evaluate(changed, model=str(export), output=output)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (output / 'cases.csv').read_bytes() == scores  # the mean of a model with itself
    changed.data.evaluation_pattern = 'p2'
    with pytest.raises(InputError, match='evaluation_pattern'):
        evaluate(changed, model=str(export), output=output)


def test_evaluation_of_an_export_overwrites_nothing_and_says_what_is_missing(export, tmp_path):
    data = write_data_set(tmp_path / 'data', 'plain')
    before = {path: path.read_bytes() for path in data.iterdir()}
    with pytest.raises(InputError, match='name a new folder'):
        evaluate(model=str(export), input=data, output=data)
    assert {path: path.read_bytes() for path in data.iterdir()} == before
    with pytest.raises(InputError, match='--output=FOLDER'):
        evaluate(model=str(export), input=data)
    with pytest.raises(InputError, match='--reference'):
        evaluate(model=str(export), input=data, output=tmp_path / 'out', reference=data)
    for mask in data.glob('*_mask.nii.gz'):
        mask.unlink()
    with pytest.raises(InputError, match='none of its 4 studies has a lesion mask'):
        evaluate(model=str(export), input=data, output=tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


@pytest.mark.usefixtures('undrawn')
def test_run_is_evaluated_on_a_data_set_without_categories(export, config, tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, 'load_model', lambda *_, **__: (covseg_jax.load(export), 7))
    config = config.copy_and_resolve_references()
    config.phantom.make = False
    config.data.num_workers = 1
    config.data.folder = str(write_data_set(tmp_path / 'data', 'plain'))
    config.data.subject_pattern = '(p.)_'
    # One of two studies of a subject has no mask; there are pseudo-masks, of another data set.
    (tmp_path / 'data' / 'p1_b_mask.nii.gz').unlink()
    workdir = tmp_path / 'run'
    (workdir / 'pseudo_masks').mkdir(parents=True)
    pipeline.run_prepare(config, workdir)
    pipeline.run_evaluate(config, workdir)
    rows = read_rows(workdir / 'evaluation')
    assert [(row['study_id'], row['subject']) for row in rows] == [('p1_a', 'p1'), ('p2_a', 'p2')]

    # Another data set in the same work directory, whose studies have other names.
    config.data.folder = str(write_data_set(tmp_path / 'more', 'nnunet', masked=('q1',)))
    config.data.subject_pattern = '(q.|p3)'
    pipeline.run_prepare(config, workdir)
    pipeline.run_evaluate(config, workdir)
    assert [row['study_id'] for row in read_rows(workdir / 'evaluation')] == ['q1']
