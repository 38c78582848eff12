"""Weights of the published models by a rule of their names, for which tests/reference has numbers.

For a tensor called `name`: n = default_rng(crc32(name)).standard_normal(shape), scaled by what the
tensor is.
"""

import json
import pathlib
import zlib

import numpy as np

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
