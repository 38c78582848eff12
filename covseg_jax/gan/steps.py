"""The GAN's compiled steps."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct

from covseg_jax.data.augment import add_dependent_density
from covseg_jax.data.feeds import COVID, COVID_LUNGS, IMAGE, LUNGS
from covseg_jax.data.opacities import OpacityModel, add_opacities
from covseg_jax.data.streams import stream_key
from covseg_jax.models.gan3d import Discriminator, Generator, PatchDiscriminator
from covseg_jax.training import losses
from covseg_jax.training.flat import Flat, unflatten
from covseg_jax.training.optim import minimise, update_ema
from covseg_jax.training.parts import Parts
from covseg_jax.training.step import compile_step


@struct.dataclass
class GANState:
    """State of the GAN's training. `ema` averages the generator's parameters."""

    step: jax.Array
    generator: Flat | Any
    discriminator: Flat | Any
    discriminator_stats: Any
    generator_opt: Any
    discriminator_opt: Any
    ema: Flat | Any
    key: jax.Array


@dataclasses.dataclass(frozen=True)
class GANParts(Parts):
    """What a config's `gan` group describes.

    Attributes:
      optimizers: one for each network, under the network's name in the state.
      volume_size: (D, H, W) of the training crops.
    """

    generator: Generator
    discriminator: PatchDiscriminator | Discriminator
    optimizers: dict[str, optax.GradientTransformation]
    opacities: OpacityModel
    volume_size: tuple[int, int, int]

    def init_state(self) -> GANState:
        g_key, d_key, steps_key = jax.random.split(stream_key(self.seed, 'gan'), 3)
        volume = jnp.zeros((1, *self.volume_size, 1))
        noise = jnp.zeros(self.generator.noise_shape(volume.shape))
        params = self.to_hold(self.generator.init(g_key, volume, noise)['params'])
        stats = dict(self.discriminator.init(d_key, volume))
        d_params = self.to_hold(stats.pop('params'))
        return GANState(
            step=jnp.zeros((), jnp.int32),
            generator=params,
            discriminator=d_params,
            discriminator_stats=stats,
            generator_opt=self.optimizers['generator'].init(params),
            discriminator_opt=self.optimizers['discriminator'].init(d_params),
            ema=params,
            key=jax.random.key_data(steps_key),
        )

    def update(
        self, state: GANState, network: str, loss: Callable, *arguments: Any
    ) -> tuple[GANState, Any, jax.Array]:
        """One update of the 'generator' or the 'discriminator' against loss(its params' tree,
        *arguments) -> (value, more): the state, what the loss gave, and the gradient's norm."""
        found, params, opt, norm = minimise(
            loss,
            self.optimizers[network],
            getattr(state, network),
            getattr(state, f'{network}_opt'),
            *arguments,
        )
        return state.replace(**{network: params, f'{network}_opt': opt}), found, norm


@dataclasses.dataclass(frozen=True)
class GANLosses:
    """Weights of the default recipe's losses, and what two of them need.

    Attributes:
      reconstruction: of `relative_error`: opacities are taken out of healthy lungs again.
      adversarial: G(COVID scan) should look healthy to the discriminator.
      identity: aerated voxels of a COVID scan should stay as they are; squared change in units of
        the network's scaled input.
    """

    reconstruction: float
    adversarial: float
    identity: float
    aerated_below: float  # image value of aerated voxels: 0.16 is −776 HU in the default window
    error_floor: float  # of `relative_error`, a squared image value


def draw_noise(generator: Generator, key: jax.Array, volume: jax.Array) -> jax.Array:
    """The generator's noise for one batch: z ~ U(−0.5, 0.5), method.md section 2."""
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


def masked_mean(
    values: jax.Array, mask: jax.Array, axes: tuple[int, ...] | None = None
) -> jax.Array:
    """Mean where mask is 1, of all or over some axes; 0 where it is so nowhere."""
    return (values * mask).sum(axes) / jnp.maximum(mask.sum(axes), 1.0)


_OF_A_SCAN = (1, 2, 3, 4)  # all axes but the first


def relative_error(
    restored: jax.Array, healthy: jax.Array, corrupted: jax.Array, lungs: jax.Array, floor: float
) -> jax.Array:
    """Mean over samples of the squared error inside the lungs over what was added there.

    Per sample: mean (restored − healthy)² / (mean (corrupted − healthy)² + floor). A faint opacity
    counts as much as a dense one, whose plain squared error is tens of times larger; the floor,
    a squared image value, keeps clean and nearly clean samples in.
    """
    error = masked_mean(jnp.square(restored - healthy), lungs, _OF_A_SCAN)
    added = masked_mean(jnp.square(corrupted - healthy), lungs, _OF_A_SCAN)
    return (error / (added + floor)).mean()


def _lung_patches(lungs: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """1 for the discriminator's patches that hold lung: about the others it has nothing to say."""
    return (jax.image.resize(lungs, shape, 'linear') > 0.25).astype(jnp.float32)


def _scaled(image: jax.Array, lungs: jax.Array, generator: Generator) -> jax.Array:
    """As the generator sees it, and 0 outside the lungs: what the discriminator judges."""
    return (image - generator.input_shift) * generator.input_scale * lungs


def _make_generator_loss(parts: GANParts, weights: GANLosses, *, adversarial: bool) -> Callable:
    """(params, state, batch, key) -> total, (each loss, the healthy version of COVID or None)."""
    generator, opacities = parts.generator, parts.opacities

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
            return weights.reconstruction * error, (values, None)
        covid, covid_lungs = batch[COVID], batch[COVID_LUNGS]
        logits = parts.discriminator.apply(
            {'params': unflatten(state.discriminator), **state.discriminator_stats},
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


def _make_discriminator_loss(parts: GANParts) -> Callable:
    """(params, stats, batch, fake) -> loss, (share of scans judged rightly, the new stats)."""

    def discriminator_loss(params: Any, stats: Any, batch: dict, fake: jax.Array):
        real = _scaled(batch[IMAGE], batch[LUNGS], parts.generator)
        fake = _scaled(fake, batch[COVID_LUNGS], parts.generator)
        logits, updated = parts.discriminator.apply(
            {'params': params, **stats}, join_rows(real, fake), train=True, mutable=list(stats)
        )
        patches = _lung_patches(join_rows(batch[LUNGS], batch[COVID_LUNGS]), logits.shape)
        (on_real, on_fake), (of_real, of_fake) = separate_rows(logits), separate_rows(patches)
        loss = losses.lsgan_discriminator_loss(on_real, on_fake, weights=(of_real, of_fake))
        rightly_real = (masked_mean(on_real, of_real, _OF_A_SCAN) > 0.5).mean()
        rightly_fake = (masked_mean(on_fake, of_fake, _OF_A_SCAN) <= 0.5).mean()
        return loss, ((rightly_real + rightly_fake) / 2, updated)

    return discriminator_loss


def make_gan_step(
    parts: GANParts, weights: GANLosses, *, adversarial: bool, ema_decay: float
) -> Callable[[GANState, dict], tuple[GANState, dict]]:
    """A jitted (state, batch) -> (state, metrics) of the default recipe; the state is donated.

    The batch has IMAGE, LUNGS (healthy) and COVID, COVID_LUNGS, (B, D, H, W, 1). With
    `adversarial` False only the reconstruction is learned, at about a third of the cost.
    'discriminator/accuracy' is of whole scans.
    """
    generator_loss = _make_generator_loss(parts, weights, adversarial=adversarial)
    discriminator_loss = _make_discriminator_loss(parts)

    def step(old: GANState, batch: dict, key: jax.Array) -> tuple[GANState, dict]:
        state, (total, (values, fake)), norm = parts.update(
            old, 'generator', generator_loss, old, batch, key
        )
        values = {f'loss/{name}': value for name, value in values.items()} | {
            'loss/total': total,
            'optimizer/gradient_norm': norm,
            'optimizer/learning_rate': parts.learning_rate(state.step),
        }
        if adversarial:
            fake = jax.lax.stop_gradient(fake)
            state, (loss, (accuracy, stats)), norm = parts.update(
                state, 'discriminator', discriminator_loss, state.discriminator_stats, batch, fake
            )
            state = state.replace(discriminator_stats=stats)
            values |= {
                'loss/discriminator': loss,
                'discriminator/accuracy': accuracy,
                'discriminator/gradient_norm': norm,
            }
        ema = update_ema(state.ema, state.generator, state.step, ema_decay)
        return state.replace(ema=ema), values

    return compile_step(step)


def make_heal(generator: Generator) -> Callable[[Any, jax.Array, jax.Array], jax.Array]:
    """A jitted (params, (B, D, H, W, 1) scans, key) -> healthy versions. The params are a tree
    or, as a state has them, a Flat."""

    @jax.jit
    def heal(params: Any, volume: jax.Array, key: jax.Array) -> jax.Array:
        noise = draw_noise(generator, key, volume)
        return generator.apply({'params': unflatten(params)}, volume, noise)

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
        restored = generator.apply({'params': unflatten(params)}, corrupted, noise)
        added = (corrupted - healthy) * lungs
        taken = jnp.clip(corrupted - restored, 0.0, added) * lungs
        untouched = lungs * (mask == 0)
        return {
            'mse': ((jnp.square(restored - healthy) * lungs).sum(), lungs.sum()),
            'removed': (taken.sum(), added.sum()),
            'harm': ((jnp.abs(restored - healthy) * untouched).sum(), untouched.sum()),
        }, (corrupted, restored)

    return evaluate
