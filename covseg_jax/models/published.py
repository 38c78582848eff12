"""Weights of the published PyTorch TransUNet as variables of the model here.

Pure functions on mappings of names to arrays; `segmentation/import_weights.py` reads the files.
PyTorch has convolutions (O, I, H, W) and linear layers (O, I). Names are those of
mkara44/transunet_pytorch.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from covseg_jax.models.transunet import GRID_STEP, TransUNet

Path = tuple[str, ...]  # names inside each other, from the collection on or inside one
Target = tuple[Path, Callable[[np.ndarray], np.ndarray]]  # and how the array is turned


def transunet_variables(torch_state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Variables of `TransUNet(published_attention=True)` from the published model's state_dict.

    Widths and depth are read from the tensors, so that models of other sizes come along.
    num_batches_tracked, which PyTorch keeps and nothing needs, is passed over.

    Args:
      torch_state: PyTorch's names ('encoder.conv1.weight', …) to arrays.

    Returns:
      {'params': …, 'batch_stats': …}, float32.

    Raises:
      ValueError: tensors are missing, extra or mis-shaped; the one message lists them all.
    """
    unused = 'num_batches_tracked'
    state = {name: array for name, array in torch_state.items() if not name.endswith(unused)}
    model, side = _transunet_like(state)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, side, side, 1)))
    return convert_weights(state, transunet_targets(model.num_blocks), shapes, 'TransUNet')


def _conv_kernel(array: np.ndarray) -> np.ndarray:
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array


def _transunet_like(state: Mapping[str, np.ndarray]) -> tuple[TransUNet, int]:
    """The TransUNet, and the side of its square image, that most of the tensors were made for.

    Tensors vote, so that a single mis-shaped one is named by the comparison of all shapes instead
    of being followed.
    """

    def vote(ending: str, axis: int, published: int) -> int:
        shapes = [np.shape(array) for name, array in state.items() if name.endswith(ending)]
        sizes = Counter(shape[axis] for shape in shapes if len(shape) > axis)
        return max(sizes, key=sizes.get) if sizes else published

    block = 'encoder.vit.transformer.layer_blocks.'
    blocks = {name.removeprefix(block).split('.')[0] for name in state if name.startswith(block)}
    side = round((vote('vit.embedding', 0, 65) - 1) ** 0.5)
    model = TransUNet(
        width=max(vote('layer_norm1.weight', 0, 1024) // 8, 8),
        num_heads=1,  # no shape depends on it
        mlp_dim=vote('mlp_layers.0.bias', 0, 512),
        num_blocks=len(blocks) or 8,
        num_classes=vote('decoder.conv1.bias', 0, 1),
    )
    return model, max(side, 1) * GRID_STEP


def transunet_targets(num_blocks: int) -> dict[str, Target]:
    """PyTorch's names → where they go and how they are turned."""
    targets: dict[str, Target] = {}
    for conv, norm, (*folders, name) in _convolutions():
        layer = (*folders, f'{name}_conv')
        targets[f'{conv}.weight'] = (('params', *layer, 'kernel'), _conv_kernel)
        if conv.startswith('decoder.') or conv == 'encoder.conv2':
            targets[f'{conv}.bias'] = (('params', *layer, 'bias'), np.asarray)
        layer = (*folders, f'{name}_norm')
        targets[f'{norm}.weight'] = (('params', *layer, 'scale'), np.asarray)
        targets[f'{norm}.bias'] = (('params', *layer, 'bias'), np.asarray)
        targets[f'{norm}.running_mean'] = (('batch_stats', *layer, 'mean'), np.asarray)
        targets[f'{norm}.running_var'] = (('batch_stats', *layer, 'var'), np.asarray)
    targets['decoder.conv1.weight'] = (('params', 'head', 'kernel'), _conv_kernel)
    targets['decoder.conv1.bias'] = (('params', 'head', 'bias'), np.asarray)
    vit = ('params', 'vit')
    targets['encoder.vit.embedding'] = ((*vit, 'position_embedding'), np.asarray)
    targets['encoder.vit.cls_token'] = ((*vit, 'class_token'), lambda array: array.reshape(-1))
    linear = [('projection', ('projection',), True)]
    for index in range(num_blocks):
        block, layer = f'transformer.layer_blocks.{index}', f'block_{index}'
        linear += [
            (f'{block}.multi_head_attention.qkv_layer', (layer, 'qkv'), False),
            (f'{block}.multi_head_attention.out_attention', (layer, 'out'), False),
            (f'{block}.mlp.mlp_layers.0', (layer, 'mlp_1'), True),
            (f'{block}.mlp.mlp_layers.3', (layer, 'mlp_2'), True),
        ]
        for part in (1, 2):
            name = f'encoder.vit.{block}.layer_norm{part}'
            path = (*vit, layer, f'norm_{part}')
            targets[f'{name}.weight'] = ((*path, 'scale'), np.asarray)
            targets[f'{name}.bias'] = ((*path, 'bias'), np.asarray)
    for name, layer, has_bias in linear:
        targets[f'encoder.vit.{name}.weight'] = ((*vit, *layer, 'kernel'), np.transpose)
        if has_bias:
            targets[f'encoder.vit.{name}.bias'] = ((*vit, *layer, 'bias'), np.asarray)
    return targets


def _convolutions() -> Iterator[tuple[str, str, Path]]:
    """PyTorch's names of each convolution and of the batch normalisation behind it, and where both
    are here, without '_conv' and '_norm'."""
    yield 'encoder.conv1', 'encoder.norm1', ('stem',)
    yield 'encoder.conv2', 'encoder.norm2', ('neck',)
    for level in (1, 2, 3):
        name, layer = f'encoder.encoder{level}', f'encoder_{level}'
        yield f'{name}.downsample.0', f'{name}.downsample.1', (layer, 'shortcut')
        for number, part in enumerate(('first', 'second', 'third'), 1):
            yield f'{name}.conv{number}', f'{name}.norm{number}', (layer, part)
    for level in (1, 2, 3, 4):
        name, layer = f'decoder.decoder{level}.layer', f'decoder_{level}'
        yield f'{name}.0', f'{name}.1', (layer, 'first')
        yield f'{name}.3', f'{name}.4', (layer, 'second')


def convert_weights(
    state: Mapping[str, np.ndarray], targets: Mapping[str, Target], shapes: Any, model: str
) -> dict[str, Any]:
    """Nested arrays in the structure of `shapes`; every tensor accounted for, or ValueError."""
    faults = [f'{name}: missing' for name in targets if name not in state]
    faults += [f'{name}: not a tensor of this model' for name in state if name not in targets]
    converted: dict[str, Any] = {}
    for name, (path, convert) in targets.items():
        if name not in state:
            continue
        *folders, leaf = path
        expected = functools.reduce(lambda tree, key: tree[key], path, shapes)
        array = np.asarray(state[name], np.float32)
        turned = convert(array) if array.ndim else array
        if turned.shape != expected.shape:
            faults.append(f'{name}: shape {array.shape} does not fit {"/".join(path)}')
        place = converted
        for key in folders:
            place = place.setdefault(key, {})
        place[leaf] = jnp.asarray(turned)
    if faults:
        raise ValueError(f'weights do not fit the published {model}: ' + '; '.join(faults))
    return converted
