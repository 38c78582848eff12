"""The variant `published` beside what method.md says of the public code."""

import pytest

from configs import transunet

# method.md: section 2, the GAN and its pseudo-masks; 3, the network and its training; 4, the
# losses; 5, how the output is read.
PUBLISHED = {
    'gan.recipe': 'published',
    'gan.generator.filters': (8, 16, 32, 64),
    'gan.generator.bottleneck_filters': 128,
    'gan.generator.noise_channels': 10,
    'gan.generator.patch': 1,
    'gan.generator.use_norm': False,
    'gan.generator.head': 'relu',
    'gan.generator.input_shift': 0.0,
    'gan.generator.input_scale': 1.0,
    'gan.generator.input_clip': None,
    'gan.discriminator.filters': (32, 64, 128),
    'prepare.grid': (32, 128, 128),
    'prepare.window_hu': (-1000.0, 400.0),
    'gan.depth': 32,
    'gan.batch_size': 5,
    'gan.num_steps': 10_000,
    'gan.learning_rate': 5e-5,
    'gan.discriminator_learning_rate': 1e-3,
    'gan.schedule': 'constant',
    'gan.warmup_steps': 0,
    'gan.clip_norm': 0.0,
    'gan.ema_decay': 0.0,
    'synthesize.difference': 'published',
    'synthesize.share_of_max': 0.2,
    'synthesize.min_component_ml': 0.0,
    'synthesize.num_noise': 1,
    'network.name': 'transunet',
    'network.width': 128,
    'network.final_width': 0,
    'network.num_heads': 4,
    'network.mlp_dim': 512,
    'network.num_blocks': 8,
    'network.dropout_rate': 0.1,
    'network.published_attention': True,
    'network.initial_logit': 0.0,
    'train.mode': 'published',
    'train.num_epochs': 100,
    'train.epoch_steps': 2 + 1,
    'train.contrastive_steps': 2,
    'train.num_steps': 100 * (2 + 1) + 500 * 2,
    'train.batch_size': 4 + 4,
    'train.micro_batches': 1,
    'train.rounds': ('targets',),
    'train.targets': 'pseudo',
    'train.labels': 'quartiles',
    'train.use_healthy': False,
    'train.synthetic_share': 0.0,
    'train.losses.binary_targets': False,
    'train.losses.clip_targets': False,
    'train.losses.doubtful': (),
    'train.learning_rate': 5e-5,
    'train.schedule': 'constant',
    'train.warmup_steps': 0,
    'train.clip_norm': 0.0,
    'train.ema_decay': 0.0,
    'train.losses.contrastive': 1.0,
    'train.losses.mse': 1.0,
    'train.losses.sensitivity': 1.0,
    'train.losses.beta': 2.0,
    'train.losses.temperature': 1.0,
    'train.losses.positive_weight': 1.5,
    'train.losses.contrastive_features': 'logits',
    'train.losses.contrastive_labels': 'one',
    'train.losses.include_self': True,
    'train.losses.mse_on': 'logits',
    'train.augment.enabled': False,
    'predict.output': 'linear',
    'masks.share_of_max': 0.2,
    'predict.smoothing_pixels': 0.0,
    'predict.flip': False,
    'predict.smoothing_slices': 0.0,
    'predict.border_factor': 1.0,
    'masks.min_component_ml': 0.0,
}
# Sizes and rates of the variant for phantoms; all else is the published recipe.
SMALLER = {
    'gan.generator.patch', 'gan.generator.filters', 'gan.generator.bottleneck_filters',
    'gan.discriminator.filters',
    'gan.batch_size', 'gan.num_steps', 'gan.learning_rate', 'network.width', 'network.final_width',
    'network.mlp_dim', 'network.num_blocks', 'train.learning_rate',
}  # fmt: skip


@pytest.mark.parametrize('variant', ['published', 'phantom_published'])
def test_published_variants_have_the_settings_of_the_public_code(variant):
    config = transunet.get_config(variant)
    found = dict.fromkeys(PUBLISHED, config)
    for name in PUBLISHED:
        for part in name.split('.'):
            found[name] = found[name].get(part, 'no such field')
    differ = {name for name in PUBLISHED if found[name] != PUBLISHED[name]}
    assert differ == (set() if variant == 'published' else SMALLER)
