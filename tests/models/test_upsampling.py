"""Up-sampling by hand, and convolutions of it in every form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from covseg_jax.models import upsampling
from covseg_jax.models.convolution import tracing_for
from covseg_jax.models.layers import Conv2D


def draw(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize('platform', ['cpu', 'cuda'])
def test_upsample_keeps_corners_and_interpolates_between(platform):
    # n = 3: output i lies at i · 2/5; along [0, 5, 10] the values are 2 i
    x = jnp.array([0.0, 5.0, 10.0]).reshape(1, 1, 3, 1)
    with tracing_for(platform):
        actual = upsampling.upsample_bilinear(x)
    np.testing.assert_allclose(actual[0, :, :, 0], [[0, 2, 4, 6, 8, 10]] * 2, atol=1e-5)


@pytest.mark.parametrize(('height', 'width'), [(4, 7), (1, 2), (3, 1)])
def test_upsample_folded_equals_native(height, width):
    x, weights = draw(0, 2, height, width, 3), draw(1, 2, 2 * height, 2 * width, 3)

    def value_and_gradient(platform):
        graded = jax.value_and_grad(lambda x: jnp.vdot(weights, upsampling.upsample_bilinear(x)))
        with tracing_for(platform):
            return graded(x)

    folded, folded_gradient = value_and_gradient('cpu')
    native, native_gradient = value_and_gradient('cuda')
    np.testing.assert_allclose(folded, native, rtol=1e-5)
    np.testing.assert_allclose(folded_gradient, native_gradient, atol=1e-5)


@pytest.mark.parametrize('platform', ['cpu', 'tpu'])
@pytest.mark.parametrize(
    ('skip_channels', 'channels', 'features'),
    [
        (0, 8, 2),  # channels are mixed first
        (3, 8, 2),
        (3, 4, 6),  # joined: few channels, many features
    ],
)
def test_convolution_of_the_upsampled_equals_the_joined_one(
    platform, skip_channels, channels, features
):
    skip = draw(0, 2, 6, 8, skip_channels) if skip_channels else None
    below, weights = draw(1, 2, 3, 4, channels), draw(2, 2, 6, 8, features)
    kernel = draw(3, 3, 3, skip_channels + channels, features)

    def value_and_gradients(platform):
        def value(skip, below, kernel):
            y = upsampling.conv_upsampled(skip, below, kernel)
            return jnp.vdot(y, weights), y

        numbers = (0, 1, 2) if skip_channels else (1, 2)
        graded = jax.jit(jax.value_and_grad(value, numbers, has_aux=True))
        with tracing_for(platform):
            return graded(skip, below, kernel)

    fast, plain = value_and_gradients(platform), value_and_gradients('cuda')
    for a, b in zip(jax.tree.leaves(fast), jax.tree.leaves(plain), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))


def test_layer_takes_what_lies_below_after_its_skip():
    skip, below = draw(0, 1, 4, 4, 2), draw(1, 1, 2, 2, 3)
    layer = Conv2D(2, 3)
    variables = layer.init(jax.random.key(0), skip, below=below)
    assert variables['params']['kernel'].shape == (3, 3, 5, 2)
    joined = jnp.concatenate([skip, upsampling.upsample_bilinear(below)], axis=-1)
    np.testing.assert_allclose(
        layer.apply(variables, skip, below=below), layer.apply(variables, joined), atol=1e-5
    )
