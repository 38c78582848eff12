"""Published PyTorch weights of the TransUNet -> a checkpoint that a run goes on from."""

import contextlib
import math
import pathlib
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
import numpy as np
import safetensors
import safetensors.numpy

from covseg_jax.archives import check_unpacked_size
from covseg_jax.errors import InputError
from covseg_jax.models import published
from covseg_jax.models.transunet import GRID_STEP, interpolate_positions
from covseg_jax.segmentation.train import build_segmentation
from covseg_jax.training import sharding
from covseg_jax.training.checkpoint import Checkpoints
from covseg_jax.training.flat import unflatten

_MOST_BYTES = 16 * 2**30  # of all tensors; the published TransUNet has 0.1 GB


def read_tensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The named tensors of a .safetensors, .npz, .pt or .pth file; nothing in it is executed.

    A .pt file needs torch, which is not among the requirements. A state_dict that lies one level
    deep in it ('model', 'state_dict', …) is found.

    Raises:
      InputError: the file is not there, not of such a kind, damaged, or holds something else.
    """
    readers = {
        '.safetensors': safetensors.numpy.load_file,
        '.npz': _read_npz,
        '.pt': _read_torch,
        '.pth': _read_torch,
    }
    if path.suffix not in readers:
        raise InputError(f'{path}: not a weights file; use {", ".join(readers)}')
    if not path.is_file():
        raise InputError(f'{path}: no such file')
    try:
        return readers[path.suffix](path)
    except (
        OSError,
        ValueError,
        EOFError,
        RuntimeError,  # an entry that is encrypted, or packed in a way that zipfile does not know
        zipfile.BadZipFile,
        zlib.error,
        safetensors.SafetensorError,
    ) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f'{path}: cannot be read as {path.suffix} ({line}); copy it again'
        ) from error


def _read_npz(path: pathlib.Path) -> dict[str, np.ndarray]:
    check_unpacked_size(path, _MOST_BYTES)
    _check_array_sizes(path)
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def _check_array_sizes(path: pathlib.Path) -> None:
    """NumPy takes the memory that an array's header asks for before it reads the array.

    Raises:
      ValueError: an entry is not an array, or has another size than its header says.
    """
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            with archive.open(entry) as file:
                version = np.lib.format.read_magic(file)
                if version not in _READ_HEADER:
                    raise ValueError(f'{entry.filename} is of a version of .npy that is not known')
                shape, _, dtype = _READ_HEADER[version](file)
                expected = file.tell() + math.prod(shape) * dtype.itemsize
            if entry.file_size != expected and not dtype.hasobject:  # those are refused as such
                raise ValueError(
                    f'{entry.filename} has {entry.file_size:,} bytes, and its header promises '
                    f'{expected:,}'
                )


_READ_HEADER = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def _read_torch(path: pathlib.Path) -> dict[str, np.ndarray]:
    if zipfile.is_zipfile(path):  # as torch has saved since 1.6
        check_unpacked_size(path, _MOST_BYTES)
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f'{path}: reading a PyTorch file needs torch; pip install torch, or save the '
            'state_dict as .safetensors where it is'
        ) from error
    import pickle

    try:
        content = torch.load(path, map_location='cpu', weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise InputError(
            f'{path}: not a file of plain weights, and nothing else is loaded; save '
            'model.state_dict() alone'
        ) from error
    inside = [value for value in content.values() if isinstance(value, Mapping)]
    if inside:
        content = max(inside, key=len)
    return {
        name: tensor.float().numpy() for name, tensor in content.items() if torch.is_tensor(tensor)
    }


def import_transunet(
    config: ml_collections.ConfigDict, tensors: Mapping[str, np.ndarray], folder: pathlib.Path
) -> None:
    """Writes checkpoint 0 of a run in `folder`, with the published weights in it, for training and
    prediction. Position embeddings are interpolated to `prepare.grid`.

    Raises:
      InputError: the tensors are not a TransUNet's or not of the config's sizes, or there is a
        checkpoint already.
    """
    if config.network.name != 'transunet':
        raise InputError(f'network.name={config.network.name!r}: weights are for a transunet only')
    try:
        variables = published.transunet_variables(tensors)
    except ValueError as error:
        raise InputError(str(error)) from error
    parts = build_segmentation(config)
    height, width = (size // GRID_STEP for size in config.prepare.grid[1:])
    params = variables['params']
    tokens = params['vit']['position_embedding'].shape[0] - 1
    side = round(tokens**0.5)
    variables['params'] = interpolate_positions(params, (side, tokens // side), (height, width))
    state = parts.make_state()
    _check_sizes(variables, jax.eval_shape(unflatten, state.ema))
    network = {name: parts.to_hold(tree) for name, tree in variables.items()}
    network = jax.device_put(network, sharding.replicated(parts.mesh))
    with contextlib.closing(Checkpoints(folder / 'checkpoints')) as checkpoints:
        if checkpoints.latest_step() is not None:
            raise InputError(
                f'{folder}: there are checkpoints already; import into a new --workdir'
            )
        state = state.replace(
            params=state.params | {'network': network['params']},
            batch_stats=network['batch_stats'],
            ema=network,
        )
        checkpoints.save(0, state, {})


def _check_sizes(variables: Any, expected: Any) -> None:
    found, wanted = (
        {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (variables, expected))
    )
    faults = [
        f'{name} is {found.get(name)}, should be {wanted.get(name)}'
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name)
    ]
    if faults:
        raise InputError(
            "the weights are of another size than the config's network (width, mlp_dim, "
            f'num_blocks): {"; ".join(faults[:3])}; {len(faults)} tensors differ'
        )
