"""The GAN's compiled steps on tiny networks: which of them moves what."""

import types

import jax
import numpy as np
import pytest

from configs import transunet
from covseg_jax.data import feeds
from covseg_jax.gan import steps, train
from covseg_jax.gan.published_step import make_published_step
from covseg_jax.gan.train import build_gan
from covseg_jax.prepare.cases import Splits
from covseg_jax.training import sharding
from tests.settings import gan_losses


def volume_batch(size):
    rng = np.random.default_rng(1)
    shape = (size, 16, 32, 32, 1)
    image = rng.uniform(0.08, 0.16, shape).astype(np.float32)
    ones = np.ones(shape, np.float32)
    return {
        feeds.IMAGE: image,
        feeds.LUNGS: ones,
        feeds.COVID: image[::-1].copy(),
        feeds.COVID_LUNGS: ones,
    }


@pytest.mark.slow
def test_gan_step_moves_both_networks_only_when_adversarial():
    config = transunet.get_config('tiny').unlock()
    parts = build_gan(config.lock())
    mesh = sharding.make_mesh(jax.devices()[:1])
    batch = sharding.shard_batch(volume_batch(2), mesh)

    def one_step(adversarial):
        step = steps.make_gan_step(parts, gan_losses(), adversarial=adversarial, ema_decay=0.9)
        state = jax.device_put(parts.make_state(), sharding.replicated(mesh))
        before = jax.device_get((state.generator, state.discriminator))
        # The first step's learning rate is 0 (warm-up): take two.
        for _ in range(2):
            state, metrics = step(state, batch)
        after = jax.device_get((state.generator, state.discriminator))
        moved = [
            any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, pair), strict=True))
            for pair in zip(before, after, strict=True)
        ]
        return moved, metrics

    assert one_step(False)[0] == [True, False]
    moved, metrics = one_step(True)
    assert moved == [True, True]
    assert 0 <= float(metrics['discriminator/accuracy'][0]) <= 1


def test_published_generators_rate_is_that_of_the_iteration():
    """It is updated twice in each, and Adam's update of a constant gradient is the rate."""
    config = transunet.get_config('published').unlock()
    config.gan.update(schedule='cosine', num_steps=4)
    parts = build_gan(config)
    adam, params = parts.optimizers['generator'], jax.numpy.ones(1)
    state, rates = adam.init(params), []
    for _ in range(4):
        updates, state = adam.update(params, state)
        rates.append(-float(updates[0]))
    expected = [float(parts.learning_rate(iteration)) for iteration in (0, 0, 1, 1)]
    assert expected[0] > 1.1 * expected[2]
    np.testing.assert_allclose(rates, expected, rtol=1e-4)


def test_gan_is_evaluated_without_held_out_scans(monkeypatch):
    volume = np.full((16, 32, 32), 0.5, np.float16)
    scan = types.SimpleNamespace(study_id='a', image=lambda: volume, lungs=lambda: volume > 0)
    monkeypatch.setattr(train, 'make_heal', lambda _: lambda ema, volume, key: volume)
    parts = build_gan(transunet.get_config('tiny'))
    evaluate = train._make_evaluation(parts, Splits((), (), (scan,), (), ()))
    _, values, pictures = evaluate(types.SimpleNamespace(ema=None))
    assert values == {}
    assert pictures.keys() == {'covid_scan_healthy_difference'}


def test_published_step_is_the_published_networks_three_updates():
    published = transunet.get_config('published')
    parts = build_gan(published)
    sizes = [
        sum(leaf.size for leaf in jax.tree.leaves(tree))
        for tree in (parts.abstract_state.generator, parts.abstract_state.discriminator)
    ]
    assert sizes == [7_861_643, 282_378]  # method.md section 2

    small = published.copy_and_resolve_references().unlock()
    small.prepare.grid = (16, 32, 32)
    small.gan.depth = 16
    small.gan.generator.filters, small.gan.generator.bottleneck_filters = (4,), 4
    small.gan.discriminator.filters = (4, 4)
    parts = build_gan(small.lock())
    step = make_published_step(parts)
    state = parts.make_state()
    before = jax.device_get((state.generator, state.discriminator))
    state, metrics = step(state, volume_batch(2))
    after = jax.device_get((state.generator, state.discriminator))
    # Adam moves a weight by its rate at each update, but for those whose gradient is 0: two updates
    # of the generator, one of the discriminator.
    for rate, updates, old, new in zip((5e-5, 1e-3), (2, 1), before, after, strict=True):
        moved = max(jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), old, new)))
        assert rate * 0.99 < moved < rate * updates * 1.01
    assert float(metrics['loss/adversarial'][0]) == pytest.approx(0.25, abs=0.1)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.ema), after[0])
