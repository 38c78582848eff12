"""Every form of a convolution against XLA's own: value and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from covseg_jax.models.convolution import conv2d, conv3d, tracing_for


def draw(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def assert_forms_agree(function, *arguments):
    """function(*arguments): value and gradients of a CPU's and of XLA's own forms to 1e-5."""
    weights = draw(9, *jax.eval_shape(function, *arguments).shape)

    def value_and_gradients(platform):
        def total(*arguments):
            output = function(*arguments)
            return jnp.sum(output * weights), output

        numbers = tuple(range(len(arguments)))
        graded = jax.jit(jax.value_and_grad(total, numbers, has_aux=True))
        with tracing_for(platform):
            (_, output), gradients = graded(*arguments)
        return output, *gradients

    for fast, plain in zip(value_and_gradients('cpu'), value_and_gradients('cuda'), strict=True):
        assert fast.shape == plain.shape
        np.testing.assert_allclose(fast, plain, atol=1e-5 * float(jnp.abs(plain).max()))


@pytest.mark.parametrize(
    ('channels', 'features', 'size', 'stride', 'padding'),
    [
        (5, 2, 3, 1, 'SAME'),  # taps as outputs, and as inputs in the gradient
        (2, 5, 3, 1, 'VALID'),  # taps as inputs, and as outputs in the gradient
        (3, 2, 5, 1, 'SAME'),
        (3, 4, 1, 1, 'SAME'),
        (2, 3, 4, 1, 'SAME'),  # an even kernel pads unevenly
        (2, 3, 4, 2, 'SAME'),  # blocks as channels
        (2, 3, 3, 2, 'SAME'),
    ],
)
def test_conv3d_folded_equals_native(channels, features, size, stride, padding):
    def convolve(x, kernel):
        return conv3d(x, kernel, stride=stride, padding=padding)

    assert_forms_agree(
        convolve, draw(0, 2, 6, 5, 8, channels), draw(1, size, size, size, channels, features)
    )


def test_conv3d_with_fewer_slices_than_taps_equals_native():
    def convolve(x, kernel):
        return conv3d(x, kernel)

    assert_forms_agree(convolve, draw(0, 1, 1, 4, 4, 3), draw(1, 5, 5, 5, 3, 2))


@pytest.mark.parametrize(
    ('channels', 'size', 'stride', 'width'),
    [
        (1, 7, 2, 8),  # blocks as channels
        (6, 1, 2, 8),
        (6, 3, 1, 8),  # pairs of columns as channels
        (6, 3, 1, 7),
        (512, 3, 2, 8),  # patches
        (512, 3, 1, 8),
    ],
)
def test_conv2d_folded_equals_native(channels, size, stride, width):
    def convolve(x, kernel):
        return conv2d(x, kernel, stride=stride)

    assert_forms_agree(convolve, draw(0, 2, 8, width, channels), draw(1, size, size, channels, 3))
