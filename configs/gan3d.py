"""The GAN alone: studies -> prepared cases -> GAN -> pseudo-masks; variants and fields as in
configs/transunet.py.

    python -m covseg_jax.main --config=configs/gan3d.py[:VARIANT]
"""

import ml_collections

from configs import transunet


def get_config(variant: str = 'mosmed') -> ml_collections.ConfigDict:
    """The locked configuration of one variant."""
    config = transunet.get_config(variant).unlock()
    config.name = 'gan3d'
    config.stages = 'prepare,gan,synthesize'
    return config.lock()
