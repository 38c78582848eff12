"""Layers against numbers worked out by hand or by NumPy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from covseg_jax.models import convolution, layers


def draw(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def test_transposed_convolution_equals_placing_each_voxel():
    x, kernel = draw(0, 1, 2, 1, 3, 4), draw(1, 2, 2, 2, 4, 5)
    expected = np.zeros((1, 4, 2, 6, 5), np.float32)
    for d, h, w in np.ndindex(2, 1, 3):
        for i, j, k in np.ndindex(2, 2, 2):
            expected[0, 2 * d + i, 2 * h + j, 2 * w + k] = x[0, d, h, w] @ kernel[i, j, k] + 1
    params = {'kernel': kernel, 'bias': jnp.ones(5)}
    actual = layers.ConvTranspose3D(5).apply({'params': params}, x)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_transposed_convolution_has_the_gradients_of_its_sum():
    x, kernel, dy = draw(0, 1, 2, 1, 3, 4), draw(1, 2, 2, 2, 4, 5), draw(2, 1, 4, 2, 6, 5)
    _, pull_back = jax.vjp(convolution.conv_transpose, x, kernel)
    taps = np.asarray(dy).reshape(1, 2, 2, 1, 2, 3, 2, 5)  # (b, D, i, H, j, W, k, n)
    dx, dkernel = pull_back(dy)
    np.testing.assert_allclose(dx, np.einsum('bdihjwkn,ijkcn->bdhwc', taps, kernel), atol=1e-5)
    np.testing.assert_allclose(dkernel, np.einsum('bdihjwkn,bdhwc->ijkcn', taps, x), atol=1e-5)


def test_max_pool_takes_maxima_and_drops_an_odd_row():
    x = jnp.arange(15.0).reshape(1, 3, 5, 1)  # rows 0-4, 5-9, 10-14
    np.testing.assert_array_equal(layers.max_pool(x)[0, ..., 0], [[6, 8]])
    volume = jnp.arange(16.0).reshape(1, 2, 4, 2, 1)
    np.testing.assert_array_equal(layers.max_pool(volume).ravel(), [11, 15])


def test_max_pool_shares_the_gradient_of_ties():
    x = jnp.array([3.0, 3.0, 1.0, 3.0]).reshape(1, 2, 2, 1)
    gradient = jax.grad(lambda x: layers.max_pool(x).sum())(x)
    np.testing.assert_allclose(gradient.ravel(), [1 / 3, 1 / 3, 0, 1 / 3], rtol=1e-6)


def test_batch_norm_keeps_the_unbiased_variance():
    # values 1, 2, 3, 6: mean 3, biased variance 14/4 = 3.5, unbiased 14/3
    x = jnp.array([1.0, 2.0, 3.0, 6.0]).reshape(2, 2, 1, 1)
    norm = layers.BatchNorm()
    variables = norm.init(jax.random.key(0), x)
    y, updated = norm.apply(variables, x, train=True, mutable=['batch_stats'])
    np.testing.assert_allclose(y.ravel(), (x.ravel() - 3) / np.sqrt(3.5 + 1e-5), rtol=1e-6)
    np.testing.assert_allclose(updated['batch_stats']['mean'], [0.3], rtol=1e-6)
    np.testing.assert_allclose(updated['batch_stats']['var'], [0.9 + 0.1 * 14 / 3], rtol=1e-6)
    # evaluation: running mean 0 and variance 1
    np.testing.assert_allclose(norm.apply(variables, x), x / np.sqrt(1 + 1e-5), rtol=1e-6)


def test_batch_norm_gradient_equals_automatic_differentiation():
    x, scale, bias, weights = draw(0, 3, 4, 5), draw(1, 5), draw(2, 5), draw(3, 3, 4, 5)

    def plain(x, scale, bias):
        mean, var = x.mean((0, 1)), x.var((0, 1))
        return jnp.sum(weights * ((x - mean) / jnp.sqrt(var + 1e-5) * scale + bias))

    def own(x, scale, bias):
        norm, params = layers.BatchNorm(), {'scale': scale, 'bias': bias}
        stats = {'mean': jnp.zeros(5), 'var': jnp.ones(5)}
        variables = {'params': params, 'batch_stats': stats}
        return jnp.sum(weights * norm.apply(variables, x, train=True, mutable=['batch_stats'])[0])

    for actual, expected in zip(
        jax.grad(own, (0, 1, 2))(x, scale, bias),
        jax.grad(plain, (0, 1, 2))(x, scale, bias),
        strict=True,
    ):
        np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_spectral_norm_finds_the_largest_singular_value():
    conv = layers.Conv3D(4, 2, padding='VALID', use_spectral_norm=True)
    x = jnp.zeros((1, 2, 2, 2, 3)).at[0, 0, 1, 0, 2].set(1.0)
    variables = conv.init(jax.random.key(0), x)
    for _ in range(50):
        _, updated = conv.apply(variables, x, train=True, mutable=['spectral'])
        variables = {**variables, **updated}
    kernel = np.asarray(variables['params']['kernel'])
    largest = np.linalg.svd(kernel.reshape(-1, 4), compute_uv=False)[0]
    actual = conv.apply(variables, x)[0, 0, 0, 0]
    np.testing.assert_allclose(actual, kernel[0, 1, 0, 2] / largest, rtol=1e-4)


def test_initial_kernels_fill_their_bounds():
    # fan_in 27 · 4 = 108; fans 27 · (4 + 8) = 324
    for draw_kernel, bound in ((layers.torch_uniform, 108**-0.5), (layers.keras_uniform, 54**-0.5)):
        kernel = np.asarray(draw_kernel(jax.random.key(0), (3, 3, 3, 4, 8)))
        assert kernel.shape == (3, 3, 3, 4, 8)
        assert 0.99 * bound < np.abs(kernel).max() <= bound
        np.testing.assert_allclose(kernel.std(), bound / np.sqrt(3), rtol=0.1)


def test_dropout_keeps_the_mean_and_is_off_in_evaluation():
    x = jnp.ones((50, 40))
    dropout = layers.Dropout(0.2)
    dropped = dropout.apply({}, x, train=True, rngs={'dropout': jax.random.key(0)})
    assert set(np.unique(dropped)) == {0.0, 1.25}
    np.testing.assert_allclose(dropped.mean(), 1, atol=0.05)
    np.testing.assert_array_equal(dropout.apply({}, x, train=False), x)


def test_group_norm_equals_flax_where_groups_are_equal():
    x, params = draw(0, 2, 3, 4, 5, 8), {'scale': draw(1, 8), 'bias': draw(2, 8)}
    expected = nn.GroupNorm(2, epsilon=1e-3).apply({'params': params}, 3 * x + 5)
    actual = layers.GroupNorm().apply({'params': params}, 3 * x + 5)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_group_norm_takes_any_number_of_channels():
    # 9 channels in two groups: the first has five
    x = np.asarray(draw(0, 2, 3, 2, 2, 9))
    variables = layers.GroupNorm().init(jax.random.key(0), x)
    actual = np.asarray(layers.GroupNorm().apply(variables, x))
    for group in (slice(0, 5), slice(5, 9)):
        part = x[..., group]
        mean = part.mean((1, 2, 3, 4), keepdims=True)
        expected = (part - mean) / np.sqrt(part.var((1, 2, 3, 4), keepdims=True) + 1e-3)
        np.testing.assert_allclose(actual[..., group], expected, atol=1e-5)
