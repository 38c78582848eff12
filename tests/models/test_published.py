"""Published weights: every tensor accounted for (that they are right, the models' tests tell)."""

import numpy as np
import pytest

from covseg_jax.models import published
from tests.reference_weights import discriminator_params, generator_params


def test_transunet_error_lists_every_tensor_that_does_not_fit(torch_state):
    state = dict(torch_state)
    del state['encoder.norm1.weight']
    state['decoder.conv9.weight'] = np.zeros(3)
    state['encoder.conv1.weight'] = np.zeros((64, 1, 7, 7))
    state['encoder.vit.projection.weight'] = np.zeros((1024, 512))
    with pytest.raises(ValueError, match='TransUNet') as error:
        published.transunet_variables(state)
    message = str(error.value)
    assert 'encoder.norm1.weight: missing' in message
    assert 'decoder.conv9.weight: not a tensor of this model' in message
    assert 'encoder.conv1.weight: shape (64, 1, 7, 7)' in message
    assert 'encoder.vit.projection.weight: shape (1024, 512)' in message
    assert message.count(';') == 3
    assert '\n' not in message


def test_num_batches_tracked_is_passed_over(torch_state):
    state = {**torch_state, 'encoder.norm1.num_batches_tracked': np.array(7)}
    variables = published.transunet_variables(state)
    # 22 batch normalisations, each with a mean and a variance
    assert set(variables) == {'params', 'batch_stats'}
    np.testing.assert_array_equal(
        variables['params']['stem_norm']['scale'], torch_state['encoder.norm1.weight']
    )


def test_transunet_of_another_size_comes_along(torch_state):
    # weights for 64 × 64 images: 1 + 4 · 4 tokens
    state = {**torch_state, 'encoder.vit.embedding': np.ones((17, 1024))}
    variables = published.transunet_variables(state)
    assert variables['params']['vit']['position_embedding'].shape == (17, 1024)


def test_keras_errors_list_every_tensor_that_does_not_fit(keras_weights):
    weights = dict(keras_weights['generator'])
    del weights['conv3d_21/bias']
    # input and output axes of a transposed convolution exchanged
    weights['conv3d_transpose_0/kernel'] = np.zeros((2, 2, 2, 249, 256))
    with pytest.raises(ValueError, match='Generator') as error:
        generator_params(weights)
    assert 'conv3d_21/bias: missing' in str(error.value)
    assert 'conv3d_transpose_0/kernel: shape (2, 2, 2, 249, 256)' in str(error.value)
    with pytest.raises(ValueError, match='dense_4/kernel: not a tensor'):
        discriminator_params({**keras_weights['discriminator'], 'dense_4/kernel': np.zeros((2, 2))})
