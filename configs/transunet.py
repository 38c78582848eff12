"""The whole pipeline, from studies to a report.

    python -m covseg_jax.main --config=configs/transunet.py[:VARIANT] [--config.GROUP.FIELD=VALUE]

Variants are files beside this one, which say what differs from configs/base.py, what a run costs
and what to expect of it:

    mosmed              base.py as it is: MosMedData in the published sizes, for an accelerator
    phantom             on studies that it makes itself, sized for two CPU cores; without
                        the GAN and the contrastive loss
    phantom_gan         the same with both: the whole method
    phantom_fine        phantom on a finer grid: the recipe of the first network of the model that
                        comes with the code
    tiny                as small as it goes: for tests
    published           the recipe of the public code, on mosmed's studies
    phantom_published   that recipe on phantoms
"""

import importlib

import ml_collections

from configs.base import get_base

VARIANTS = (
    'mosmed',
    'phantom',
    'phantom_gan',
    'phantom_fine',
    'tiny',
    'published',
    'phantom_published',
)


def get_config(variant: str = 'mosmed') -> ml_collections.ConfigDict:
    """The locked configuration of one variant."""
    if variant not in VARIANTS:
        raise ValueError(f'variant {variant!r} is not one of {", ".join(VARIANTS)}')
    config = get_base()
    config.variant = variant
    if variant != 'mosmed':
        importlib.import_module(f'configs.{variant}').change(config)
    return config.lock()
