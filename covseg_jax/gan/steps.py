"""The GAN's compiled steps."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from covseg_jax.data.augment import add_dependent_density
from covseg_jax.data.feeds import COVID, COVID_LUNGS, IMAGE, LUNGS
from covseg_jax.data.opacities import OpacityModel, add_opacities
from covseg_jax.data.streams import stream_key
from covseg_jax.models.gan3d import Generator
from covseg_jax.training import losses
from covseg_jax.training.finite import skip_non_finite
from covseg_jax.training.optim import update_ema
from covseg_jax.training.sharding import place_state
from covseg_jax.training.state import GANState


@dataclasses.dataclass(frozen=True)
class GANLosses:
    """Weights of the default recipe's losses.

    Attributes:
      reconstruction: opacities taken out of healthy lungs, against the untouched scan
        (`relative_error`).
      adversarial: G(COVID scan) should look healthy to the discriminator.
      identity: aerated voxels of a COVID scan should stay as they are; squared change in units of
        the network's scaled input.
      error_floor: of `relative_error`, a squared image value.
      aerated_below: image value under which a voxel counts as aerated (0.16 is −776 HU in the
        default window).
    """

    reconstruction: float
    adversarial: float
    identity: float
    aerated_below: float
    error_floor: float


def draw_noise(generator: Generator, key: jax.Array, volume: jax.Array) -> jax.Array:
    """The generator's noise for one batch: z ~ U(−0.5, 0.5), METHOD.md section 2."""
    shape = generator.noise_shape(volume.shape)
    # Drawn flat: XLA compiles draws of many axes slowly on CPU.
    drawn = jax.random.uniform(key, (math.prod(shape),), minval=-0.5, maxval=0.5)
    return drawn.reshape(shape)


def join_rows(a: jax.Array, b: jax.Array) -> jax.Array:
    """(B, …) twice -> (2B, …), a row of each in turn: a batch that is split over devices stays
    where it is."""
    return jnp.stack([a, b], axis=1).reshape(2 * a.shape[0], *a.shape[1:])


def separate_rows(both: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The way back of `join_rows`."""
    pairs = both.reshape(-1, 2, *both.shape[1:])
    return pairs[:, 0], pairs[:, 1]


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean where mask is 1; 0 where it is so nowhere."""
    return (values * mask).sum() / jnp.maximum(mask.sum(), 1.0)


def relative_error(
    restored: jax.Array, healthy: jax.Array, corrupted: jax.Array, lungs: jax.Array, floor: float
) -> jax.Array:
    """Mean over samples of the squared error inside the lungs over what was added there.

    Per sample: mean (restored − healthy)² / (mean (corrupted − healthy)² + floor). A faint opacity
    counts as much as a dense one, whose plain squared error is tens of times larger; the floor,
    a squared image value, keeps clean and nearly clean samples in.
    """
    axes = (1, 2, 3, 4)
    inside = jnp.maximum(lungs.sum(axes), 1.0)
    error = (jnp.square(restored - healthy) * lungs).sum(axes) / inside
    added = (jnp.square(corrupted - healthy) * lungs).sum(axes) / inside
    return (error / (added + floor)).mean()


def init_gan(
    generator: Generator,
    discriminator: nn.Module,
    generator_optimizer: optax.GradientTransformation,
    discriminator_optimizer: optax.GradientTransformation,
    *,
    seed: int,
    volume_size: tuple[int, int, int],
    mesh: Mesh,
) -> tuple[Callable[[], GANState], GANState]:
    """How to make a fresh state, and its shapes and shardings. `volume_size` is (D, H, W)."""

    def init() -> GANState:
        g_key, d_key, steps_key = jax.random.split(stream_key(seed, 'gan'), 3)
        volume = jnp.zeros((1, *volume_size, 1))
        noise = jnp.zeros(generator.noise_shape(volume.shape))
        params = generator.init(g_key, volume, noise)['params']
        d_variables = dict(discriminator.init(d_key, volume))
        d_params = d_variables.pop('params')
        return GANState(
            step=jnp.zeros((), jnp.int32),
            generator=params,
            discriminator=d_params,
            discriminator_stats=d_variables,
            generator_opt=generator_optimizer.init(params),
            discriminator_opt=discriminator_optimizer.init(d_params),
            ema=params,
            key=jax.random.key_data(steps_key),
        )

    return place_state(init, mesh)


def _lung_patches(lungs: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """1 for the discriminator's patches that hold lung: about the others it has nothing to say."""
    return (jax.image.resize(lungs, shape, 'linear') > 0.25).astype(jnp.float32)


def _scaled(image: jax.Array, lungs: jax.Array, generator: Generator) -> jax.Array:
    """As the generator sees it, and 0 outside the lungs: what the discriminator judges."""
    return (image - generator.input_shift) * generator.input_scale * lungs


def _make_generator_loss(
    generator: Generator,
    discriminator: nn.Module,
    opacities: OpacityModel,
    weights: GANLosses,
    *,
    adversarial: bool,
) -> Callable:
    """(params, state, batch, key) -> total, (each loss, the healthy version of COVID or None)."""

    def generator_loss(params: Any, state: GANState, batch: dict, key: jax.Array):
        vary_key, opacity_key, noise_key = jax.random.split(key, 3)
        lungs = batch[LUNGS]
        healthy = add_dependent_density(vary_key, batch[IMAGE], lungs, opacities.dependent_density)
        corrupted, _ = add_opacities(opacity_key, healthy, lungs, opacities)
        # Both scans go through in one call: half the graph to compile of two calls.
        volumes = join_rows(corrupted, batch[COVID]) if adversarial else corrupted
        noise = draw_noise(generator, noise_key, volumes)
        generated = generator.apply({'params': params}, volumes, noise)
        restored, fake = separate_rows(generated) if adversarial else (generated, None)
        error = relative_error(restored, healthy, corrupted, lungs, weights.error_floor)
        values = {'reconstruction': error}
        if not adversarial:
            return weights.reconstruction * values['reconstruction'], (values, None)
        covid, covid_lungs = batch[COVID], batch[COVID_LUNGS]
        logits = discriminator.apply(
            {'params': state.discriminator, **state.discriminator_stats},
            _scaled(fake, covid_lungs, generator),
        )
        patches = _lung_patches(covid_lungs, logits.shape)
        values['adversarial'] = losses.lsgan_generator_loss(logits, weights=patches)
        aerated = covid_lungs * (covid < weights.aerated_below)
        change = generator.input_scale * (fake - covid)
        values['identity'] = masked_mean(jnp.square(change), aerated)
        total = sum(getattr(weights, name) * value for name, value in values.items())
        return total, (values, fake)

    return generator_loss


def _make_discriminator_loss(generator: Generator, discriminator: nn.Module) -> Callable:
    """(params, stats, batch, fake) -> loss, (share of scans judged rightly, the new stats)."""

    def discriminator_loss(params: Any, stats: Any, batch: dict, fake: jax.Array):
        real = _scaled(batch[IMAGE], batch[LUNGS], generator)
        fake = _scaled(fake, batch[COVID_LUNGS], generator)
        logits, updated = discriminator.apply(
            {'params': params, **stats}, join_rows(real, fake), train=True, mutable=list(stats)
        )
        patches = _lung_patches(join_rows(batch[LUNGS], batch[COVID_LUNGS]), logits.shape)
        (on_real, on_fake), (of_real, of_fake) = separate_rows(logits), separate_rows(patches)
        loss = losses.lsgan_discriminator_loss(on_real, on_fake, weights=(of_real, of_fake))

        def verdict(values: jax.Array, inside: jax.Array) -> jax.Array:  # of each whole scan
            axes = (1, 2, 3, 4)
            return (values * inside).sum(axes) / jnp.maximum(inside.sum(axes), 1.0)

        rightly_real = (verdict(on_real, of_real) > 0.5).mean()
        rightly_fake = (verdict(on_fake, of_fake) <= 0.5).mean()
        return loss, ((rightly_real + rightly_fake) / 2, updated)

    return discriminator_loss


def make_gan_step(
    generator: Generator,
    discriminator: nn.Module,
    generator_optimizer: optax.GradientTransformation,
    discriminator_optimizer: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    opacities: OpacityModel,
    weights: GANLosses,
    *,
    adversarial: bool,
    ema_decay: float,
) -> Callable[[GANState, dict], tuple[GANState, dict]]:
    """A jitted (state, batch) -> (state, metrics) of the default recipe; the state is donated.

    The batch has IMAGE, LUNGS (healthy) and COVID, COVID_LUNGS, (B, D, H, W, 1). With
    `adversarial` False only the reconstruction is learned, at about a third of the cost.
    'discriminator/accuracy' is of whole scans.
    """
    generator_loss = _make_generator_loss(
        generator, discriminator, opacities, weights, adversarial=adversarial
    )
    discriminator_loss = _make_discriminator_loss(generator, discriminator)

    def update_discriminator(state: GANState, batch: dict, fake: jax.Array):
        (loss, (accuracy, stats)), gradients = jax.value_and_grad(discriminator_loss, has_aux=True)(
            state.discriminator, state.discriminator_stats, batch, jax.lax.stop_gradient(fake)
        )
        updates, opt = discriminator_optimizer.update(gradients, state.discriminator_opt)
        state = state.replace(
            discriminator=optax.apply_updates(state.discriminator, updates),
            discriminator_stats=stats,
            discriminator_opt=opt,
        )
        return state, {
            'loss/discriminator': (loss, 1.0),
            'discriminator/accuracy': (accuracy, 1.0),
            'discriminator/gradient_norm': (optax.global_norm(gradients), 1.0),
        }

    def step(state: GANState, batch: dict) -> tuple[GANState, dict]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        (total, (values, fake)), gradients = jax.value_and_grad(generator_loss, has_aux=True)(
            state.generator, state, batch, key
        )
        updates, generator_opt = generator_optimizer.update(gradients, state.generator_opt)
        params = optax.apply_updates(state.generator, updates)
        metrics = {f'loss/{name}': (value, 1.0) for name, value in values.items()}
        metrics |= {
            'loss/total': (total, 1.0),
            'optimizer/gradient_norm': (optax.global_norm(gradients), 1.0),
            'optimizer/learning_rate': (learning_rate(state.step), 1.0),
        }
        if adversarial:
            state, judged = update_discriminator(state, batch, fake)
            metrics |= judged
        state = state.replace(
            step=state.step + 1,
            generator=params,
            generator_opt=generator_opt,
            ema=update_ema(state.ema, params, state.step, ema_decay),
        )
        return state, metrics

    return jax.jit(skip_non_finite(step), donate_argnums=0)


def make_heal(generator: Generator) -> Callable[[Any, jax.Array, jax.Array], jax.Array]:
    """A jitted (params, (B, D, H, W, 1) scans, key) -> their healthy versions."""

    @jax.jit
    def heal(params: Any, volume: jax.Array, key: jax.Array) -> jax.Array:
        noise = draw_noise(generator, key, volume)
        return generator.apply({'params': params}, volume, noise)

    return heal


def make_gan_evaluation(
    generator: nn.Module, opacities: OpacityModel
) -> Callable[[Any, dict, jax.Array], tuple[dict, tuple[jax.Array, jax.Array]]]:
    """A jitted (params, batch, key) -> (sum, count) pairs on held-out healthy scans with synthetic
    opacities, and the corrupted and the restored scans.

    'mse' is of the restoration inside the lungs; 'removed' the share of the added density that was
    taken out again (1 is perfect); 'harm' the mean absolute change of untouched voxels.
    """

    @jax.jit
    def evaluate(params: Any, batch: dict, key: jax.Array):
        opacity_key, noise_key = jax.random.split(key)
        healthy, lungs = batch[IMAGE], batch[LUNGS]
        corrupted, mask = add_opacities(opacity_key, healthy, lungs, opacities)
        noise = draw_noise(generator, noise_key, healthy)
        restored = generator.apply({'params': params}, corrupted, noise)
        added = (corrupted - healthy) * lungs
        taken = jnp.clip(corrupted - restored, 0.0, added) * lungs
        untouched = lungs * (mask == 0)
        return {
            'mse': ((jnp.square(restored - healthy) * lungs).sum(), lungs.sum()),
            'removed': (taken.sum(), added.sum()),
            'harm': ((jnp.abs(restored - healthy) * untouched).sum(), untouched.sum()),
        }, (corrupted, restored)

    return evaluate
