"""The variant phantom_gan without the GAN and the contrastive loss: the network learns from painted
healthy scans alone, of which there are more. On phantoms it is better without either
(docs/results.md).

    python -m covseg_jax.main --config=configs/transunet.py:phantom

2 CPU cores: 9 to 10 minutes. Dice of 12 held-out phantoms of seed 0, nine mild and three severe
ones, on which settings were chosen: 0.67; of sixty of seed 777001: 0.68 (docs/results.md). They are
not the phantoms that phantom_gan is evaluated on; launch/ablation.sh and launch/measure.sh compare.
"""

import ml_collections

from configs import phantom_gan


def change(config: ml_collections.ConfigDict) -> None:
    """Makes `mosmed`'s configuration this variant's."""
    phantom_gan.change(config)
    config.stages = 'prepare,train,evaluate'
    config.train.update(rounds=('synthetic',), round_shares=(1.0,))
    config.train.losses.contrastive = 0.0
    # COVID scans serve evaluation only; as many studies as phantom_gan has.
    config.phantom.update(num_healthy=48, num_covid=12)
    config.data.calibration_fraction = 0.2
