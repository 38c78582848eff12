"""The published GAN recipe, kept as it was: method.md section 2 says what is wrong with it.

One iteration is three updates: the generator takes Perlin noise out of healthy scans, the
discriminator tells healthy scans from generated ones, the generator deceives it. All losses are
mean squared errors, and nothing ties a generated scan to the one that it came from.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from covseg_jax.data.feeds import COVID, IMAGE
from covseg_jax.gan.perlin import add_perlin_noise
from covseg_jax.gan.steps import GANParts, GANState, draw_noise, join_rows, separate_rows
from covseg_jax.training import losses
from covseg_jax.training.flat import unflatten
from covseg_jax.training.step import compile_step

_GENERATED, _REAL = 0, 1  # D's classes


def make_published_step(parts: GANParts) -> Callable[[GANState, dict], tuple[GANState, dict]]:
    """A jitted (state, batch) -> (state, metrics): reconstruction, D, adversarial; the state is
    donated.

    The batch has IMAGE (healthy) and COVID, (B, D, H, W, 1). Both of the generator's updates go
    through one optimizer. Its average, `state.ema`, is the generator itself: none was published.
    """

    generator, discriminator = parts.generator, parts.discriminator

    def generate(params: Any, volume: jax.Array, key: jax.Array) -> jax.Array:
        noise = draw_noise(generator, key, volume)
        return generator.apply({'params': unflatten(params)}, volume, noise)

    def judge(params: Any, volume: jax.Array, key: jax.Array) -> jax.Array:
        variables = {'params': unflatten(params)}
        return discriminator.apply(variables, volume, train=True, rngs={'dropout': key})

    def reconstruction_loss(params: Any, healthy: jax.Array, key: jax.Array):
        corrupt_key, noise_key = jax.random.split(key)
        restored = generate(params, add_perlin_noise(corrupt_key, healthy), noise_key)
        return jnp.mean(jnp.square(restored - healthy)), None

    def discriminator_loss(params: Any, real: jax.Array, fake: jax.Array, key: jax.Array):
        on_real, on_fake = separate_rows(judge(params, join_rows(real, fake), key))
        loss = losses.one_hot_loss(on_real, _REAL) + losses.one_hot_loss(on_fake, _GENERATED)
        correct = (on_real[:, _REAL] > 0.5).mean() / 2 + (on_fake[:, _REAL] <= 0.5).mean() / 2
        return loss / 2, correct

    def adversarial_loss(params: Any, d_params: Any, covid: jax.Array, key: jax.Array):
        noise_key, dropout_key = jax.random.split(key)
        fake = generate(params, covid, noise_key)
        return losses.one_hot_loss(judge(d_params, fake, dropout_key), _REAL), None

    def step(state: GANState, batch: dict, key: jax.Array) -> tuple[GANState, dict]:
        first, second, third = jax.random.split(key, 3)
        state, (reconstruction, _), norm = parts.update(
            state, 'generator', reconstruction_loss, batch[IMAGE], first
        )
        noise_key, dropout_key = jax.random.split(second)
        fake = jax.lax.stop_gradient(generate(state.generator, batch[COVID], noise_key))
        state, (on_discriminator, correct), discriminator_norm = parts.update(
            state, 'discriminator', discriminator_loss, batch[IMAGE], fake, dropout_key
        )
        state, (adversarial, _), adversarial_norm = parts.update(
            state, 'generator', adversarial_loss, state.discriminator, batch[COVID], third
        )
        values = {
            'loss/reconstruction': reconstruction,
            'loss/adversarial': adversarial,
            'loss/discriminator': on_discriminator,
            'loss/total': reconstruction + adversarial,
            'discriminator/accuracy': correct,
            'discriminator/gradient_norm': discriminator_norm,
            'optimizer/gradient_norm': jnp.hypot(norm, adversarial_norm),
            'optimizer/learning_rate': parts.learning_rate(state.step),
        }
        return state.replace(ema=state.generator), values

    return compile_step(step)
