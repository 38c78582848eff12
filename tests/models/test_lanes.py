"""The forms for a TPU against the plain ones, on the same parameters: values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from covseg_jax.models import lanes
from covseg_jax.models.convolution import conv3d, tracing_for
from covseg_jax.models.gan3d import Discriminator, Generator
from covseg_jax.models.layers import ConvTranspose3D, GroupNorm, join, max_pool


def draw(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def assert_equal(fast, plain, *, together=False):
    """Every array to 1e-5 of its largest entry, or of the largest of all arrays."""
    of_all = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(plain))
    for a, b in zip(jax.tree.leaves(fast), jax.tree.leaves(plain), strict=True):
        assert a.shape == b.shape
        largest = of_all if together else max(float(jnp.abs(b).max()), 1e-6)
        np.testing.assert_allclose(a, b, atol=1e-5 * largest)


def test_blocks_come_back_as_the_volume():
    volume = draw(0, 2, 16, 4, 6, 3)
    blocks = lanes.split_depth(volume, 4)
    assert blocks.parts[0].shape == (8, 4, 6, 12)
    # slices 0 and 1 of a block lie half the channels apart
    np.testing.assert_array_equal(blocks.parts[0][0, ..., :3], volume[0, 0])
    np.testing.assert_array_equal(blocks.parts[0][0, ..., 6:9], volume[0, 1])
    np.testing.assert_array_equal(lanes.merge_depth(blocks), volume)


@pytest.mark.parametrize('slices', [1, 4])
@pytest.mark.parametrize('size', [1, 3, 5])
def test_convolution_of_blocks_equals_that_of_the_volume(size, slices):
    first, second = draw(0, 2, 2 * slices, 5, 4, 2), draw(1, 2, 2 * slices, 5, 4, 3)
    kernel, weights = draw(2, size, size, size, 5, 2), draw(3, 2, 2 * slices, 5, 4, 2)

    def plain(first, second, kernel):
        y = conv3d(join(first, second), kernel)
        return jnp.vdot(y, weights), y

    def blocks(first, second, kernel):
        x = join(lanes.split_depth(first, 2), second)
        y = lanes.merge_depth(lanes.conv_blocks(x, kernel, padding='SAME'))
        return jnp.vdot(y, weights), y

    both = [
        jax.value_and_grad(each, (0, 1, 2), has_aux=True)(first, second, kernel)
        for each in (blocks, plain)
    ]
    assert_equal(*both)


def test_valid_convolution_of_blocks_holds_the_outputs_there_are():
    volume, kernel = draw(0, 1, 8, 6, 7, 2), draw(1, 3, 3, 3, 2, 3)
    y = lanes.merge_depth(lanes.conv_blocks(lanes.split_depth(volume, 2), kernel, padding='VALID'))
    assert_equal(y[:, :6], conv3d(volume, kernel, padding='VALID'))


def test_normalised_blocks_equal_the_volume():
    volume = draw(0, 3, 8, 6, 7, 5)
    layer, params = GroupNorm(), {'scale': draw(1, 5), 'bias': draw(2, 5)}
    for num_blocks in (2, 8):
        blocks = layer.apply({'params': params}, lanes.split_depth(volume, num_blocks))
        assert_equal(lanes.merge_depth(blocks), layer.apply({'params': params}, volume))


def test_pooled_and_transposed_blocks_equal_the_volume():
    volume = draw(0, 1, 8, 6, 7, 3)
    assert_equal(lanes.merge_depth(max_pool(lanes.split_depth(volume, 2))), max_pool(volume))
    single = lanes.split_depth(volume, 8)  # slices alone cannot be halved
    assert_equal(max_pool(single), max_pool(volume))
    layer = ConvTranspose3D(2)
    variables = layer.init(jax.random.key(0), volume)
    blocks = layer.apply(variables, join(lanes.split_depth(volume[..., :1], 2), volume[..., 1:]))
    assert_equal(lanes.merge_depth(blocks), layer.apply(variables, volume))


@pytest.mark.parametrize('use_norm', [pytest.param(False, marks=pytest.mark.slow), True])
def test_gan_in_blocks_equals_the_plain_one(use_norm):
    volume, covid = (jax.nn.sigmoid(draw(seed, 1, 16, 16, 16, 1)) for seed in (0, 1))
    fields = {'filters': (2, 3), 'bottleneck_filters': 3, 'branch_filters': 3, 'use_norm': use_norm}
    noise = draw(2, *Generator(**fields).noise_shape(volume.shape))
    found = []
    generator, discriminator = Generator(**fields), Discriminator((2, 3))
    for platform in ('tpu', 'cpu'):

        def loss(params, d_params):
            healthy = generator.apply(params, covid, noise)
            judged = discriminator.apply(d_params, healthy)
            return jnp.square(judged[:, 1] - 1).mean() + jnp.square(healthy - volume).mean()

        with tracing_for(platform):
            params = jax.jit(generator.init)(jax.random.key(0), volume, noise)
            d_params = jax.jit(discriminator.init)(jax.random.key(1), volume)
            found.append((params, jax.jit(jax.value_and_grad(loss, (0, 1)))(params, d_params)))
    # What normalisation takes out again, as most of a bias, has gradients that nearly cancel.
    (params, fast), (same_params, plain) = found
    assert_equal(params, same_params)
    assert_equal(fast, plain, together=use_norm)
