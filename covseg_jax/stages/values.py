"""What the values of a config may be, held before any stage begins.

A range without its second number, or a batch of no slices, would else be found out minutes later,
in the words of whatever meets it. What only a stage can tell, such as whether a batch divides over
the devices, it says itself.
"""

import fnmatch
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from covseg_jax.errors import InputError
from covseg_jax.prepare.study_files import LUNGS_SOURCES
from covseg_jax.segmentation.schedule import terms_by_step
from covseg_jax.segmentation.targets import SOURCES, learns_from_covid, plan_rounds
from covseg_jax.stages import guide
from covseg_jax.stages.inputs import Config


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)


def _are_numbers(value: Any, num: int) -> bool:
    return isinstance(value, tuple) and len(value) == num and all(map(_is_number, value))


def _are_counts(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(n, int) and n >= 1 for n in value)


def _is_range(value: Any) -> bool:
    return _are_numbers(value, 2) and value[0] <= value[1]


def _is_pattern(value: Any) -> bool:
    try:
        re.compile(value)
    except re.error:
        return False
    return True


def _is_one_of(*known: str) -> tuple[Callable[[Any], bool], str]:
    return known.__contains__, f'one of {", ".join(map(repr, known))}'


_COUNT = (lambda value: value >= 1, '1 or more')
_AMOUNT = (lambda value: value >= 0, '0 or more')
_SHARE = (lambda value: 0 <= value <= 1, 'a share, from 0 to 1')
_RANGE = (_is_range, 'two numbers, (low, high)')
_WIDTHS = (
    lambda value: len(value) >= 1 and _are_counts(value),
    'channels of each level, such as (8, 16)',
)
_TYPE = _is_one_of('float32', 'bfloat16')

# Pattern of a field's name → whether its value can be used, and what it must be. All that match
# hold.
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        (
            '*.num_steps', '*.batch_size', '*.num_epochs', '*.epoch_steps', '*.micro_batches',
            '*.width', '*.num_heads', '*.mlp_dim', '*.projection_dim', '*.bottleneck_filters',
            '*.patch', '*.depth', '*.num_noise', '*.num_processes',
        ),
        _COUNT,
    ),
    **dict.fromkeys(
        (
            # 0: never
            '*.log_every', '*.evaluate_every', '*.save_every', '*.adversarial_every',
            '*.max_skipped_steps',
            '*learning_rate', '*.learning_rate_batch_size', '*.warmup_steps', '*.clip_norm',
            '*.contrastive_steps', '*.plateau_patience', '*.num_blocks', '*.final_width',
            '*.losses.contrastive', '*.losses.mse', '*.losses.sensitivity', '*.losses.beta',
            '*.losses.reconstruction', '*.losses.adversarial', '*.losses.identity', '*_ml',
            'prepare.margin_mm', 'synthesize.*_mm', '*.smoothing_*', '*.augment.*',
            '*.num_workers', 'phantom.num_*', '*_per_chip_hour',
        ),
        _AMOUNT,
    ),
    **dict.fromkeys(
        (
            '*.ema_decay', '*.dropout_rate', '*_fraction', '*_share', '*.share_of_max',
            '*.dependent_density', '*.border_factor',
        ),
        _SHARE,
    ),
    **dict.fromkeys(
        (
            '*.target_hu', '*.opacity', '*.coverage_threshold', '*.edge', '*.periphery',
            '*.dependence', '*.core_hu', 'prepare.window_hu',
        ),
        _RANGE,
    ),
    **dict.fromkeys(('*.filters', '*.widths'), _WIDTHS),
    **dict.fromkeys(('gan.compute_dtype', 'train.compute_dtype'), _TYPE),
    **dict.fromkeys(
        ('*.grain_voxels', '*.grain_slices'),
        (lambda value: _is_range(value) and value[0] > 0, 'above 0, (finest, coarsest)'),
    ),
    **dict.fromkeys(
        ('train.losses.temperature', 'train.losses.positive_weight', 'gan.losses.error_floor'),
        (lambda value: value > 0, 'more than 0'),
    ),
    'train.plateau_factor': (lambda value: 0 < value < 1, 'between 0 and 1'),
    '*.profile_steps': (
        lambda value: value == () or (_is_range(value) and _are_counts(value)),
        '() or (first, last)',
    ),
    'train.losses.doubtful': (lambda value: value == () or _is_range(value), '() or (low, high)'),
    'train.round_shares': (
        lambda value: isinstance(value, tuple) and all(_is_number(n) and n > 0 for n in value),
        'a share of num_steps for each of train.rounds, such as (0.7, 0.3)',
    ),
    'prepare.grid': (
        lambda value: _are_counts(value) and len(value) == 3 and not any(n % 16 for n in value),
        'D, H and W, multiples of 16, such as (32, 128, 128)',
    ),
    'phantom.shape': (
        lambda value: _are_counts(value) and len(value) == 3, 'x, y and z, such as (192, 192, 40)'
    ),
    'phantom.spacing_mm': (
        lambda value: _are_numbers(value, 3) and min(value) > 0,
        'x, y and z, such as (1.75, 1.75, 8.0)',
    ),
    **dict.fromkeys(
        ('data.subject_pattern', 'data.healthy_pattern', 'data.evaluation_pattern'),
        (_is_pattern, 'a regular expression'),
    ),
    'synthesize.percentile': (lambda value: 0 <= value <= 100, 'from 0 to 100'),
    'train.targets': _is_one_of(*SOURCES),
    'train.statistics': _is_one_of('training', 'scans'),
    'train.labels': _is_one_of('quartiles', 'infection'),
    # Not training/optim.py's SCHEDULES: what predicts needs no optax.
    'train.schedule': _is_one_of('cosine', 'plateau', 'constant'),
    **dict.fromkeys(('gan.schedule', 'lungs.schedule'), _is_one_of('cosine', 'constant')),
    'train.losses.contrastive_features': _is_one_of('projection', 'logits'),
    'train.losses.contrastive_labels': _is_one_of('infection', 'one'),
    'train.losses.mse_on': _is_one_of('probability', 'logits'),
    'synthesize.source': _is_one_of('gan', 'model'),
    'synthesize.difference': _is_one_of('opacity', 'published'),
    'prepare.lungs_source': _is_one_of(*LUNGS_SOURCES),
    'gan.recipe': _is_one_of('default', 'published', 'none'),
    'gan.generator.head': _is_one_of('blend', 'relu'),
    'network.name': _is_one_of('transunet', 'unet', 'none'),
    'predict.output': _is_one_of('sigmoid', 'linear'),
    'data.on_bad_study': _is_one_of('skip', 'stop'),
}  # fmt: skip


def refuse_unusable(config: Config, stages: Sequence[str]) -> None:
    """Raises an InputError that names the first value that no stage can use, and what it may be, or
    values that do not go together in one of `stages`."""
    values = {
        name.removeprefix('config.'): value for name, value in guide.config_fields(config).items()
    }
    for name, value in values.items():
        for can_be_used, expected in _rules(name, value):
            if not can_be_used(value):
                raise InputError(f'--config.{name}={value!r}: must be {expected}')
    rounds = values['train.rounds']
    plan_rounds(rounds, values['train.round_shares'], values['train.num_steps'])
    if 'synthetic' in rounds and not values['train.synthetic_share']:
        raise InputError(
            '--config.train.synthetic_share=0.0: no slice of a round of painted healthy scans '
            f'would have a lesion; give it a share, or take synthetic out of {rounds!r}'
        )
    targets = values['train.targets']
    if targets != 'pseudo' and not learns_from_covid(rounds):
        raise InputError(
            f'--config.train.targets={targets!r}: is of COVID scans, which no round of {rounds!r} '
            'learns from; add --config.train.rounds="(\'targets\',)"'
        )
    terms_by_step(config.train)
    if 'gan' in stages:
        _refuse_gan_sizes(config)
    if 'train' in stages:
        _refuse_network_sizes(config)
    if 'synthesize' in stages and not config.data.calibration_fraction:
        raise InputError(
            '--config.data.calibration_fraction=0.0: pseudo-masks are cut where healthy scans that '
            'are held out say; hold some out, such as 0.2 of them'
        )


def _refuse_gan_sizes(config: Config) -> None:
    """What `models/gan3d.py` cannot compute, of the sizes that a volume has in the GAN."""
    gan, generator = config.gan, config.gan.generator
    step, patch = 2 ** len(generator.filters), generator.patch
    volume, steps = (gan.depth, *config.prepare.grid[1:]), (step, patch * step, patch * step)
    if gan.depth > config.prepare.grid[0]:
        raise InputError(
            f'--config.gan.depth={gan.depth}: prepared scans have {config.prepare.grid[0]} slices, '
            'by --config.prepare.grid; give at most as many'
        )
    if any(size % each for size, each in zip(volume, steps, strict=True)):
        raise InputError(
            f'--config.gan.depth={gan.depth}: with it volumes are {volume}, and by '
            f'--config.gan.generator.filters and patch they must be multiples of {steps}'
        )
    if (patch**2 + sum(generator.filters) + generator.bottleneck_filters) % 3:
        raise InputError(
            f'--config.gan.generator.bottleneck_filters={generator.bottleneck_filters}: with '
            "patch², the sum of filters and it, the bottleneck's channels must divide by 3"
        )
    least = _least_published_size(gan.discriminator.filters)
    if gan.recipe == 'published' and min(volume) < least:
        raise InputError(
            f"--config.gan.recipe='published': its discriminator needs volumes of {least} and more "
            f'voxels each way, and these are {volume}; take a larger --config.gan.depth, or fewer '
            '--config.gan.discriminator.filters'
        )


def _least_published_size(filters: Sequence[int]) -> int:
    """What leaves one voxel after as many valid convolutions of 3 and halvings."""
    size = 1
    for _ in filters:
        size = 2 * size + 2
    return size


def _refuse_network_sizes(config: Config) -> None:
    """What `models/transunet.py` and `models/unet.py` cannot compute."""
    network, size = config.network, config.prepare.grid[1:]
    if network.name == 'transunet':
        if network.width < 8 and not network.final_width:
            raise InputError(
                f'--config.network.width={network.width}: must be 8 or more where '
                '--config.network.final_width is 0, an eighth of it'
            )
        if 8 * network.width % network.num_heads:
            raise InputError(
                f'--config.network.num_heads={network.num_heads}: must divide 8 times '
                f'--config.network.width, {8 * network.width}'
            )
    step = 2 ** (len(config.unet.widths) - 1)
    if network.name == 'unet' and any(each % step for each in size):
        raise InputError(
            f'--config.unet.widths={config.unet.widths!r}: with as many levels slices must be '
            f'multiples of {step}, and by --config.prepare.grid they are {tuple(size)}'
        )


def _rules(name: str, value: Any) -> list[tuple[Callable[[Any], bool], str]]:
    if isinstance(value, bool):
        return []
    of_kind = [(math.isfinite, 'a finite number')] if isinstance(value, float) else []
    return of_kind + [rule for each, rule in _RULES.items() if fnmatch.fnmatchcase(name, each)]
