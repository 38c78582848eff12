"""What the stage train leaves beside a network, with the training itself left out."""

import json
import types

import numpy as np
import pytest

from configs import transunet
from covseg_jax.imaging.masks import MaskSettings
from covseg_jax.predict import calibrate
from covseg_jax.prepare.cases import Splits
from covseg_jax.segmentation import train as segmentation
from covseg_jax.stages import initial_model, inputs, pipeline
from covseg_jax.stages.human_masks import SCANS


def make_case(outputs):
    """A scan of 2 ml voxels whose image is the network's answer."""
    return types.SimpleNamespace(
        image=lambda: np.reshape(outputs, (1, 1, -1)).astype(np.float32),
        lungs=lambda: np.ones((1, 1, len(outputs)), np.uint8),
        geometry=types.SimpleNamespace(voxel_ml=2.0),
        description={'data_set': 'made'},
        subject='made',
    )


@pytest.fixture
def without_training(monkeypatch, tmp_path):
    healthy = (make_case([0.1, 0.5, 0.11, 0.0]), make_case([0.0, 0.0, 0.0, 0.3]))
    splits = Splits(healthy, healthy, healthy[:1], (), ())

    def split_studies(config, workdir, *, needs_covid):
        assert needs_covid == (config.train.rounds != ('synthetic',))
        return splits

    monkeypatch.setattr(inputs, 'split_studies', split_studies)
    monkeypatch.setattr(segmentation, 'train_segmentation', lambda *_: None)
    monkeypatch.setattr(segmentation, 'load_variables', lambda *_: (None, None, 1300))
    monkeypatch.setattr(segmentation, 'make_probability', lambda *_: lambda image, lungs: image)
    (tmp_path / 'transunet').mkdir()
    (tmp_path / 'transunet' / 'metrics.jsonl').write_text('{"step": 1300}\n')
    return tmp_path


def test_published_train_searches_no_threshold_and_says_how_masks_are_cut(
    without_training, monkeypatch
):
    def refuse(*_, **__):
        raise AssertionError('a threshold was searched')

    monkeypatch.setattr(calibrate, 'calibrate_mask', refuse)
    config = transunet.get_config('published')
    pipeline.run_train(config, without_training)
    written = json.loads((without_training / 'transunet' / 'calibration.json').read_text())
    assert (written['threshold'], written['share_of_max']) == (None, 0.2)
    # 0.11 and 0.5 exceed 0.1 in the first, 0.3 itself in the second: 4 and 2 ml
    assert written['healthy_false_positive_ml'] == 3.0
    assert inputs.load_masks(config, without_training) == MaskSettings(
        min_component_ml=0.0, share_of_max=0.2
    )


@pytest.mark.parametrize(('rounds', 'learned'), [(('synthetic',), 0), (('targets',), 1)])
def test_covid_scans_are_asked_for_and_counted_where_a_round_learns_from_them(
    without_training, rounds, learned
):
    config = transunet.get_config('published').unlock()
    config.train.update(rounds=rounds, round_shares=(1.0,))
    pipeline.run_train(config, without_training)
    written = json.loads((without_training / 'transunet' / 'calibration.json').read_text())
    assert written['training_data']['covid_studies'] == learned


def test_found_cuts_that_mark_much_or_are_found_on_no_scan_are_told(capsys):
    pipeline._tell_doubt('train', 14.9, 1, limit=15.0)
    assert capsys.readouterr().out == ''
    pipeline._tell_doubt('train', 32.7, 5, limit=15.0)
    said = capsys.readouterr().out
    assert 'mark 33 ml in held-out healthy scans on average' in said
    assert 'there are 5 of them' in said
    pipeline._tell_doubt('train', None, 0, limit=15.0)
    assert 'no healthy scan is held out' in capsys.readouterr().out


@pytest.mark.parametrize(('source', 'scans'), [('model', [5, 7]), ('gan', [5])])
def test_teachers_and_their_human_masks_are_noted(without_training, monkeypatch, source, scans):
    models = tuple(
        initial_model.InitialModel(
            name, without_training, {'training_data': {'human_masks': True, SCANS: [crc32]}}, name
        )
        for name, crc32 in (('first', 5), ('second', 7))
    )
    monkeypatch.setattr(initial_model, 'read_initial_models', lambda _: models)
    monkeypatch.setattr(initial_model, 'load', lambda *_: None)
    config = transunet.get_config('published').unlock()
    config.synthesize.source = source
    pipeline.run_train(config, without_training)
    told = json.loads((without_training / 'transunet' / 'calibration.json').read_text())
    told = told['training_data']
    assert told[SCANS] == scans
    assert told['initial_model']['weights_sha256'] == 'first'
    assert told.get('teachers') == (['first', 'second'] if source == 'model' else None)
