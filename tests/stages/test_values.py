"""Values of a config that no stage can use are refused before any stage begins."""

import fnmatch

import jax
import jax.numpy as jnp
import pytest

from configs import transunet
from covseg_jax.errors import InputError
from covseg_jax.models.gan3d import Discriminator
from covseg_jax.stages import guide, values
from covseg_jax.training.optim import SCHEDULES


@pytest.mark.parametrize('variant', transunet.VARIANTS)
def test_every_variant_can_be_used(variant):
    config = transunet.get_config(variant)
    assert values.refuse_unusable(config, config.stages.split(',')) is None


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
        ('train.plateau_factor', 1.0, 'between 0 and 1'),
        ('train.losses.positive_weight', 0.0, 'more than 0'),
        ('gan.losses.error_floor', 0.0, 'more than 0'),
        ('opacities.grain_voxels', (0.0, 20.0), 'above 0'),
        ('train.profile_steps', (5,), '(first, last)'),
    ],
)
def test_what_cannot_be_used_is_named_with_what_it_must_be(field, value, told):
    config = transunet.get_config('tiny').unlock()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(InputError) as error:
        values.refuse_unusable(config, ['train'])
    assert f'--config.{field}={value!r}: must be ' in str(error.value)
    assert told in str(error.value)
    assert '\n' not in str(error.value)


def test_human_masks_are_of_no_use_to_rounds_of_painted_scans_alone():
    config = transunet.get_config('phantom').unlock()
    config.train.targets = 'human'
    with pytest.raises(InputError, match=r"add --config.train.rounds=\"\('targets',\)\"$"):
        values.refuse_unusable(config, ['train'])
    config.train.rounds = ('targets',)
    values.refuse_unusable(config, ['train'])


def test_losses_without_weight_are_refused_where_a_step_has_no_other():
    config = transunet.get_config('mosmed').unlock()
    config.train.losses.contrastive = 0.0
    with pytest.raises(
        InputError, match=r"train\.mode='two_phase': .* --config\.train\.mode=combined$"
    ):
        values.refuse_unusable(config, ['train'])
    config.train.mode = 'combined'
    values.refuse_unusable(config, ['train'])


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
        values.refuse_unusable(config, ['train'])


def test_painted_rounds_paint():
    config = transunet.get_config('phantom').unlock()
    config.train.synthetic_share = 0.0
    with pytest.raises(InputError, match=r'synthetic_share=0\.0: .* give it a share'):
        values.refuse_unusable(config, ['train'])


def test_each_round_has_a_share():
    config = transunet.get_config('tiny').unlock()
    config.train.rounds = ('synthetic',)
    with pytest.raises(
        InputError, match=r'train.round_shares=\(.*\): must be one positive share for each'
    ):
        values.refuse_unusable(config, ['train'])


@pytest.mark.parametrize(
    ('stage', 'fields', 'told'),
    [
        ('gan', {'gan.depth': 64}, 'prepared scans have 32 slices'),
        ('gan', {'gan.depth': 24}, r'must be multiples of \(16, 16, 16\)'),
        ('gan', {'gan.generator.patch': 32}, r'must be multiples of \(16, 512, 512\)'),
        ('gan', {'gan.generator.bottleneck_filters': 129}, 'must divide by 3'),
        ('gan', {'gan.recipe': 'published', 'gan.depth': 16}, 'volumes of 22 and more'),
        ('train', {'network.width': 4}, 'must be 8 or more'),
        ('train', {'network.num_heads': 3}, 'must divide 8 times .*, 1024$'),
        ('train', {'network.name': 'unet', 'unet.widths': (8,) * 9}, 'multiples of 256'),
        ('synthesize', {'data.calibration_fraction': 0.0}, 'hold some out'),
    ],
)
def test_sizes_that_do_not_fit_are_refused_where_a_stage_has_them(stage, fields, told):
    config = transunet.get_config('mosmed').unlock()
    config.update_from_flattened_dict(fields)
    with pytest.raises(InputError, match=f'^--config.*{told}'):
        values.refuse_unusable(config, [stage])
    values.refuse_unusable(config, ['prepare'])


@pytest.mark.parametrize(('filters', 'least'), [((8,), 4), ((8, 8), 10), ((8, 8, 8), 22)])
def test_the_published_discriminator_keeps_a_voxel(filters, least):
    """`values` says the least size, and a mean of nothing is NaN."""
    network = Discriminator(filters)
    variables = network.init(jax.random.key(0), jnp.zeros((1, *[least] * 3, 1)))
    for size, is_enough in ((least, True), (least - 1, False)):
        found = network.apply(variables, jnp.ones((1, *[size] * 3, 1)))
        assert bool(jnp.isfinite(found).all()) == is_enough
    assert values._least_published_size(filters) == least
