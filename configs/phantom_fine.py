"""The variant phantom on a finer grid, 192 × 192 for 128 × 128, with more phantoms and steps: the
recipe and the sizes of the first of two networks that come with the code, see launch/make_model.sh.

    python -m covseg_jax.main --config=configs/transunet.py:phantom_fine

A finer grid shows a scan's noise, so painted opacities keep most of it, and slices are smoothed by
random widths: what is smooth would else be taken for lesion.

One CPU core: about an hour and a half. What it marks in slices of real scans, phantoms and healthy
scans is in docs/results.md.
"""

import ml_collections

from configs import phantom


def change(config: ml_collections.ConfigDict) -> None:
    """Makes `mosmed`'s configuration this variant's."""
    phantom.change(config)
    config.prepare.grid = (32, 192, 192)
    # The same chests in pixels of two thirds.
    config.phantom.update(num_healthy=160, shape=(288, 288, 40), spacing_mm=(1.17, 1.17, 8.0))
    config.data.calibration_fraction = 0.1
    config.opacities.update(grain_voxels=(6.0, 30.0), added_share=1.0)  # grains of the same size
    config.train.augment.update(smoothing_pixels=1.2, noise=0.02)
    config.train.update(num_steps=8000, ema_decay=0.99, evaluate_every=1000)
