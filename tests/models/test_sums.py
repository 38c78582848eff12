"""Sums over channels against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from covseg_jax.models.sums import add_bias, channel_sums


@pytest.mark.parametrize(
    'shape', [(8, 6, 4, 3), (1, 4, 5, 2), (3, 5, 7, 2), (2, 4, 6, 6, 5), (9, 4)]
)
@pytest.mark.parametrize('dtype', [np.float32, jnp.bfloat16])
def test_channel_sums_are_those_of_float64(shape, dtype):
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape) + 1, dtype)
    expected = np.asarray(x, np.float64).reshape(-1, shape[-1]).sum(0)
    found = jax.jit(channel_sums)(x)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_bias_is_added_and_its_gradient_is_the_sum():
    x, bias, dy = (np.random.default_rng(i).standard_normal(s) for i, s in enumerate(
        [(2, 4, 6, 3), (3,), (2, 4, 6, 3)]))  # fmt: skip
    y, pull_back = jax.vjp(add_bias, *(jnp.asarray(each, jnp.float32) for each in (x, bias)))
    np.testing.assert_allclose(y, x + bias, rtol=1e-6)
    dx, dbias = pull_back(jnp.asarray(dy, jnp.float32))
    np.testing.assert_allclose(dx, dy, rtol=1e-6)
    np.testing.assert_allclose(dbias, dy.sum((0, 1, 2)), rtol=1e-5)
