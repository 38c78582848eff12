"""The GAN alone: studies -> prepared cases -> GAN -> pseudo-masks.

The same variants and fields as configs/transunet.py; `published` is the public code's recipe.
"""

import ml_collections

from configs import transunet


def get_config(variant: str = 'mosmed') -> ml_collections.ConfigDict:
    """The locked configuration of one variant."""
    config = transunet.get_config(variant).unlock()
    config.name = 'gan3d'
    config.stages = 'prepare,gan,synthesize'
    return config.lock()
