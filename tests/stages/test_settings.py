"""What a run may take for its own work directory."""

import json

import pytest

from configs import transunet
from covseg_jax import manifest
from covseg_jax.errors import InputError
from covseg_jax.stages import settings
from covseg_jax.stages.settings import is_work_directory, refuse_foreign_workdir


@pytest.mark.parametrize('name', ['config.json', 'environment.json', 'gan', 'evaluation'])
def test_work_directory_with_a_persons_file_is_refused_until_a_run_began_there(tmp_path, name):
    refuse_foreign_workdir(tmp_path)
    refuse_foreign_workdir(tmp_path / 'new')
    (tmp_path / name).write_text('mine')
    with pytest.raises(InputError, match=rf'{name}: is in the way.*--workdir'):
        refuse_foreign_workdir(tmp_path)
    assert not is_work_directory(tmp_path)
    manifest.begin(tmp_path, 'prepare', {})
    assert is_work_directory(tmp_path)
    refuse_foreign_workdir(tmp_path)


def test_work_directory_is_known_without_its_manifests(tmp_path):
    weights, run = tmp_path / 'imported', tmp_path / 'run'
    (weights / 'transunet' / 'checkpoints' / '0').mkdir(parents=True)
    assert is_work_directory(weights)
    run.mkdir()
    (run / 'config.json').write_text(transunet.get_config('tiny').to_json_best_effort())
    assert is_work_directory(run)
    (run / 'config.json').write_text('{"stages": "mine"}')
    assert not is_work_directory(run)


def test_settings_under_the_names_of_an_earlier_version_are_refused(tmp_path):
    values = {'gan': {'patch': 2}}
    manifest.begin(tmp_path, 'gan', values)
    manifest.refuse_other_settings(tmp_path, 'gan', values, 'use those')
    assert manifest.read_begun(tmp_path, 'gan') == values
    (tmp_path / 'manifests' / 'gan.begun.json').write_text(json.dumps(values))
    with pytest.raises(InputError, match=r'stage gan was begun by a version .* other names'):
        manifest.refuse_other_settings(tmp_path, 'gan', values, 'use those')


def test_cases_of_an_earlier_way_to_prepare_them_are_not_done(tmp_path, monkeypatch):
    config = transunet.get_config('tiny')
    (tmp_path / 'studies').mkdir()
    before = settings.stage_settings(config, tmp_path)
    monkeypatch.setattr(settings, 'CASE_VERSION', settings.CASE_VERSION + 1)
    after = settings.stage_settings(config, tmp_path)
    assert all(before[stage] != after[stage] for stage in ('prepare', 'gan', 'train'))


def test_what_was_evaluated_is_not_done_any_more_once_another_stage_begins(tmp_path):
    for stage in ('train', 'evaluate'):
        manifest.begin(tmp_path, stage, {})
        manifest.finish(tmp_path, stage, {}, [], 1.0)
    is_done = manifest.is_done(tmp_path, 'evaluate', manifest.fingerprint({}))
    manifest.begin(tmp_path, 'synthesize', {})
    assert is_done
    assert not manifest.is_done(tmp_path, 'evaluate', manifest.fingerprint({}))
    assert manifest.is_done(tmp_path, 'train', manifest.fingerprint({}))


def test_a_training_of_lungs_is_a_run_that_goes_on_with_its_own_settings(tmp_path):
    config = transunet.get_config('tiny').unlock()
    (tmp_path / 'progress.png').touch()
    assert not is_work_directory(tmp_path)
    settings.begin_lungs(config, tmp_path)
    config.lungs.log_every = 1
    settings.begin_lungs(config, tmp_path)
    refuse_foreign_workdir(tmp_path)
    config.lungs.learning_rate = 0.5
    with pytest.raises(InputError, match=r'lungs\.learning_rate was .*, is 0\.5.; use those'):
        settings.begin_lungs(config, tmp_path)


def test_a_run_of_an_earlier_version_is_not_taken_for_one_that_adapted(tmp_path):
    config = transunet.get_config('tiny').unlock()
    begun = settings.stage_settings(config, tmp_path)['train']
    del begun['train']['statistics']  # which that version did not know
    manifest.begin(tmp_path, 'train', begun)
    (tmp_path / 'transunet' / 'checkpoints' / '8').mkdir(parents=True)
    settings.refuse_other_settings(config, tmp_path, 'train')
    config.train.statistics = 'scans'
    with pytest.raises(InputError, match=r'train\.init was none, is none, with'):
        settings.refuse_other_settings(config, tmp_path, 'train')
