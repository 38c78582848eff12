"""The variant phantom_gan as small as it goes, for tests: its masks mean nothing.

    python -m covseg_jax.main --config=configs/transunet.py:tiny

2 CPU cores: 3 to 5 minutes, most of them compilation. No score.
"""

import ml_collections

from configs import phantom_gan


def change(config: ml_collections.ConfigDict) -> None:
    """Makes `mosmed`'s configuration this variant's."""
    phantom_gan.change(config)
    config.phantom.update(
        num_healthy=4,
        num_covid=6,
        num_masked=2,
        shape=(64, 64, 20),
        spacing_mm=(5.25, 5.25, 16.0),
    )
    config.prepare.grid = (16, 32, 32)
    often = {'num_steps': 8, 'log_every': 2, 'evaluate_every': 4, 'save_every': 4}
    config.gan.update(adversarial_every=1, **often)
    config.gan.generator.update(patch=2, filters=(4,), bottleneck_filters=4)
    config.gan.discriminator.filters = (4,)
    config.opacities.grain_voxels = (3.0, 8.0)
    # A few steps do not lift the first logit: refined targets would be empty.
    config.network.update(width=8, num_heads=2, mlp_dim=16, num_blocks=1, initial_logit=0.0)
    config.unet.update(widths=(4, 8), initial_logit=0.0)
    config.train.update(batch_size=8, projection_dim=8, **often)
    config.predict.batch_size = 8
    config.lungs.update(num_phantoms=1, num_validation=1, widths=(4, 6), batch_size=8, **often)
