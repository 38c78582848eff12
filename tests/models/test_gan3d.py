"""The GAN's networks: published sizes and outputs, and the recipe's own variants."""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from covseg_jax.models.gan3d import Discriminator, Generator, PatchDiscriminator
from tests.reference_weights import discriminator_params, generator_params

TINY = {'filters': (2, 3), 'bottleneck_filters': 3, 'branch_filters': 3}  # 1 + 5 + 3 = 3 · 3


def count_parameters(model, *shapes):
    inputs = [jnp.zeros(shape) for shape in shapes]
    variables = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    return sum(leaf.size for leaf in jax.tree.leaves(variables['params']))


@pytest.fixture(scope='module')
def reference_inputs():
    generator = np.random.default_rng(zlib.crc32(b'input'))
    volume = generator.uniform(0, 1, (2, 16, 32, 32, 1)).astype(np.float32)
    noise = generator.uniform(-0.5, 0.5, (2, 1, 2, 2, 10)).astype(np.float32)
    larger = generator.uniform(0, 1, (2, 32, 64, 64, 1)).astype(np.float32)
    return volume, noise, larger


def test_generator_has_the_published_number_of_parameters():
    assert count_parameters(Generator(), (1, 32, 128, 128, 1), (1, 2, 8, 8, 10)) == 7_861_643


def test_discriminator_has_the_published_number_of_parameters():
    assert count_parameters(Discriminator(), (1, 32, 128, 128, 1)) == 282_378


def test_generator_equals_keras(reference, keras_weights, reference_inputs):
    volume, noise, _ = reference_inputs
    expected = np.load(reference / 'gan3d_reference.npz')['generator_output']
    params = generator_params(keras_weights['generator'])
    actual = jax.jit(Generator().apply)({'params': params}, volume, noise)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)  # reached: 1.4e-6


def test_discriminator_equals_keras(reference, keras_weights, reference_inputs):
    expected = np.load(reference / 'gan3d_reference.npz')['discriminator_output']
    params = discriminator_params(keras_weights['discriminator'])
    actual = jax.jit(Discriminator().apply)({'params': params}, reference_inputs[2])
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)  # reached: 2e-7


@pytest.fixture(scope='module')
def tiny_inputs():
    """Params of a small generator, a volume and noise for it."""
    model = Generator(**TINY)
    volume = jax.random.uniform(jax.random.key(0), (1, 4, 8, 8, 1))
    noise = jnp.ones(model.noise_shape(volume.shape))
    return jax.jit(model.init)(jax.random.key(1), volume, noise)['params'], volume, noise


def test_blend_head_takes_a_share_of_what_lies_above_the_lung(tiny_inputs):
    params, volume, noise = tiny_inputs
    model = Generator(**TINY, head='blend', input_shift=0.12, input_scale=6.0)
    kernel = jnp.zeros((1, 1, 1, params['head']['kernel'].shape[-2], 2))
    # a = 2 is an opacity of one half; r = 0.9 is 0.12 + 0.9 / 6 = 0.27 in the volume's units
    head = {'kernel': kernel, 'bias': jnp.array([2.0, 0.9])}
    actual = jax.jit(model.apply)({'params': {**params, 'head': head}}, volume, noise)
    expected = jnp.where(volume > 0.27, (volume + 0.27) / 2, volume)
    np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_blend_head_finds_back_from_a_lung_that_is_brighter_than_every_scan(tiny_inputs):
    params, volume, noise = tiny_inputs
    model = Generator(**TINY, head='blend')
    kernel = jnp.zeros((1, 1, 1, params['head']['kernel'].shape[-2], 2))

    def heal(bias):
        head = {'kernel': kernel, 'bias': bias}
        return model.apply({'params': {**params, 'head': head}}, volume, noise)

    def gradient(wanted):
        error = jax.grad(lambda bias: jnp.square(heal(bias) - wanted).sum())
        return jax.jit(error)(jnp.array([2.0, 100.0]))

    np.testing.assert_array_equal(heal(jnp.array([2.0, 100.0])), volume)
    assert gradient(volume - 0.1)[1] > 0  # a darker lung is a smaller error
    np.testing.assert_array_equal(gradient(volume + 0.1), 0)  # it cannot make a scan brighter


def test_clipped_generator_does_not_see_how_dense_dense_tissue_is(tiny_inputs):
    params, volume, noise = tiny_inputs
    model = Generator(**TINY, input_scale=6.0, input_clip=3.0)
    heal = jax.jit(model.apply)
    expected = heal({'params': params}, volume, noise)
    assert float(jnp.abs(expected).max()) > 0
    dense = jnp.where(volume > 0.5, 1.0, volume)  # 6 · 0.5 is the clip
    np.testing.assert_array_equal(heal({'params': params}, dense, noise), expected)


def test_generator_sees_the_shifted_and_scaled_volume(tiny_inputs):
    params, volume, noise = tiny_inputs
    plain, shifted = Generator(**TINY), Generator(**TINY, input_shift=0.12, input_scale=6.0)
    expected = jax.jit(plain.apply)({'params': params}, (volume - 0.12) * 6, noise)
    assert float(jnp.abs(expected).max()) > 0
    actual = jax.jit(shifted.apply)({'params': params}, volume, noise)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_generator_names_what_does_not_fit():
    volume = jnp.zeros((1, 4, 8, 8, 1))
    with pytest.raises(ValueError, match=r'multiples of \(16, 16, 16\)'):
        Generator().noise_shape((1, 24, 32, 32, 1))
    with pytest.raises(ValueError, match='= 9 channels'):
        Generator(**{**TINY, 'branch_filters': 4}).init(jax.random.key(0), volume, volume)
    with pytest.raises(ValueError, match='noise of'):
        Generator(**TINY).init(jax.random.key(0), volume, volume)


def test_discriminator_drops_out_only_in_training():
    model = Discriminator(filters=(2, 2), units=(16, 16))
    volume = jax.random.uniform(jax.random.key(0), (2, 10, 10, 10, 1))
    variables = jax.jit(model.init)(jax.random.key(1), volume)

    @functools.partial(jax.jit, static_argnames='train')
    def judge(seed, train):
        rngs = {'dropout': jax.random.key(seed)}
        return model.apply(variables, volume, train=train, rngs=rngs)

    assert not np.allclose(judge(2, train=True), judge(3, train=True))
    np.testing.assert_array_equal(judge(2, train=False), judge(3, train=False))
    np.testing.assert_allclose(judge(2, train=False).sum(axis=1), 1, rtol=1e-6)


def test_patch_discriminator_judges_patches_and_moves_its_vectors_in_training_only():
    model = PatchDiscriminator(filters=(3, 4))
    volume = jax.random.uniform(jax.random.key(0), (2, 8, 16, 12, 1))
    variables = jax.jit(model.init)(jax.random.key(1), volume)
    judge = jax.jit(model.apply, static_argnames=('train', 'mutable'))
    logits, moved = judge(variables, volume, train=True, mutable='spectral')
    _, kept = judge(variables, volume, train=False, mutable='spectral')
    assert logits.shape == (2, 2, 4, 3, 1)
    before = np.asarray(variables['spectral']['conv_1']['vector'])
    assert not np.allclose(moved['spectral']['conv_1']['vector'], before)
    np.testing.assert_array_equal(kept['spectral']['conv_1']['vector'], before)
