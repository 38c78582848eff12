"""What a person is told of the stages."""

import pathlib

import pytest

from configs import transunet
from covseg_jax import manifest
from covseg_jax.stages import guide, on_request, pipeline
from covseg_jax.stages.inputs import Request
from tests.program import assert_one_line_error, run

TINY = '--config=configs/transunet.py:tiny'


def test_every_stage_is_described():
    known = {*on_request.BEFORE, *pipeline.PIPELINE, *on_request.AFTER}
    assert set(guide.STAGES) == known


def test_help_names_stages_in_their_order_flags_and_examples():
    done = run('--help')
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 100
    first_words = [line.split()[0] for line in lines if line.strip()]
    stages = [word for word in first_words if word in pipeline.PIPELINE]
    assert stages == ['prepare', 'gan', 'synthesize', 'train', 'evaluate']
    assert {'--config', '--workdir', '--stages', '--input', '--output'} <= set(first_words)
    assert done.stdout.count('  python -m covseg_jax.main') == 5  # two forms, three examples
    assert 'config.train.batch_size' not in done.stdout


def test_helpfull_lists_every_field_with_its_value():
    done = run(TINY, '--helpfull')
    assert done.returncode == 0, done.stderr
    fields = guide.config_fields(transunet.get_config('tiny'))
    assert '--config.train.batch_size=8' in done.stdout
    assert done.stdout.count('  --config.') >= len(fields) > 100


@pytest.mark.parametrize(
    ('flags', 'parts'),
    [
        (['--stage=train'], ['--stage is not a flag', 'did you mean --stages?']),
        (['--config.train.batchsize=3'], ['did you mean --config.train.batch_size?']),
        (['--stages=trian'], ['trian is not known', 'did you mean train?']),
        (['prepare'], ['did you mean --stages=prepare?']),
    ],
)
def test_misspelt_name_is_told_with_the_nearest(flags, parts):
    assert_one_line_error(run(TINY, *flags), *parts)


def test_near_names_are_those_that_end_alike():
    fields = ['config.gan.batch_size', 'config.train.batch_size', 'config.train.rounds']
    assert guide.suggest('config.trian.batch_size', fields) == (
        ' (did you mean config.train.batch_size?)'
    )
    assert guide.suggest('config.batch_size', fields) == (
        ' (did you mean config.gan.batch_size or config.train.batch_size?)'
    )
    assert guide.suggest('config.train.lr', fields) == ''


def test_stage_says_what_it_does_where_and_how_long_it_took(tmp_path):
    config = transunet.get_config('tiny')
    assert manifest.read_seconds(tmp_path, 'gan') is None
    manifest.finish(tmp_path, 'gan', {}, [], seconds=72.4)
    seconds = manifest.read_seconds(tmp_path, 'gan')
    line = guide.announce('gan', config, tmp_path, Request(), seconds)
    assert line == (
        f'gan: {guide.STAGES["gan"]}; writes {tmp_path / "gan"}; took 72 s the last time'
    )
    given = Request(input=pathlib.Path('a'), output=pathlib.Path('b'))
    assert guide.announce('predict', None, tmp_path, given).endswith('; writes b')
    assert guide.announce('evaluate', config, tmp_path, given).endswith('; writes b')
    place = guide.announce('evaluate', config, tmp_path, Request()).rpartition('; writes ')[2]
    assert place == str(tmp_path / 'evaluation')
    assert guide.announce('status', config, tmp_path, given) == f'status: {guide.STAGES["status"]}'
