"""The TransUNet against PyTorch's numbers: outputs, losses, gradients, running statistics."""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from covseg_jax.models import published
from covseg_jax.models.transunet import (
    ProjectionHead,
    TransformerBlock,
    TransUNet,
    interpolate_positions,
)
from covseg_jax.training import losses

TINY = {'width': 16, 'num_heads': 2, 'mlp_dim': 64, 'num_blocks': 1}


@pytest.fixture(scope='module')
def numbers(reference):
    return np.load(reference / 'transunet_reference.npz')


@pytest.fixture(scope='module')
def variables(torch_state):
    return published.transunet_variables(torch_state)


@pytest.fixture(scope='module')
def image_and_target():
    generator = np.random.default_rng(zlib.crc32(b'input'))
    image = generator.uniform(0, 1, (4, 1, 128, 128)).astype(np.float32)
    target = np.clip(generator.uniform(-1, 1, (4, 1, 128, 128)), 0, 1).astype(np.float32)
    return image.transpose(0, 2, 3, 1), target.transpose(0, 2, 3, 1)


@pytest.fixture(scope='module')
def training_step(variables, image_and_target):
    return make_training_step(variables, image_and_target, jnp.float32)


def make_training_step(variables, image_and_target, dtype):
    """Logits, losses, gradients and running statistics of one step without dropout."""
    image, target = image_and_target
    variables = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), variables)
    model = TransUNet(dropout_rate=0.0, dtype=dtype)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def step(params):
        output, updated = model.apply(
            {'params': params, 'batch_stats': variables['batch_stats']},
            jnp.asarray(image, dtype),
            train=True,
            mutable=['batch_stats'],
        )
        mse = losses.mse_loss(output.logits, target)
        sensitivity = losses.sensitivity_loss(output.logits, target, beta=2.0)
        return mse + sensitivity, (output.logits, mse, sensitivity, updated['batch_stats'])

    (_, (logits, mse, sensitivity, batch_stats)), gradients = step(variables['params'])
    return {
        'logits': logits,
        'mse': mse,
        'sensitivity': sensitivity,
        'updated': {'params': gradients, 'batch_stats': batch_stats},
    }


def find(tree, name):
    """The array that came from PyTorch's tensor `name`."""
    path, _ = published.transunet_targets(num_blocks=8)[name]
    return np.asarray(functools.reduce(lambda node, key: node[key], path, tree), np.float64)


def test_transunet_has_the_published_number_of_parameters():
    image = jnp.zeros((1, 128, 128, 1))
    params = jax.eval_shape(TransUNet().init, jax.random.key(0), image)['params']
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 66_870_129


def test_corrected_attention_equals_pytorch_in_evaluation(numbers, variables, image_and_target):
    logits = jax.jit(TransUNet().apply)(variables, image_and_target[0]).logits
    # reached: 4e-7
    np.testing.assert_allclose(logits, numbers['logits_eval_corrected'], rtol=0, atol=1e-5)


def test_published_attention_equals_pytorch_as_far_as_float32_goes(
    numbers, variables, image_and_target
):
    model = TransUNet(published_attention=True)
    logits = jax.jit(model.apply)(variables, image_and_target[0]).logits
    expected = numbers['logits_eval_published']
    # Scores 256 times as large as the corrected ones amplify rounding: these float32 numbers are
    # 1.2e-3 away from PyTorch's own float64, and PyTorch's float32 on another machine is 7.6e-4
    # away from them; in the corrected form both are within 4e-7. Corrected and published logits
    # differ by 0.1.
    np.testing.assert_allclose(logits, expected, rtol=0, atol=3e-3)
    assert np.abs(logits - expected).mean() < 3e-4


def test_training_step_equals_pytorch(numbers, training_step):
    # reached: 2.6e-5 of logits up to 4.6; 0 and 0
    np.testing.assert_allclose(training_step['logits'], numbers['logits_train'], rtol=0, atol=1e-4)
    np.testing.assert_allclose(training_step['mse'], numbers['mse'], rtol=0, atol=1e-5)
    np.testing.assert_allclose(
        training_step['sensitivity'], numbers['sensitivity'], rtol=0, atol=1e-5
    )


def gradient_norms(numbers, step):
    return [np.linalg.norm(find(step['updated'], name)) for name in numbers['grad_norm_names']]


@pytest.mark.slow
def test_every_gradient_norm_equals_pytorch(numbers, variables, image_and_target):
    # In float64, where nothing but PyTorch's own float32 rounding is between the two.
    with jax.enable_x64(True):
        step = make_training_step(variables, image_and_target, jnp.float64)
        actual = gradient_norms(numbers, step)
    # reached: 0.026 %; biases before a BatchNorm have a gradient of 0, PyTorch 1e-9 to 1e-7
    np.testing.assert_allclose(actual, numbers['grad_norms'], rtol=5e-4, atol=1e-7)


def test_gradient_norms_in_float32_are_off_by_rounding_alone(numbers, training_step):
    actual = gradient_norms(numbers, training_step)
    # reached: 0.07 to 0.13 %, by the CPU and by what XLA fuses there
    np.testing.assert_allclose(actual, numbers['grad_norms'], rtol=2e-3, atol=1e-7)


def test_running_statistics_equal_pytorch(numbers, training_step):
    actual = [find(training_step['updated'], name).mean() for name in numbers['bn_names']]
    # reached: 6e-9
    np.testing.assert_allclose(actual, numbers['bn_means'], rtol=0, atol=1e-6)


@pytest.mark.parametrize('published_attention', [False, True])
def test_transformer_block_equals_numpy(published_attention):
    block = TransformerBlock(
        num_heads=2, mlp_dim=12, published_attention=published_attention, dropout_rate=0.1
    )
    start = x = np.random.default_rng(0).standard_normal((2, 5, 8))
    variables = block.init(jax.random.key(0), x.astype(np.float32), train=False)
    params = jax.tree.map(np.float64, variables['params'])
    # fused output: (head width 4, q k v, heads 2)
    query, key, value = np.moveaxis((x @ params['qkv']['kernel']).reshape(2, 5, 4, 3, 2), 3, 0)
    scores = np.einsum('bqdh,bkdh->bhqk', query, key) * (2 if published_attention else 1 / 2)
    mixed = np.einsum('bhqk,bkdh->bqhd', scipy.special.softmax(scores, -1), value)

    def normalise(x):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)

    x = normalise(x + mixed.reshape(2, 5, 8) @ params['out']['kernel'])
    hidden = x @ params['mlp_1']['kernel'] + params['mlp_1']['bias']
    hidden = hidden * scipy.special.ndtr(hidden)  # exact GELU
    expected = normalise(x + hidden @ params['mlp_2']['kernel'] + params['mlp_2']['bias'])
    actual = block.apply(variables, start.astype(np.float32), train=False)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.fixture(scope='module')
def tiny_variables():
    return jax.jit(TransUNet(**TINY).init)(jax.random.key(0), jnp.ones((1, 32, 32, 1)))


def test_small_transunet_segments_another_size_after_interpolation(tiny_variables):
    model = TransUNet(**TINY)
    large, variables = jnp.ones((2, 48, 64, 1)), tiny_variables
    with pytest.raises(ValueError, match='5 tokens, this image has 13; use interpolate'):
        jax.eval_shape(model.apply, variables, large)
    params = interpolate_positions(variables['params'], (2, 2), (3, 4))
    output = jax.eval_shape(model.apply, {**variables, 'params': params}, large)
    assert output.logits.shape == (2, 48, 64, 1)
    assert output.features.shape == (2, 128)
    with pytest.raises(ValueError, match='multiples of 16'):
        model.apply(variables, jnp.ones((1, 40, 32, 1)))


def test_interpolated_positions_are_linear_and_keep_the_class_token():
    # class token 9; a grid of one row 0, 4 becomes 0, 1, 3, 4 with half-pixel centres
    params = {'vit': {'position_embedding': jnp.array([[9.0], [0.0], [4.0]])}, 'head': 1}
    interpolated = interpolate_positions(params, (1, 2), (1, 4))
    positions = interpolated['vit']['position_embedding']
    np.testing.assert_allclose(positions.ravel(), [9, 0, 1, 3, 4], atol=1e-6)
    assert interpolated['head'] == 1
    with pytest.raises(ValueError, match='3 tokens'):
        interpolate_positions(params, (2, 2), (4, 4))


def test_bfloat16_arithmetic_gives_float32_outputs_near_float32(tiny_variables):
    image = jax.random.uniform(jax.random.key(0), (2, 32, 32, 1))
    exact, rough = (
        jax.jit(TransUNet(**TINY, dtype=dtype).apply)(tiny_variables, image)
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert rough.logits.dtype == rough.features.dtype == jnp.float32
    np.testing.assert_allclose(rough.logits, exact.logits, atol=0.05)
    assert not np.array_equal(rough.logits, exact.logits)


def test_projection_head_equals_numpy():
    features = np.random.default_rng(0).standard_normal((3, 6)).astype(np.float32)
    head = ProjectionHead(dim=4, hidden=5)
    variables = head.init(jax.random.key(0), features)
    first, second = variables['params']['first'], variables['params']['second']
    standardised = (features - features.mean(0)) / features.std(0)
    hidden = np.maximum(standardised @ first['kernel'] + first['bias'], 0)
    expected = hidden @ second['kernel'] + second['bias']
    np.testing.assert_allclose(head.apply(variables, features), expected, atol=1e-6)


def test_projection_head_parts_features_that_nearly_coincide():
    # 1 ± 1e-3, as token means of a layer norm are: their cosines are all 1, and so was the loss's
    # gradient 0.
    rng = np.random.default_rng(0)
    features = (1 + 1e-3 * rng.standard_normal((8, 16))).astype(np.float32)
    head = ProjectionHead(dim=4)
    embedded = head.apply(head.init(jax.random.key(0), features), features)
    unit = embedded / np.linalg.norm(embedded, axis=1, keepdims=True)
    assert np.abs(unit @ unit.T - np.eye(8)).mean() < 0.7
    assert np.min(unit @ unit.T) < 0.3
