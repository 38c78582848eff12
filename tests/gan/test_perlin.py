"""Perlin noise of the published recipe."""

import jax
import jax.numpy as jnp
import numpy as np

from covseg_jax.gan import perlin

gradient_noise = jax.jit(perlin.gradient_noise)


def test_gradient_noise_is_zero_at_the_nodes_and_its_slope_there_is_the_gradient():
    permutation = jax.random.permutation(jax.random.key(0), 256)
    nodes = jnp.arange(40.0)
    at_nodes = gradient_noise(permutation, nodes[:, None], nodes[None, :])
    np.testing.assert_allclose(at_nodes, 0.0, atol=1e-6)

    def noise(point):
        return gradient_noise(permutation, point[0], point[1])

    angle = permutation[(permutation[3] + 7) % 256] * 2 * np.pi / 256
    slope = jax.grad(noise)(jnp.array([3.0, 7.0]))
    np.testing.assert_allclose(slope, [np.sin(angle), np.cos(angle)], atol=1e-5)


def test_gradient_noise_is_continuous_across_cells_and_bounded():
    permutation = jax.random.permutation(jax.random.key(1), 256)
    y = jnp.linspace(0.0, 300.0, 1200)[:, None]  # beyond the table: it repeats
    below = gradient_noise(permutation, y, jnp.array([4.99999]))
    above = gradient_noise(permutation, y, jnp.array([5.00001]))
    np.testing.assert_allclose(below, above, atol=1e-3)
    assert float(jnp.abs(gradient_noise(permutation, y, jnp.linspace(0.0, 9.0, 100))).max()) < 1


def test_add_perlin_noise_touches_a_quarter_of_the_slices_with_both_signs():
    image = jnp.full((2, 32, 32, 32, 1), 0.5)
    noisy = jax.jit(lambda key: perlin.add_perlin_noise(key, image))(jax.random.key(2))
    change = np.asarray(noisy - image)
    assert (np.abs(change).max((2, 3, 4)) > 0).sum(axis=1).tolist() == [8, 8]
    touched = change[np.abs(change).max((2, 3, 4)) > 0]
    assert 0.2 < (touched > 0).mean() < 0.8
    assert 0.05 < touched.std() < 0.6
    # Each slice has a noise of its own.
    assert np.abs(np.corrcoef(touched.reshape(16, -1)) - np.eye(16)).max() < 0.95
