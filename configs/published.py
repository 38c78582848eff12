"""The recipe of the public code, docs/method.md sections 2 to 5, with the faults named there.

    python -m covseg_jax.main --config=configs/transunet.py:published

On an accelerator; not run on MosMedData yet. What it does otherwise than the public code, such as
lungs without lungmask and masks on the study's own grid, stands in its section 6.
"""

import ml_collections


def change(config: ml_collections.ConfigDict) -> None:
    """Makes `mosmed`'s configuration this variant's."""
    config.gan.update(
        recipe='published',  # three updates an iteration, Perlin noise, Adam with Keras's epsilon
        batch_size=5,
        learning_rate=5e-5,
        discriminator_learning_rate=1e-3,
        compute_dtype='float32',
    )
    config.gan.generator.update(
        use_norm=False, head='relu', input_shift=0.0, input_scale=1.0, input_clip=None
    )
    config.gan.discriminator.filters = (32, 64, 128)
    # The raw signed difference of the volumes, each scaled by its own extremes.
    config.synthesize.update(
        difference='published',
        share_of_max=0.2,
        smoothing_mm=0.0,
        erosion_mm=0.0,
        min_component_ml=0.0,
    )
    config.network.update(published_attention=True, initial_logit=0.0)
    # 100 x (2 contrastive + 1 MSE batches) of 4 + 4 slices, then 500 x 2 batches of the sum.
    phases = {'num_epochs': 100, 'epoch_steps': 3, 'contrastive_steps': 2, 'num_steps': 1300}
    config.train.update(
        mode='published', batch_size=8, learning_rate=5e-5, compute_dtype='float32', **phases
    )
    plain = {'schedule': 'constant', 'warmup_steps': 0, 'clip_norm': 0.0, 'ema_decay': 0.0}
    config.gan.update(**plain)
    config.train.update(**plain, rounds=('targets',), round_shares=(1.0,))
    config.train.update(use_healthy=False, synthetic_share=0.0)
    config.train.augment.enabled = False
    # All contrastive labels are 1, so that no pair is negative and the loss is 0;
    # contrastive_labels='infection' is what was meant.
    config.train.losses.update(
        contrastive=1.0, temperature=1.0, contrastive_features='logits', contrastive_labels='one',
        include_self=True, mse_on='logits', clip_targets=False, binary_targets=False, doubtful=(),
    )  # fmt: skip
    config.predict.update(
        output='linear', smoothing_pixels=0.0, flip=False, smoothing_slices=0.0, border_factor=1.0
    )
    config.masks.update(min_component_ml=0.0, share_of_max=0.2)
