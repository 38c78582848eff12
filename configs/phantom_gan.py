"""The whole method on studies that no patient has, and everything sized for a laptop.

    python -m covseg_jax.main --config=configs/transunet.py:phantom_gan

2 CPU cores: 12 to 20 minutes. Dice of 12 held-out phantoms of seed 2026: 0.46, the mean of three
trainings (docs/results.md). `phantom` is evaluated on other phantoms.
"""

import ml_collections


def change(config: ml_collections.ConfigDict) -> None:
    """Makes `mosmed`'s configuration this variant's."""
    config.phantom.make = True
    config.data.update(folder='', calibration_fraction=0.3, validation_fraction=0.15)
    config.gan.update(
        num_steps=350,
        batch_size=2,
        learning_rate=2e-3,
        discriminator_learning_rate=2e-3,
        warmup_steps=20,
        ema_decay=0.98,
        adversarial_every=8,
        depth=16,
        compute_dtype='float32',
        log_every=10,
        evaluate_every=200,
        save_every=100,
    )
    config.gan.generator.update(patch=4, filters=(8, 16, 32, 48), bottleneck_filters=48)
    config.network.update(
        width=16,
        final_width=8,
        mlp_dim=256,
        num_blocks=4,
        dropout_rate=0.0,  # so short a run underfits, and random numbers cost time
    )
    config.train.update(
        mode='combined',  # one compiled step less than two phases
        num_steps=2400,
        batch_size=8,
        learning_rate=2.5e-3,
        warmup_steps=40,
        ema_decay=0.98,
        projection_dim=64,
        compute_dtype='float32',
        log_every=10,
        evaluate_every=400,
        save_every=200,
    )
