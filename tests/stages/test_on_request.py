"""Stages that write one file into a folder that a person named."""

import csv
import json

import pytest

from configs import transunet
from covseg_jax.errors import InputError
from covseg_jax.evaluation import scores
from covseg_jax.stages import on_request
from covseg_jax.stages.inputs import Request
from tests.evaluation.test_folders import write
from tests.imaging.chest import write_study


def verify(folder, output):
    if not (folder / 'scans').exists():
        write_study(folder / 'scans', 'a')
    config = transunet.get_config('tiny')
    on_request.run_verify(config, folder / 'w', Request(folder / 'scans', output))


def evaluate_folder(folder, output):
    write(folder / 'masks' / 'a.nii.gz', (0, 0, 0))
    config = transunet.get_config('tiny')
    given = Request(folder / 'masks', output, folder / 'masks')
    on_request.run_evaluate_given(config, folder / 'w', given)


def compare(folder, output):
    run = folder / 'run'
    if not run.exists():
        evaluate_folder(folder, run)
    given = Request(f'{run},{run}', output)
    on_request.run_compare(transunet.get_config('tiny'), folder / 'w', given)


STAGES = [
    (verify, 'verify.csv'),
    (evaluate_folder, 'cases.csv'),
    (evaluate_folder, 'slices.csv'),
    (evaluate_folder, 'summary.json'),
    (compare, 'compare.json'),
]


@pytest.mark.parametrize(('run', 'name'), STAGES)
def test_file_of_a_persons_output_folder_is_refused_and_the_programs_own_replaced(
    tmp_path, run, name
):
    path = tmp_path / 'output' / name
    path.parent.mkdir()
    path.write_text('mine')
    with pytest.raises(InputError, match=rf'{name}: is in the way'):
        run(tmp_path, path.parent)
    assert path.read_text() == 'mine'
    assert list(path.parent.iterdir()) == [path]
    path.unlink()
    for _ in range(2):
        run(tmp_path, path.parent)
    path.write_text('edited')
    with pytest.raises(InputError, match=rf'{name}: is in the way.* changed since'):
        run(tmp_path, path.parent)
    assert path.read_text() == 'edited'


def test_what_an_older_version_left_in_the_work_directory_is_replaced(tmp_path):
    for name in ('verify.csv', 'evaluation_of_folder/cases.csv'):
        path = tmp_path / 'w' / name
        path.parent.mkdir(exist_ok=True)
        path.write_text('old')
    verify(tmp_path, None)
    with (tmp_path / 'w' / 'verify.csv').open() as file:
        assert [row['study'] for row in csv.DictReader(file)] == ['a']
    evaluate_folder(tmp_path, None)
    rows, _ = scores.read_tables(tmp_path / 'w' / 'evaluation_of_folder')
    assert [row['study_id'] for row in rows] == ['a']


@pytest.mark.parametrize(('seed_threshold', 'is_told'), [(0.8, True), (0.7, False)])
def test_export_tells_the_metrics_of_its_own_cuts_alone(tmp_path, seed_threshold, is_told):
    cuts = {'threshold': 0.6, 'checkpoint_step': 7}
    for name, content in (
        ('transunet/calibration.json', cuts | {'seed_threshold': 0.8}),
        ('evaluation/summary.json', cuts | {'seed_threshold': seed_threshold, 'studies': 3}),
    ):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(json.dumps(content))
    metrics = on_request._facts(transunet.get_config('tiny'), tmp_path, 7)['metrics']
    assert (metrics and metrics['studies']) == (3 if is_told else None)


def test_verify_names_what_is_no_study(tmp_path, capsys):
    write_study(tmp_path / 'scans', 'a')
    (tmp_path / 'scans' / 'a_mask.nii.gz').rename(tmp_path / 'scans' / 'b_mask.nii.gz')
    verify(tmp_path, tmp_path / 'output')
    assert 'verify: note: b_mask.nii.gz: a mask without its scan' in capsys.readouterr().out
    with (tmp_path / 'output' / 'verify.csv').open(newline='') as file:
        rows = list(csv.DictReader(file))
    assert [(row['study'], row['status']) for row in rows] == [('a', 'ok'), ('', 'note')]
    assert rows[1]['file'] == str(tmp_path / 'scans' / 'b_mask.nii.gz')


def test_status_tells_what_is_to_do_from_what_is_not_in_the_config(tmp_path, capsys):
    config = transunet.get_config('phantom')  # prepare, train and evaluate
    (tmp_path / 'config.json').write_text('{}')
    on_request.run_status(config, tmp_path, Request())
    said = capsys.readouterr().out
    assert (said.count('not begun'), said.count('not in config.stages')) == (3, 2)
