"""The GAN's run: taken from the config, fed, trained, and given back as a function."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from covseg_jax import hosts
from covseg_jax.data import feeds
from covseg_jax.data.opacities import opacity_model
from covseg_jax.data.streams import stream_key, stream_seed
from covseg_jax.errors import InputError
from covseg_jax.gan.published_step import make_published_step
from covseg_jax.gan.steps import (
    GANLosses,
    GANParts,
    GANState,
    make_gan_evaluation,
    make_gan_step,
    make_heal,
)
from covseg_jax.models.gan3d import Discriminator, Generator, PatchDiscriminator
from covseg_jax.prepare.cases import Splits
from covseg_jax.training import loop, sharding
from covseg_jax.training.checkpoint import restore_for_inference
from covseg_jax.training.logging import image_strip
from covseg_jax.training.optim import make_adam
from covseg_jax.training.parts import make_learning_rate, scale_rate


def build_gan(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh | None = None) -> GANParts:
    """Networks and optimizers, on all devices or the given mesh; nothing is computed yet.

    Raises:
      InputError: gan.recipe or gan.schedule is not one that exists.
    """
    gan = config.gan
    if gan.recipe not in ('default', 'published'):
        raise InputError(
            f"gan.recipe={gan.recipe!r} is not one of 'default', 'published'; with 'none' leave "
            'gan out of --stages'
        )
    published = gan.recipe == 'published'
    dtype = jnp.dtype(gan.compute_dtype)
    of = gan.generator
    learning_rate = make_learning_rate('gan', gan, [gan.num_steps])
    epsilon = 1e-7 if published else 1e-8  # Keras's, which the published code leaves as it is
    # Published iterations update the generator twice, and Adam counts updates.
    of_generator = (lambda count: learning_rate(count // 2)) if published else learning_rate
    return GANParts(
        seed=config.seed,
        mesh=mesh or sharding.make_mesh(),
        learning_rate=learning_rate,
        generator=Generator(
            **of,
            # The bottleneck's three branches together are as wide as what they are added to.
            branch_filters=(of.patch**2 + sum(of.filters) + of.bottleneck_filters) // 3,
            dtype=dtype,
        ),
        discriminator=(Discriminator if published else PatchDiscriminator)(
            **gan.discriminator, dtype=dtype
        ),
        optimizers={
            'generator': make_adam(of_generator, epsilon=epsilon, clip_norm=gan.clip_norm),
            # A short memory of gradients: the generator that D judges keeps moving.
            'discriminator': make_adam(
                scale_rate(gan.discriminator_learning_rate, gan),
                b1=0.9 if published else 0.5,
                epsilon=epsilon,
            ),
        },
        opacities=opacity_model(config),
        volume_size=(gan.depth, *config.prepare.grid[1:]),
    )


def gan_batch_shapes(
    config: ml_collections.ConfigDict, batch_size: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a training batch, as it is read."""
    shape = (batch_size, config.gan.depth, *config.prepare.grid[1:], 1)
    scan, lungs = (jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.float16, jnp.uint8))
    return {
        feeds.IMAGE: scan, feeds.COVID: scan, feeds.LUNGS: lungs, feeds.COVID_LUNGS: lungs,
    }  # fmt: skip


def check_gan_batch(
    config: ml_collections.ConfigDict, batch_size: int, mesh: jax.sharding.Mesh
) -> None:
    """Raises an InputError where a batch cannot be split over devices."""
    sharding.check_batch_size(batch_size, mesh, 'gan.batch_size')


def choose_gan_step(
    config: ml_collections.ConfigDict, parts: GANParts
) -> Callable[[int], Callable]:
    """Step number -> compiled step of the config's recipe."""
    gan = config.gan
    if gan.recipe == 'published':
        step = make_published_step(parts)
        return lambda number: step
    weights = GANLosses(**gan.losses)
    with_d, without_d = (
        make_gan_step(parts, weights, adversarial=adversarial, ema_decay=gan.ema_decay)
        for adversarial in (True, False)
    )
    every = gan.adversarial_every
    return lambda number: with_d if every > 0 and number % every == 0 else without_d


def train_gan(config: ml_collections.ConfigDict, splits: Splits, folder: pathlib.Path) -> None:
    """Trains the GAN, from the newest checkpoint in `folder` where there is one.

    Raises:
      InputError: batch size and devices do not fit, or the loss is not finite.
      Stopped: asked to stop; saved.
    """
    gan = config.gan
    parts = build_gan(config)
    check_gan_batch(config, gan.batch_size, parts.mesh)
    loop.run(
        name='gan',
        folder=folder,
        state=parts.make_state(),
        abstract_state=parts.abstract_state,
        feed=feeds.paired_volume_feed(
            splits.healthy_train,
            splits.train,
            batch_size=gan.batch_size,
            depth=gan.depth,
            seed=stream_seed(config.seed, 'gan'),
            host=hosts.index(),
            num_hosts=hosts.count(),
        ),
        step_at=choose_gan_step(config, parts),
        evaluate=_make_evaluation(parts, splits),
        schedule=loop.Schedule.of(gan),
    )


def _make_evaluation(parts: GANParts, splits: Splits) -> loop.Evaluate:
    """Evaluation on held-out healthy scans with fixed synthetic opacities, where there are any, and
    pictures."""
    evaluate_step = make_gan_evaluation(parts.generator, parts.opacities)
    heal = make_heal(parts.generator)
    healthy = feeds.Volumes(splits.healthy_calibration)
    covid = feeds.Volumes(splits.validation[:1] or splits.train[:1])

    def evaluate(state: GANState):
        collected, pictures = [], {}
        for number, case in enumerate(healthy.cases):
            batch = {k: feeds.in_float32(v)[None] for k, v in healthy[number].items()}
            key = stream_key(parts.seed, 'validation', case.study_id)
            metrics, (corrupted, restored) = evaluate_step(state.ema, batch, key)
            collected.append(metrics)
            pictures['synthetic_corrupted_restored_difference'] = _strip(corrupted, restored)
        scan = feeds.in_float32(covid[0][feeds.IMAGE])[None]
        healed = np.asarray(heal(state.ema, scan, stream_key(parts.seed, 'picture')))
        pictures['covid_scan_healthy_difference'] = _strip(scan, healed)
        return state, loop.mean_metrics(collected), pictures

    return evaluate


def _strip(scan: Any, healthy: Any) -> np.ndarray:
    """Three slices of (1, D, H, W, 1) arrays: scan | healthy | difference, ×2 and ×4 brighter."""
    scan, healthy = np.asarray(scan)[0, ..., 0], np.asarray(healthy)[0, ..., 0]
    depth = scan.shape[0]
    return image_strip(
        [
            [2 * scan[z], 2 * healthy[z], 4 * np.maximum(scan[z] - healthy[z], 0)]
            for z in (depth // 4, depth // 2, 3 * depth // 4)
        ]
    )


def load_generator(
    config: ml_collections.ConfigDict, folder: pathlib.Path
) -> Callable[[np.ndarray, str], np.ndarray]:
    """The trained generator of a run as ((D, H, W) scan, study id) -> (D, H, W) healthy version,
    averaged over `synthesize.num_noise` noise inputs that the run's seed and the study id give.

    Raises:
      InputError: there is no checkpoint that fits.
    """
    parts = build_gan(config, sharding.make_local_mesh())
    state, _ = restore_for_inference(folder / 'checkpoints', parts.abstract_state)
    heal_step = make_heal(parts.generator)

    def heal(scan: np.ndarray, study_id: str) -> np.ndarray:
        key = stream_key(config.seed, 'noise', study_id)
        keys = jax.random.split(key, config.synthesize.num_noise)
        volume = np.asarray(scan, np.float32)[None, ..., None]
        healthy = [np.asarray(heal_step(state.ema, volume, k))[0, ..., 0] for k in keys]
        return np.mean(healthy, axis=0)

    return heal
