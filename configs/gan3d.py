"""The GAN alone: studies -> prepared cases -> GAN -> pseudo-masks; variants and fields as in
configs/transunet.py, but for `phantom` and `phantom_fine`, which learn from no scan with lesions.

    python -m covseg_jax.main --config=configs/gan3d.py[:VARIANT]
"""

import ml_collections

from configs import transunet

VARIANTS = tuple(each for each in transunet.VARIANTS if each not in ('phantom', 'phantom_fine'))


def get_config(variant: str = 'mosmed') -> ml_collections.ConfigDict:
    """The locked configuration of one variant."""
    if variant not in VARIANTS:
        raise ValueError(f'variant {variant!r} of the GAN is not one of {", ".join(VARIANTS)}')
    config = transunet.get_config(variant).unlock()
    config.name = 'gan3d'
    config.stages = 'prepare,gan,synthesize'
    return config.lock()
