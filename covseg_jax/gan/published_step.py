"""The published GAN recipe, kept as it was: METHOD.md section 2 says what is wrong with it.

One iteration is three updates: the generator takes Perlin noise out of healthy scans, the
discriminator tells healthy scans from generated ones, the generator deceives it. All losses are
mean squared errors, and nothing ties a generated scan to the one that it came from.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from covseg_jax.data.feeds import COVID, IMAGE
from covseg_jax.gan.perlin import PerlinModel, add_perlin_noise
from covseg_jax.gan.steps import draw_noise, join_rows, separate_rows
from covseg_jax.training import losses
from covseg_jax.training.finite import skip_non_finite
from covseg_jax.training.state import GANState

_GENERATED, _REAL = 0, 1  # D's classes


def make_published_step(
    generator: nn.Module,
    discriminator: nn.Module,
    generator_optimizer: optax.GradientTransformation,
    discriminator_optimizer: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    noise: PerlinModel,
) -> Callable[[GANState, dict], tuple[GANState, dict]]:
    """A jitted (state, batch) -> (state, metrics): reconstruction, D, adversarial; the state is
    donated.

    The batch has IMAGE (healthy) and COVID, (B, D, H, W, 1). Both of the generator's updates go
    through one optimizer. Its average, `state.ema`, is the generator itself: none was published.
    """

    def generate(params: Any, volume: jax.Array, key: jax.Array) -> jax.Array:
        return generator.apply({'params': params}, volume, draw_noise(generator, key, volume))

    def judge(params: Any, volume: jax.Array, key: jax.Array) -> jax.Array:
        return discriminator.apply({'params': params}, volume, train=True, rngs={'dropout': key})

    def reconstruction_loss(params: Any, healthy: jax.Array, key: jax.Array) -> jax.Array:
        corrupt_key, noise_key = jax.random.split(key)
        restored = generate(params, add_perlin_noise(corrupt_key, healthy, noise), noise_key)
        return jnp.mean(jnp.square(restored - healthy))

    def discriminator_loss(params: Any, real: jax.Array, fake: jax.Array, key: jax.Array):
        on_real, on_fake = separate_rows(judge(params, join_rows(real, fake), key))
        loss = losses.one_hot_loss(on_real, _REAL) + losses.one_hot_loss(on_fake, _GENERATED)
        correct = (on_real[:, _REAL] > 0.5).mean() / 2 + (on_fake[:, _REAL] <= 0.5).mean() / 2
        return loss / 2, correct

    def adversarial_loss(params: Any, d_params: Any, covid: jax.Array, key: jax.Array) -> jax.Array:
        noise_key, dropout_key = jax.random.split(key)
        fake = generate(params, covid, noise_key)
        return losses.one_hot_loss(judge(d_params, fake, dropout_key), _REAL)

    def update_generator(state: GANState, loss: Callable, *arguments: Any):
        value, gradients = jax.value_and_grad(loss)(state.generator, *arguments)
        updates, opt = generator_optimizer.update(gradients, state.generator_opt)
        params = optax.apply_updates(state.generator, updates)
        state = state.replace(generator=params, generator_opt=opt, ema=params)
        return state, value, optax.global_norm(gradients)

    def update_discriminator(state: GANState, batch: dict, key: jax.Array):
        noise_key, dropout_key = jax.random.split(key)
        fake = jax.lax.stop_gradient(generate(state.generator, batch[COVID], noise_key))
        (value, correct), gradients = jax.value_and_grad(discriminator_loss, has_aux=True)(
            state.discriminator, batch[IMAGE], fake, dropout_key
        )
        updates, opt = discriminator_optimizer.update(gradients, state.discriminator_opt)
        params = optax.apply_updates(state.discriminator, updates)
        state = state.replace(discriminator=params, discriminator_opt=opt)
        return state, value, correct, optax.global_norm(gradients)

    def step(state: GANState, batch: dict) -> tuple[GANState, dict]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        first, second, third = jax.random.split(key, 3)
        state, reconstruction, norm = update_generator(
            state, reconstruction_loss, batch[IMAGE], first
        )
        state, on_discriminator, correct, discriminator_norm = update_discriminator(
            state, batch, second
        )
        state, adversarial, adversarial_norm = update_generator(
            state, adversarial_loss, state.discriminator, batch[COVID], third
        )
        values = {
            'loss/reconstruction': reconstruction,
            'loss/adversarial': adversarial,
            'loss/discriminator': on_discriminator,
            'loss/total': reconstruction + adversarial,
            'discriminator/accuracy': correct,
            'discriminator/gradient_norm': discriminator_norm,
            'optimizer/gradient_norm': jnp.hypot(norm, adversarial_norm),
            'optimizer/learning_rate': learning_rate(state.step),
        }
        metrics = {name: (value, 1.0) for name, value in values.items()}
        return state.replace(step=state.step + 1), metrics

    return jax.jit(skip_non_finite(step), donate_argnums=0)
