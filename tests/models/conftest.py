"""Weights by the rule of shared/reference/README.md, for the published models."""

import json
import zlib

import numpy as np
import pytest


def draw_normal(name: str, shape: list[int]) -> np.ndarray:
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    return generator.standard_normal(shape).astype(np.float32)


@pytest.fixture(scope='session')
def torch_state(reference) -> dict[str, np.ndarray]:
    """The TransUNet's weights under PyTorch's names and in its layout."""
    norms = ('norm', 'downsample.1', '.layer.1.', '.layer.4.')
    state = {}
    for name, shape in json.loads((reference / 'transunet_shapes.json').read_text()).items():
        normal = draw_normal(name, shape)
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


@pytest.fixture(scope='session')
def keras_weights(reference) -> dict[str, dict[str, np.ndarray]]:
    """{'generator': …, 'discriminator': …}: weights under Keras's names and in its layout."""
    weights = {}
    for model, shapes in json.loads((reference / 'gan3d_shapes.json').read_text()).items():
        weights[model] = {}
        for name, shape in shapes:
            normal = draw_normal(f'{model}/{name}', shape)
            features = shape[-2] if 'transpose' in name and len(shape) == 5 else shape[-1]
            fan = np.prod(shape) / features
            scale = 0.1 if name.endswith('bias') else np.sqrt(2 / fan)
            weights[model][name] = (scale * normal).astype(np.float32)
    return weights
