"""Weights of the published models by a rule of their names, for which tests/reference has numbers.

For a tensor called `name`: n = default_rng(crc32(name)).standard_normal(shape), scaled by what the
tensor is.
"""

import json
import pathlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from covseg_jax.models.gan3d import Discriminator, Generator
from covseg_jax.models.published import convert_weights

REFERENCE = pathlib.Path(__file__).parent / 'reference'


def _draw_normal(name: str, shape: list[int]) -> np.ndarray:
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    return generator.standard_normal(shape).astype(np.float32)


def make_torch_state() -> dict[str, np.ndarray]:
    """The TransUNet's weights under PyTorch's names and in its layout."""
    norms = ('norm', 'downsample.1', '.layer.1.', '.layer.4.')
    state = {}
    for name, shape in json.loads((REFERENCE / 'transunet_shapes.json').read_text()).items():
        normal = _draw_normal(name, shape)
        if name.endswith('running_var'):
            array = 1 + 0.1 * np.abs(normal)
        elif name.endswith('weight') and any(part in name for part in norms):
            array = 1 + 0.1 * normal
        elif name.endswith(('running_mean', 'bias', 'embedding', 'cls_token')):
            array = 0.1 * normal
        else:
            array = normal / np.sqrt(np.prod(shape[1:]))
        state[name] = array.astype(np.float32)
    return state


def make_keras_weights() -> dict[str, dict[str, np.ndarray]]:
    """{'generator': …, 'discriminator': …}: weights under Keras's names and in its layout."""
    weights = {}
    for model, shapes in json.loads((REFERENCE / 'gan3d_shapes.json').read_text()).items():
        weights[model] = {}
        for name, shape in shapes:
            normal = _draw_normal(f'{model}/{name}', shape)
            features = shape[-2] if 'transpose' in name and len(shape) == 5 else shape[-1]
            fan = np.prod(shape) / features
            scale = 0.1 if name.endswith('bias') else np.sqrt(2 / fan)
            weights[model][name] = (scale * normal).astype(np.float32)
    return weights


def generator_params(keras_weights: dict[str, np.ndarray]) -> dict:
    """Params of `Generator()` from the published generator's weights.

    Args:
      keras_weights: 'conv3d_0/kernel', 'conv3d_transpose_0/bias', … to arrays, in Keras's layout.

    Returns:
      The 'params' collection, float32.

    Raises:
      ValueError: tensors are missing, extra or mis-shaped; the one message lists them all.
    """
    model, volume = Generator(), jnp.zeros((1, 16, 16, 16, 1))
    noise = jnp.zeros(model.noise_shape(volume.shape))
    shapes = jax.eval_shape(model.init, jax.random.key(0), volume, noise)['params']
    levels = range(1, len(model.filters) + 1)
    convs = [f'encoder_{level}_conv_{part}' for level in levels for part in (1, 2)]
    convs += ['bottleneck_conv_1', *(f'bottleneck_branch_{size}' for size in (1, 3, 5))]
    convs += ['bottleneck_conv_2']
    convs += [f'decoder_{level}_conv_{part}' for level in reversed(levels) for part in (1, 2)]
    convs += ['head']
    targets = dict(_keras_targets('conv3d', convs))
    ups = [f'decoder_{level}_up' for level in reversed(levels)]
    targets |= _keras_targets('conv3d_transpose', ups, lambda kernel: kernel.swapaxes(3, 4))
    return convert_weights(keras_weights, targets, shapes, 'Generator')


def discriminator_params(keras_weights: dict[str, np.ndarray]) -> dict:
    """Params of `Discriminator()` from the published discriminator's weights.

    Args:
      keras_weights: 'conv3d_0/kernel', 'dense_0/bias', … to arrays, in Keras's layout.

    Returns:
      The 'params' collection, float32.

    Raises:
      ValueError: tensors are missing, extra or mis-shaped; the one message lists them all.
    """
    model, volume = Discriminator(), jnp.zeros((1, 32, 32, 32, 1))
    shapes = jax.eval_shape(model.init, jax.random.key(0), volume)['params']
    targets = dict(_keras_targets('conv3d', ['conv_1', 'conv_2', 'conv_3']))
    targets |= _keras_targets('dense', ['dense_1', 'dense_2', 'dense_3', 'head'])
    return convert_weights(keras_weights, targets, shapes, 'Discriminator')


def _keras_targets(kind: str, layers: list[str], kernel=np.asarray) -> dict:
    targets = {}
    for index, layer in enumerate(layers):
        targets[f'{kind}_{index}/kernel'] = ((layer, 'kernel'), kernel)
        targets[f'{kind}_{index}/bias'] = ((layer, 'bias'), np.asarray)
    return targets
