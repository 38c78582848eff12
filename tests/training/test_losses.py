"""Losses against another implementation's numbers, by hand, and at the edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from covseg_jax.training import losses

# compiled, so that a call costs one compilation and not one for each operation
contrastive_loss = jax.jit(
    losses.contrastive_loss, static_argnames=('temperature', 'sensitivity_weight', 'include_self')
)
sensitivity_loss = jax.jit(losses.sensitivity_loss, static_argnames='beta')
mse_loss = jax.jit(losses.mse_loss, static_argnames='on')


@pytest.fixture(scope='module')
def numbers(reference):
    return np.load(reference / 'losses_reference.npz')


@pytest.mark.parametrize('temperature', [1.0, 0.1])
@pytest.mark.parametrize('weight', [1.0, 1.5])
def test_contrastive_loss_equals_reference(numbers, temperature, weight):
    def loss(features):
        return contrastive_loss(
            features,
            numbers['labels'],
            temperature=temperature,
            sensitivity_weight=weight,
            include_self=True,
        )

    name = f'contrastive_tau{temperature}_w{weight}'
    with jax.enable_x64(True):
        value, gradient = jax.value_and_grad(loss)(jnp.asarray(numbers['features']))
    assert value.dtype == np.float64
    np.testing.assert_allclose(value, numbers[name], rtol=0, atol=1e-12)
    np.testing.assert_allclose(gradient, numbers[f'{name}_grad'], rtol=0, atol=1e-12)


@pytest.mark.parametrize('beta', [0.0, 2.0])
def test_sensitivity_loss_equals_reference(numbers, beta):
    def loss(logits):
        return sensitivity_loss(logits, numbers['targets'], beta=beta)

    with jax.enable_x64(True):
        value, gradient = jax.value_and_grad(loss)(jnp.asarray(numbers['logits']))
    np.testing.assert_allclose(value, numbers[f'sensitivity_beta{beta}'], rtol=0, atol=1e-12)
    np.testing.assert_allclose(
        gradient, numbers[f'sensitivity_beta{beta}_grad'], rtol=0, atol=1e-12
    )


def test_contrastive_loss_of_three_vectors_by_hand():
    # cosines: (0, 1) 1, (0, 2) and (1, 2) 0. Anchor 2 has no positive and is left out;
    # anchors 0 and 1: −log(w e / (w e + 1)) with w = 2
    features = jnp.array([[2.0, 0.0], [5.0, 0.0], [0.0, 1.0]])
    loss = contrastive_loss(features, jnp.array([1, 1, 0]), temperature=1.0, sensitivity_weight=2.0)
    np.testing.assert_allclose(loss, np.log1p(1 / (2 * np.e)), rtol=1e-6)


@given(st.permutations(range(8)), st.booleans())
def test_contrastive_loss_ignores_the_order_of_the_batch(order, include_self):
    features = jnp.asarray(np.random.default_rng(0).standard_normal((8, 5)), jnp.float32)
    labels, order = jnp.array([0, 1, 1, 0, 2, 1, 0, 3]), jnp.array(order)
    first, second = (
        contrastive_loss(f, n, temperature=0.1, include_self=include_self)
        for f, n in ((features, labels), (features[order], labels[order]))
    )
    np.testing.assert_allclose(first, second, rtol=1e-5)


@given(st.permutations(range(6)))
def test_pixel_losses_ignore_the_order_of_the_batch(order):
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((6, 4, 4, 1)).astype(np.float32)
    targets = rng.uniform(0, 1, logits.shape).astype(np.float32)
    for loss in (
        lambda z, t: sensitivity_loss(z, t, beta=2.0),
        lambda z, t: mse_loss(z, t, on='probability'),
    ):
        np.testing.assert_allclose(
            loss(logits, targets), loss(logits[order], targets[order]), rtol=1e-5
        )


def test_pixel_losses_of_a_signed_target_by_hand():
    logits, targets = jnp.array([[0.25]]), jnp.array([[-0.5]])
    np.testing.assert_allclose(mse_loss(logits, targets, on='logits'), 0.25**2)
    np.testing.assert_allclose(losses.mse_loss(logits, targets, on='logits', clip=False), 0.75**2)
    # BCE log(1 + e^z) - z t = 0.825939 + 0.125, times 1 + 2 (1 - σ(z)) t = 1 - 0.437823
    np.testing.assert_allclose(
        losses.sensitivity_loss(logits, targets, beta=2.0, clip=False),
        (0.825939 + 0.125) * (1 - 0.437823),
        rtol=1e-5,
    )
    np.testing.assert_allclose(sensitivity_loss(logits, targets, beta=2.0), 0.825939, rtol=1e-5)


EDGES = {
    'one class': (np.ones((4, 3)) + np.eye(4, 3), [1, 1, 1, 1]),
    'batch of one': (np.ones((1, 3)), [0]),
    'no positives': (np.eye(3), [0, 1, 2]),
}


@pytest.mark.parametrize('edge', EDGES)
def test_contrastive_loss_without_anchors_is_zero_with_zero_gradient(edge):
    features, labels = (jnp.asarray(array) for array in EDGES[edge])
    value, gradient = jax.value_and_grad(contrastive_loss)(
        features.astype(jnp.float32), labels, temperature=0.1
    )
    assert float(value) == 0
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('scale', [0.0, 1e-20, 1e-6, 1.0, 1e30])
def test_contrastive_loss_is_finite_at_the_edges(dtype, scale):
    features = np.random.default_rng(0).standard_normal((6, 4))
    features[1] = 0  # a vector without direction among the others
    features = jnp.asarray(scale * features, dtype)
    value, gradient = jax.value_and_grad(contrastive_loss)(
        features, jnp.array([0, 0, 0, 1, 1, 1]), temperature=0.01
    )
    assert value.dtype == jnp.float32
    assert gradient.dtype == dtype
    assert np.isfinite(value)
    assert np.isfinite(gradient.astype(jnp.float32)).all()
    # all similarities equal: two positives against three negatives
    if scale < 1e-12:
        np.testing.assert_allclose(value, np.log(5 / 2), rtol=1e-6)


def test_opposite_features_at_low_temperature_keep_their_gradient():
    # anchors 0 and 1 opposite, so that P underflows without the stable form
    features = jnp.array([[1.0, 0.1], [-1.0, 0.1], [1.0, 0.2], [1.0, -0.2]])
    value, gradient = jax.value_and_grad(contrastive_loss)(
        features, jnp.array([0, 0, 1, 1]), temperature=0.01
    )
    assert 10 < float(value) < 200
    assert float(jnp.abs(gradient).max()) > 1


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_pixel_losses_are_exact_at_huge_logits(dtype):
    logits = jnp.array([1e4, 1e4, -1e4, -1e4], dtype).reshape(4, 1, 1, 1)
    targets = jnp.array([0.0, 1.0, 0.0, 1.0]).reshape(4, 1, 1, 1)
    size = float(logits[0, 0, 0, 0])
    value, gradient = jax.value_and_grad(sensitivity_loss)(logits, targets, beta=2.0)
    # |z| for the false positive, 3 |z| for the miss
    np.testing.assert_allclose(value, size, rtol=1e-6)
    np.testing.assert_allclose(gradient.astype(jnp.float32).ravel(), [0.25, 0, 0, -0.75], atol=1e-6)
    value, gradient = jax.value_and_grad(mse_loss)(logits, targets)
    np.testing.assert_allclose(value, 0.5, rtol=1e-6)
    assert np.isfinite(gradient.astype(jnp.float32)).all()


def test_mse_loss_compares_probabilities_or_logits():
    logits = jnp.array([0.0, 2.0]).reshape(2, 1, 1, 1)
    targets = jnp.array([1.0, 3.0]).reshape(2, 1, 1, 1)  # clipped to 1
    sigma = 1 / (1 + np.exp(-2.0))
    np.testing.assert_allclose(mse_loss(logits, targets), (0.25 + (sigma - 1) ** 2) / 2, rtol=1e-6)
    np.testing.assert_allclose(mse_loss(logits, targets, on='logits'), 1.0, rtol=1e-6)
    with pytest.raises(ValueError, match="'probability' or 'logits'"):
        mse_loss(logits, targets, on='sigmoid')


@pytest.mark.parametrize(
    'loss', [lambda z, t, **k: sensitivity_loss(z, t, beta=2.0, **k), mse_loss]
)
def test_weights_leave_padded_rows_out(loss):
    generator = np.random.default_rng(0)
    logits = jnp.asarray(generator.standard_normal((3, 4, 4, 1)), jnp.float32)
    targets = jnp.asarray(generator.uniform(size=(3, 4, 4, 1)), jnp.float32)
    valid = jnp.array([1, 1, 0]).reshape(3, 1, 1, 1)
    actual, gradient = jax.value_and_grad(loss)(logits, targets, weights=valid)
    np.testing.assert_allclose(actual, loss(logits[:2], targets[:2]), rtol=1e-6)
    np.testing.assert_array_equal(gradient[2], 0)
    assert float(loss(logits, targets, weights=0 * valid)) == 0


def test_gan_losses_by_hand():
    real, fake = jnp.array([1.0, 0.0]), jnp.array([2.0, -2.0])
    # ½ (0 + 1) / 2 + ½ (4 + 4) / 2; ½ (1 + 9) / 2
    np.testing.assert_allclose(losses.lsgan_discriminator_loss(real, fake), 2.25)
    np.testing.assert_allclose(losses.lsgan_generator_loss(fake), 2.5)


def test_one_hot_loss_is_a_quarter_at_chance():
    chance = jnp.full((3, 2), 0.5)
    np.testing.assert_allclose(losses.one_hot_loss(chance, 1), 0.25)
    # [0.2, 0.8] against [1, 0]: (0.64 + 0.64) / 2
    np.testing.assert_allclose(losses.one_hot_loss(jnp.array([[0.2, 0.8]]), 0), 0.64, rtol=1e-6)
