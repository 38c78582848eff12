"""The recipe of the public code on phantoms: narrow networks, and minutes in place of 10,000
iterations, so larger rates. The TransUNet's schedule is the published one, step for step.

    python -m covseg_jax.main --config=configs/transunet.py:phantom_published

2 slow CPU cores: 13 minutes. Dice of 12 held-out phantoms 0.15 (docs/results.md).
"""

import ml_collections

from configs import phantom_gan, published


def change(config: ml_collections.ConfigDict) -> None:
    """Makes `mosmed`'s configuration this variant's."""
    phantom_gan.change(config)
    published.change(config)
    config.gan.update(depth=32, batch_size=1, num_steps=300, learning_rate=1e-3)
    config.gan.discriminator.filters = (8, 16, 32)
    config.network.dropout_rate = 0.1
    config.train.learning_rate = 1e-3
