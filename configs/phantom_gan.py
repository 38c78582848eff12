"""The whole method on the phantom variant's studies: GAN, pseudo-masks, and a network that learns
from them after painted healthy scans.

    python -m covseg_jax.main --config=configs/transunet.py:phantom_gan

"""

import ml_collections

from configs import phantom


def change(config: ml_collections.ConfigDict) -> None:
    """Makes `mosmed`'s configuration this variant's."""
    stages, rounds, shares = config.stages, config.train.rounds, config.train.round_shares
    phantom.change(config)
    config.stages = stages
    config.train.update(rounds=rounds, round_shares=shares)
