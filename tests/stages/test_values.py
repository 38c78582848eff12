"""Values of a config that no stage can use are refused before any stage begins."""

import fnmatch

import pytest

from configs import transunet
from covseg_jax.errors import InputError
from covseg_jax.stages import guide, values
from covseg_jax.training.optim import SCHEDULES


@pytest.mark.parametrize('variant', transunet.VARIANTS)
def test_every_variant_can_be_used(variant):
    assert values.refuse_unusable(transunet.get_config(variant)) is None


def test_schedules_are_those_that_there_are():
    can_be_used, _ = values._RULES['train.schedule']
    assert [each for each in (*SCHEDULES, 'linear') if can_be_used(each)] == [*SCHEDULES]


def test_every_rule_is_of_a_field():
    fields = guide.config_fields(transunet.get_config())
    names = [name.removeprefix('config.') for name in fields]
    assert [each for each in values._RULES if not fnmatch.filter(names, each)] == []


@pytest.mark.parametrize(
    ('field', 'value', 'told'),
    [
        ('gan.batch_size', 0, '1 or more'),
        ('train.learning_rate', float('nan'), 'a finite number'),
        ('train.learning_rate', -1e-3, '0 or more'),
        ('train.synthetic_share', 1.5, 'from 0 to 1'),
        ('opacities.edge', (0.3,), '(low, high)'),  # --config.opacities.edge=0.3
        ('lungs.lobes.edge', (0.4, 0.1), '(low, high)'),
        ('opacities.core_hu', (0.0, float('inf')), '(low, high)'),
        ('prepare.grid', (32, 100, 128), 'multiples of 16'),
        ('phantom.spacing_mm', (1.0, 1.0), 'x, y and z'),
        ('gan.generator.filters', (), 'channels'),
        ('unet.widths', (16, 0), 'channels'),
        ('train.losses.doubtful', (0.8,), '(low, high)'),
        ('train.rounds', ('synthetic', 'refine'), "'refined'"),
        ('train.compute_dtype', 'float16', "'bfloat16'"),
        ('network.name', 'resnet', "'unet'"),
        ('train.rounds', ('refined', 'synthetic'), "not 'refined' first"),
        ('train.targets', 'humans', "'human'"),
        ('train.schedule', 'cosin', "'cosine'"),
        ('gan.schedule', 'plateau', "'cosine'"),
        ('train.losses.mse_on', 'logit', "'logits'"),
        ('synthesize.source', 'models', "'model'"),
        ('prepare.lungs_source', 'net', "'network'"),
        ('data.evaluation_pattern', '(', 'a regular expression'),
        ('synthesize.percentile', 150.0, 'from 0 to 100'),
    ],
)
def test_what_cannot_be_used_is_named_with_what_it_must_be(field, value, told):
    config = transunet.get_config('tiny').unlock()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(InputError) as error:
        values.refuse_unusable(config)
    assert f'--config.{field}={value!r}: must be ' in str(error.value)
    assert told in str(error.value)
    assert '\n' not in str(error.value)


def test_human_masks_are_of_no_use_to_rounds_of_painted_scans_alone():
    config = transunet.get_config('phantom').unlock()
    config.train.targets = 'human'
    with pytest.raises(InputError, match=r"add --config.train.rounds=\"\('targets',\)\"$"):
        values.refuse_unusable(config)
    config.train.rounds = ('targets',)
    values.refuse_unusable(config)


def test_losses_without_weight_are_refused_where_a_step_has_no_other():
    config = transunet.get_config('mosmed').unlock()
    config.train.losses.contrastive = 0.0
    with pytest.raises(
        InputError, match=r"train\.mode='two_phase': .* --config\.train\.mode=combined$"
    ):
        values.refuse_unusable(config)
    config.train.mode = 'combined'
    values.refuse_unusable(config)


@pytest.mark.parametrize(
    ('variant', 'fields'),
    [
        ('phantom_gan', {'train.losses.mse': 0.0, 'train.losses.sensitivity': 0.0}),
        ('mosmed', {'train.num_steps': 50}),  # as many contrastive steps begin each epoch
        ('mosmed', {'train.contrastive_steps': 500}),
    ],
)
def test_a_training_that_learns_no_mask_is_refused(variant, fields):
    config = transunet.get_config(variant).unlock()
    config.update_from_flattened_dict(fields)
    with pytest.raises(InputError, match='would not learn to mark lesions; give one of --config'):
        values.refuse_unusable(config)


def test_painted_rounds_paint():
    config = transunet.get_config('phantom').unlock()
    config.train.synthetic_share = 0.0
    with pytest.raises(InputError, match=r'synthetic_share=0\.0: .* give it a share'):
        values.refuse_unusable(config)


def test_each_round_has_a_share():
    config = transunet.get_config('tiny').unlock()
    config.train.rounds = ('synthetic',)
    with pytest.raises(
        InputError, match=r'train.round_shares=\(.*\): must be one positive share for each'
    ):
        values.refuse_unusable(config)
