"""Up-sampling by hand, and convolutions of it in every form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from covseg_jax.models import upsampling
from covseg_jax.models.layers import Conv2D


def draw(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize('conv_impl', ['folded', 'native'])
def test_upsample_keeps_corners_and_interpolates_between(conv_impl):
    # n = 3: output i lies at i · 2/5; along [0, 5, 10] the values are 2 i
    x = jnp.array([0.0, 5.0, 10.0]).reshape(1, 1, 3, 1)
    actual = upsampling.upsample_bilinear(x, conv_impl=conv_impl)
    np.testing.assert_allclose(actual[0, :, :, 0], [[0, 2, 4, 6, 8, 10]] * 2, atol=1e-5)


def test_upsample_folded_equals_native():
    x, weights = draw(0, 2, 4, 7, 3), draw(1, 2, 8, 14, 3)
    (folded, folded_gradient), (native, native_gradient) = (
        jax.jit(
            jax.value_and_grad(
                lambda x, form: jnp.vdot(weights, upsampling.upsample_bilinear(x, conv_impl=form))
            ),
            static_argnums=1,
        )(x, form)
        for form in ('folded', 'native')
    )
    np.testing.assert_allclose(folded, native, rtol=1e-5)
    np.testing.assert_allclose(folded_gradient, native_gradient, atol=1e-5)


@pytest.mark.parametrize('form', ['folded', 'lanes'])
@pytest.mark.parametrize(
    ('skip_channels', 'channels', 'features'),
    [
        (0, 8, 2),  # channels are mixed first
        (3, 8, 2),
        (3, 4, 6),  # joined: few channels, many features
    ],
)
def test_convolution_of_the_upsampled_equals_the_joined_one(
    form, skip_channels, channels, features
):
    skip = draw(0, 2, 6, 8, skip_channels) if skip_channels else None
    below, weights = draw(1, 2, 3, 4, channels), draw(2, 2, 6, 8, features)
    kernel = draw(3, 3, 3, skip_channels + channels, features)

    def value(skip, below, kernel, form):
        y = upsampling.conv_upsampled(skip, below, kernel, conv_impl=form)
        return jnp.vdot(y, weights), y

    graded = jax.jit(
        jax.value_and_grad(value, (0, 1, 2) if skip_channels else (1, 2), has_aux=True),
        static_argnums=3,
    )
    fast, plain = graded(skip, below, kernel, form), graded(skip, below, kernel, 'native')
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
