"""Patches of pixels as channels, and back."""

import jax.numpy as jnp
import numpy as np
import pytest

from covseg_jax.models.patches import channels_to_patches, patches_to_channels


def test_patches_are_the_pixels_of_each_square_row_by_row():
    rows = patches_to_channels(jnp.arange(16.0).reshape(1, 4, 4, 1), 2)
    expected = [[[0, 1, 4, 5], [2, 3, 6, 7]], [[8, 9, 12, 13], [10, 11, 14, 15]]]
    np.testing.assert_array_equal(rows[0], expected)


@pytest.mark.parametrize(
    ('shape', 'patch'), [((2, 6, 9, 5), 3), ((2, 3, 8, 4, 2), 4), ((4, 4, 3), 1)]
)
def test_channels_go_back_to_their_pixels(shape, patch):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    there = patches_to_channels(x, patch)
    *leading, height, width, channels = shape
    assert there.shape == (*leading, height // patch, width // patch, channels * patch**2)
    np.testing.assert_array_equal(channels_to_patches(there, patch), x)
