"""Every variant of every config builds its networks, and traces every step that a run of it takes,
at its real shapes and types; nothing is computed."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import pytest

from configs import gan3d, transunet
from covseg_jax.data import feeds
from covseg_jax.data.augment import Augmentation
from covseg_jax.data.opacities import OpacityModel
from covseg_jax.gan.steps import GANLosses, make_gan_evaluation, make_heal
from covseg_jax.gan.synthesize import PseudoMaskSettings
from covseg_jax.gan.train import build_gan, gan_batch_shapes
from covseg_jax.imaging.masks import MaskSettings
from covseg_jax.models.convolution import tracing_for
from covseg_jax.models.gan3d import Generator, PatchDiscriminator
from covseg_jax.models.transunet import TransUNet
from covseg_jax.models.unet import UNet
from covseg_jax.prepare.prepare_studies import PrepareSettings
from covseg_jax.segmentation.steps import SegmentationLosses, make_evaluation_step
from covseg_jax.segmentation.train import segmentation_batch_shapes
from covseg_jax.segmentation.volumes import VolumeSettings
from covseg_jax.stages import compile_check, guide

RECONSTRUCTION = 'reconstruction'
ADVERSARIAL = 'adversarial + discriminator + identity + reconstruction'
PUBLISHED = 'adversarial + discriminator + reconstruction'
BOTH = {RECONSTRUCTION, ADVERSARIAL}
COMBINED = {'contrastive + mse + sensitivity'}
TWO_PHASES = {'contrastive', 'mse + sensitivity'}
UNET = {'network.name': 'unet'}  # where the network does not matter: traced in half the time


def list_programs(config, stage, devices=1):
    return compile_check.list_programs(config, jax.devices()[:devices], stage)


def trace(programs):
    """Program -> the shapes of what it gives."""
    return {
        name: jax.eval_shape(program.function, *program.arguments(program.batch_size))
        for name, program in programs.items()
    }


def assert_state_keeps_its_shapes(found):
    for name, (state, metrics) in found.items():
        for leaf in jax.tree.leaves(metrics):
            assert leaf.dtype == jnp.float32, name
        assert state.step.dtype == jnp.int32


def with_changes(variant, changes):
    config = transunet.get_config(variant)
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    return config


def name_case(value):
    # A set's order is another one in each process.
    return ' '.join(f'{k}={v}' for k, v in value.items()) if isinstance(value, dict) else ''


@pytest.mark.parametrize('variant', gan3d.VARIANTS)
def test_gan_config_is_the_whole_pipelines_but_for_its_stages(variant):
    alone, whole = gan3d.get_config(variant).to_dict(), transunet.get_config(variant).to_dict()
    changed = {name for name in whole if alone[name] != whole[name]}
    assert changed == {'name', 'stages'}
    assert alone.keys() == whole.keys()


def test_phantom_is_phantom_gan_without_what_its_rounds_do_not_need():
    alone, whole = (
        dict(guide.config_fields(transunet.get_config(name))) for name in ('phantom', 'phantom_gan')
    )
    changed = {name for name in whole if alone[name] != whole[name]}
    of_rounds = {f'config.{name}' for name in ('stages', 'train.rounds', 'train.round_shares')}
    of_scans = {'phantom.num_healthy', 'phantom.num_covid', 'data.calibration_fraction'}
    others = {f'config.{name}' for name in ('variant', 'train.losses.contrastive', *of_scans)}
    assert changed == others | of_rounds
    assert alone['config.train.losses.contrastive'] == 0
    studies = ('config.phantom.num_healthy', 'config.phantom.num_covid')
    assert sum(map(alone.get, studies)) == sum(map(whole.get, studies))
    mosmed = guide.config_fields(transunet.get_config())
    assert {name: whole[name] for name in of_rounds} == {name: mosmed[name] for name in of_rounds}


def test_phantom_fine_has_the_chests_and_grains_of_phantom_in_smaller_pixels():
    coarse, fine = (transunet.get_config(name) for name in ('phantom', 'phantom_fine'))
    finer = fine.prepare.grid[1] / coarse.prepare.grid[1]
    assert fine.prepare.grid == (
        coarse.prepare.grid[0],
        *(finer * n for n in coarse.prepare.grid[1:]),
    )
    sides = [each.phantom.shape[0] * each.phantom.spacing_mm[0] for each in (coarse, fine)]
    assert sides[1] == pytest.approx(sides[0], rel=0.01)
    assert fine.phantom.shape[0] == finer * coarse.phantom.shape[0]
    assert fine.opacities.grain_voxels == tuple(finer * n for n in coarse.opacities.grain_voxels)


@pytest.mark.parametrize('variant', transunet.VARIANTS)
def test_gan_of_every_variant_is_built_and_stepped(variant):
    config = transunet.get_config(variant)
    programs = list_programs(config, 'gan')
    found = trace(programs)
    healed = found.pop('heal')
    assert healed.shape == (1, *config.prepare.grid, 1)
    assert healed.dtype == jnp.float32
    kinds = {'tiny': {ADVERSARIAL}, 'published': {PUBLISHED}, 'phantom_published': {PUBLISHED}}
    assert set(found) == kinds.get(variant, BOTH)
    assert_state_keeps_its_shapes(found)
    parts, batch = build_gan(config), gan_batch_shapes(config, 1)
    evaluate = make_gan_evaluation(parts.generator, parts.opacities)
    weights, _, key = programs['heal'].arguments(1)
    metrics, _ = jax.eval_shape(evaluate, weights, batch, key)
    assert set(metrics) == {'mse', 'removed', 'harm'}


@pytest.mark.parametrize('variant', transunet.VARIANTS)
def test_network_of_every_variant_is_built_and_stepped(variant):
    config = transunet.get_config(variant)
    programs = list_programs(config, 'train')
    found = trace(programs)
    probability = found.pop('predict')
    size = config.predict.batch_size
    assert probability.shape == (size, *config.prepare.grid[1:], 1)
    assert_state_keeps_its_shapes(found)
    batch = segmentation_batch_shapes(config, size)
    batch |= {feeds.VALID: jax.ShapeDtypeStruct((size,), jnp.float32)}
    metrics = jax.eval_shape(make_evaluation_step(), probability, batch)
    assert set(metrics) == {'mse', 'dice'}


@pytest.mark.parametrize('patch', [1, 2, 4])
def test_default_generator_of_every_patch_is_built(patch):
    config = with_changes('mosmed', {'gan.generator.patch': patch})
    parts = build_gan(config)
    scan = jax.ShapeDtypeStruct((1, *config.prepare.grid, 1), jnp.float32)
    key = jax.eval_shape(jax.random.key, 0)
    heal = make_heal(parts.generator)
    assert jax.eval_shape(heal, parts.abstract_state.ema, scan, key).shape == scan.shape


@pytest.mark.parametrize(
    ('changes', 'steps'),
    [
        *(
            ({'gan.generator.patch': patch, 'gan.generator.use_norm': norm}, {ADVERSARIAL})
            for patch, norm in ((1, True), (1, False), (2, False), (4, True))
        ),
        ({'gan.generator.head': 'relu'}, {ADVERSARIAL}),
        ({'gan.compute_dtype': 'bfloat16'}, {ADVERSARIAL}),
        ({'gan.adversarial_every': 0}, {RECONSTRUCTION}),
        ({'gan.adversarial_every': 3}, BOTH),
        ({'gan.generator.filters': (5, 11), 'gan.generator.bottleneck_filters': 7}, {ADVERSARIAL}),
        ({'gan.schedule': 'constant', 'gan.clip_norm': 0.0}, {ADVERSARIAL}),
    ],
    ids=name_case,
)
def test_flags_that_change_the_gan_are_built_and_stepped(changes, steps):
    assert set(trace(list_programs(with_changes('tiny', changes), 'gan'))) == {*steps, 'heal'}


@pytest.mark.parametrize(
    ('changes', 'steps'),
    [
        ({}, COMBINED),
        ({'train.mode': 'two_phase', 'train.schedule': 'plateau'}, TWO_PHASES),
        ({**UNET, 'train.mode': 'two_phase', 'train.contrastive_steps': 0}, {'mse + sensitivity'}),
        (UNET, COMBINED),
        ({**UNET, 'train.losses.contrastive': 0.0}, {'mse + sensitivity'}),
        ({**UNET, 'train.losses.sensitivity': 0.0}, {'contrastive + mse'}),
        ({'network.num_heads': 8}, COMBINED),
        ({'network.published_attention': True, 'network.dropout_rate': 0.1}, COMBINED),
        ({'train.compute_dtype': 'bfloat16'}, COMBINED),
        ({**UNET, 'train.micro_batches': 4}, COMBINED),
        (
            {
                **UNET,
                'train.augment.enabled': False,
                'train.synthetic_share': 0.0,
                'train.losses.doubtful': (),
            },
            COMBINED,
        ),
    ],
    ids=name_case,
)
def test_flags_that_change_the_network_are_built_and_stepped(changes, steps):
    phases = {'train.epoch_steps': 4, 'train.contrastive_steps': 2}
    found = trace(list_programs(with_changes('tiny', phases | changes), 'train'))
    assert set(found) == {*steps, 'predict'}


@pytest.mark.parametrize('platform', ['tpu', 'cuda'])
def test_steps_of_other_platforms_are_built_and_stepped(platform):
    with tracing_for(platform):
        config = with_changes('tiny', {})
        assert set(trace(list_programs(config, 'gan'))) == {ADVERSARIAL, 'heal'}
        assert 'predict' in trace(list_programs(config, 'train'))


def test_steps_are_traced_for_eight_devices():
    config = with_changes('tiny', {'gan.batch_size': 8})
    assert set(trace(list_programs(config, 'gan', devices=8))) == {ADVERSARIAL, 'heal'}
    assert len(trace(list_programs(config, 'train', devices=8))) == 2


def names_of(dataclass):
    return {field.name for field in dataclasses.fields(dataclass)} - {'name', 'parent'}


@pytest.mark.parametrize(
    ('group', 'dataclass', 'beside'),
    [
        # What stands beside them is said elsewhere: on the group, or by what was found or built.
        ('prepare', PrepareSettings, set()),
        ('opacities', OpacityModel, {'window_hu'}),
        ('gan.generator', Generator, {'branch_filters', 'negative_slope', 'dtype'}),
        ('gan.discriminator', PatchDiscriminator, {'dtype'}),
        ('gan.losses', GANLosses, set()),
        ('synthesize', PseudoMaskSettings, set()),
        ('network', TransUNet, {'num_classes', 'dtype'}),
        ('unet', UNet, {'num_classes', 'dtype'}),
        ('train.losses', SegmentationLosses, set()),
        ('train.augment', Augmentation, set()),
        ('predict', VolumeSettings, set()),
        ('masks', MaskSettings, {'threshold', 'seed_threshold'}),
    ],
)
def test_a_group_is_its_dataclass_field_by_field(group, dataclass, beside):
    fields = transunet.get_config()
    for name in group.split('.'):
        fields = fields[name]
    assert {*fields, *beside} - {'name'} == names_of(dataclass)


@pytest.mark.parametrize(
    'dataclass',
    [
        PrepareSettings, OpacityModel, GANLosses, PseudoMaskSettings, SegmentationLosses,
        Augmentation, VolumeSettings,
    ],
)  # fmt: skip
def test_a_default_stands_in_the_base_config_alone(dataclass):
    for field in dataclasses.fields(dataclass):
        assert field.default is field.default_factory is dataclasses.MISSING, field.name


def test_a_variant_says_what_differs_in_sixty_lines():
    configs = pathlib.Path(transunet.__file__).parent
    for variant in set(transunet.VARIANTS) - {'mosmed'}:
        text = (configs / f'{variant}.py').read_text(encoding='utf-8')
        assert len(text.splitlines()) <= 60
        assert f'--config=configs/transunet.py:{variant}\n' in text
