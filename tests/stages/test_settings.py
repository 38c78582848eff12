"""What a run may take for its own work directory."""

import pytest

from configs import transunet
from covseg_jax import manifest
from covseg_jax.errors import InputError
from covseg_jax.stages.settings import refuse_foreign_workdir


@pytest.mark.parametrize('name', ['config.json', 'environment.json', 'gan', 'evaluation'])
def test_work_directory_with_a_persons_file_is_refused_until_a_run_began_there(tmp_path, name):
    refuse_foreign_workdir(tmp_path)
    refuse_foreign_workdir(tmp_path / 'new')
    (tmp_path / name).write_text('mine')
    with pytest.raises(InputError, match=rf'{name}: is in the way.*--workdir'):
        refuse_foreign_workdir(tmp_path)
    manifest.begin(tmp_path, 'prepare', {})
    refuse_foreign_workdir(tmp_path)


def test_work_directory_whose_manifests_were_removed_is_a_runs(tmp_path):
    (tmp_path / 'config.json').write_text(transunet.get_config('tiny').to_json_best_effort())
    (tmp_path / 'gan').mkdir()
    refuse_foreign_workdir(tmp_path)


def test_work_directory_of_imported_weights_is_a_runs(tmp_path):
    (tmp_path / 'transunet' / 'checkpoints' / '0').mkdir(parents=True)
    refuse_foreign_workdir(tmp_path)
