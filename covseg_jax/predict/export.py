"""A trained network as one folder that predicts anywhere, without the config it was trained with.

    export/
      model.json            what it is, the network's fields, how studies become volumes and
                            probabilities masks
      weights.safetensors   its variables by name
      function_cpu.bin      (variables, (B, H, W, 1) slices) -> probabilities, by jax.export, any B,
                            or what model.json's volumes.output says;
      function_tpu.bin      a function a platform, each in the forms that are quick there
      function_cuda.bin
      lung_network.safetensors
                            what finds lungs before, where model.json's preparation.lungs_source is
                            'network'
      network.onnx          where asked for, for other runtimes: float32, weights included,
                            'image' (B, H, W, 1) -> 'probability' (or 'logit'); nothing here
                            reads it
      SHA256SUMS            of the files above; `sha256sum -c` reads it

Nothing in it is a pickle or code: the functions are StableHLO. JAX reads a function for about half
a year after the version that wrote it. Where it refuses one, or there is none for this platform,
the network is built from its fields and weights, as the training code builds it.

The networks that come with the program (`write_compact`) have no functions, and their kernels in
float16.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import traverse_util
from flax.errors import FlaxError
from jax import export

from covseg_jax import atomic, cpu, hosts
from covseg_jax.checksums import read_sums, sha256
from covseg_jax.errors import FileFault, InputError, one_line
from covseg_jax.imaging.masks import MaskSettings
from covseg_jax.manifest import fingerprint
from covseg_jax.models.convolution import tracing_for
from covseg_jax.predict.default import DEFAULT, INTENDED_USE, MEMBERS
from covseg_jax.predict.model import Model, Origin, average_models
from covseg_jax.prepare import lung_network
from covseg_jax.prepare.prepare_studies import PrepareSettings
from covseg_jax.segmentation.network import build_network, describe_network, make_predict
from covseg_jax.segmentation.volumes import VolumeSettings, predict_volumes

# 2: volumes.output, masks.share_of_max; 3: preparation.lung_network; 4: network.dtype, functions
# may be left out, and weights may be float16; 5: volumes.smoothing_pixels;
# 6: volumes.border_factor
FORMAT, VERSION = 'covseg_jax export', 6
PLATFORMS = ('cpu', 'tpu', 'cuda')
_JAX_NAMES = {'gpu': 'cuda'}  # of platforms, as a backend calls itself
_SUMS, _FUNCTION = 'SHA256SUMS', 'function_{}.bin'
_NAMES = {_SUMS, 'model.json', 'weights.safetensors', 'network.onnx', lung_network.FILE}
_NAMES |= {_FUNCTION.format(platform) for platform in PLATFORMS}
_EXPORT_AGAIN = 'copy or export it again'
_CALLING_CONVENTIONS = range(
    export.minimum_supported_calling_convention_version,
    export.maximum_supported_calling_convention_version + 1,
)
_LUNG_NETWORK_SUM = 'lung_network_sha256'


@dataclasses.dataclass(frozen=True)
class Exported:
    """What goes into an export beside the network."""

    preparation: PrepareSettings
    volumes: VolumeSettings
    masks: MaskSettings
    facts: Mapping[str, Any]  # what else model.json says: metrics, training data, licence
    onnx: bool = False  # write network.onnx too


def write_export(
    folder: pathlib.Path, network: nn.Module, variables: Any, contents: Exported
) -> None:
    """Writes the folder, whole or not at all; an export that is there and as it was written is
    replaced. Each platform gets its form of the network's convolutions; `variables` is a nested
    dict.

    Raises:
      InputError: the folder holds something else, or an ONNX file is wanted and jax2onnx is not
        installed.
    """
    refuse_other_contents(folder)
    to_onnx = _import_to_onnx() if contents.onnx else None
    variables = jax.device_get(variables)
    (batch,) = export.symbolic_shape('b')
    slices = jax.ShapeDtypeStruct((batch, *contents.preparation.grid[1:], 1), jnp.float32)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), variables)
    description = {
        'format': FORMAT,
        'version': VERSION,
        'intended_use': INTENDED_USE,
        'preparation': dataclasses.asdict(contents.preparation) | {'lung_network': ''},
        'volumes': dataclasses.asdict(contents.volumes),
        'masks': dataclasses.asdict(contents.masks),
        'network': describe_network(network),
        **contents.facts,
    }
    with atomic.new_folder(folder) as temporary:
        for platform in PLATFORMS:
            # Made anew for each: JAX remembers what it traced of a function.
            predict = make_predict(network, contents.volumes.output)
            with tracing_for(platform):
                function = export.export(predict, platforms=(platform,))(shapes, slices)
            (temporary / _FUNCTION.format(platform)).write_bytes(function.serialize())
        if to_onnx:
            _write_onnx(to_onnx, network, variables, contents, temporary / 'network.onnx')
        flat = traverse_util.flatten_dict(variables, sep='/')
        tensors = {name: np.ascontiguousarray(value) for name, value in flat.items()}
        _write_weights(temporary, tensors)
        if contents.preparation.lungs_source == 'network':
            weights = pathlib.Path(contents.preparation.lung_network or lung_network.SHIPPED)
            (temporary / lung_network.FILE).write_bytes(weights.read_bytes())
        _write_description_and_sums(temporary, description)
        refuse_other_contents(folder)  # it took a while


def _write_weights(folder: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    # Not save_file, whose file nobody but its owner may read.
    (folder / 'weights.safetensors').write_bytes(safetensors.numpy.save(tensors))


def _write_description_and_sums(folder: pathlib.Path, description: Mapping[str, Any]) -> None:
    text = json.dumps(description, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / 'model.json').write_text(text + '\n', encoding='utf-8')
    sums = {path.name: sha256(path) for path in sorted(folder.iterdir())}
    (folder / _SUMS).write_text(''.join(f'{each}  {name}\n' for name, each in sums.items()))


def write_compact(folder: pathlib.Path, source: pathlib.Path) -> None:
    """Writes an export in the form in which a model comes with the program: without functions,
    kernels in float16, and without the lung network where it is the program's own.

    Raises:
      InputError: the source is no export or does not say of what network, or the folder holds
        something else.
    """
    refuse_other_contents(folder)
    sums, description = _check_sums(source), _read_description(source / 'model.json')
    tensors = {name: _shrink(each) for name, each in _read_tensors(source).items()}
    # Version 4's; an earlier one does not say its dtype.
    description |= {'version': VERSION, 'network': describe_network(_rebuild(source, description))}
    own = lung_network.FILE if lung_network.FILE in sums else ''
    if own and sums[own] == sha256(lung_network.SHIPPED):
        description[_LUNG_NETWORK_SUM], own = sums[own], ''
    with atomic.new_folder(folder) as temporary:
        _write_weights(temporary, tensors)
        if own:
            (temporary / own).write_bytes((source / own).read_bytes())
        _write_description_and_sums(temporary, description)


def _shrink(tensor: np.ndarray) -> np.ndarray:
    """Kernels and embeddings, nearly all of the bytes, as float16: each is rounded by itself, and
    hundreds are summed. Vectors stay float32: a variance may lie outside float16's range, and a
    rounded mean or bias shifts a whole channel."""
    is_small = tensor.ndim > 1 and np.abs(tensor).max(initial=0) <= np.finfo(np.float16).max
    return tensor.astype(np.float16 if is_small else np.float32)


def _import_to_onnx() -> Callable:
    try:
        from jax2onnx import to_onnx
    except ImportError as error:
        raise InputError(
            'export.onnx=true needs jax2onnx, which is not among the requirements; '
            'pip install jax2onnx==0.13.0'
        ) from error
    return to_onnx


def _write_onnx(
    to_onnx: Callable, network: nn.Module, variables: Any, contents: Exported, path: pathlib.Path
) -> None:
    # ONNX Runtime cannot add bfloat16; what is quick on a CPU is quick there too.
    predict = make_predict(network.clone(dtype=jnp.float32), contents.volumes.output)
    with tracing_for('cpu'):
        to_onnx(
            functools.partial(predict, variables),
            [('B', *contents.preparation.grid[1:], 1)],
            return_mode='file',
            output_path=str(path),
            input_names=['image'],
            output_names=['logit' if contents.volumes.output == 'linear' else 'probability'],
        )


def refuse_other_contents(folder: pathlib.Path) -> None:
    """To be called before the folder is replaced: it must be empty or new, or an export whose files
    all have their checksums.

    Raises:
      InputError: it holds a file that was not exported, or that was changed since.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise InputError(f'{folder}: is not a folder; name one that is new')
    files = sorted(folder.iterdir()) if folder.exists() else []
    sums = {}
    with contextlib.suppress(FileFault, OSError):
        _read_description(folder / 'model.json')  # folders of other programs have checksums too
        sums = read_sums(folder / _SUMS)
    for path in files:
        is_ours = path.name in _NAMES and path.is_file() and not path.is_symlink() and bool(sums)
        if not is_ours or (path.name != _SUMS and sums.get(path.name) != sha256(path)):
            raise InputError(
                f'{path}: is in the way: it was not exported, or it was changed since; name a new '
                'folder, or move it elsewhere'
            )


def load(path: str | os.PathLike = DEFAULT, *others: str | os.PathLike) -> Model:
    """Loads an export, or several whose probabilities are averaged. 'default' is the model that
    comes with the program, which may be several itself.

    Raises:
      InputError: a folder is no export, is damaged, was written by a newer version, can neither be
        read by this JAX nor built again, or the exports see studies in different ways.
    """
    named = [
        (each, folder)
        for each in (path, *others)
        for folder in (MEMBERS if each == DEFAULT else (pathlib.Path(each),))
    ]
    return average_models([_load_one(folder, str(name)) for name, folder in named])


def _load_one(folder: pathlib.Path, name: str) -> Model:
    atomic.recover(folder)
    sums = _check_sums(folder)
    description = _read_description(folder / 'model.json')
    # Version 1 knew no other output, versions before 5 no smoothing of slices, and before 6 all
    # pixels of the lungs were alike.
    earlier = {'output': 'sigmoid', 'smoothing_pixels': 0.0, 'border_factor': 1.0}
    volumes = VolumeSettings(**earlier | description['volumes'])
    # Versions 1 and 2 knew none.
    preparation = PrepareSettings(**{'lung_network': '', **description['preparation']})
    if lung_network.FILE in sums:  # its own, whatever comes with this program
        own = str(folder / lung_network.FILE)
        preparation = dataclasses.replace(preparation, lung_network=own)
    variables = traverse_util.unflatten_dict(_read_tensors(folder), sep='/')
    slices = jax.ShapeDtypeStruct((volumes.batch_size, *preparation.grid[1:], 1), jnp.float32)
    call = _make_call(folder, sums, description, variables, slices)
    return Model(
        probabilities=tuple(
            predict_volumes(functools.partial(call, jax.device_put(variables, device)), volumes)
            for device in jax.local_devices()
        ),
        preparation=preparation,
        masks=MaskSettings(**description['masks']),
        identity=fingerprint(sums),
        description=description,
        origins=(
            Origin(
                name,
                description.get('network', {}).get('name', ''),
                volumes,
                description.get('config'),
                description.get('checkpoint_step'),
                description.get('training_data'),
                sums,
                preparation.grid[1:],
            ),
        ),
    )


def read_variables(folder: pathlib.Path) -> dict:
    """An export's variables, nested and float32, for a training that goes on from them.

    Raises:
      InputError: the folder is no export, or is damaged.
    """
    _check_sums(folder)
    return traverse_util.unflatten_dict(_read_tensors(folder), sep='/')


def _read_tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """The variables by name, float32."""
    tensors = safetensors.numpy.load_file(folder / 'weights.safetensors')
    return {name: np.asarray(tensor, np.float32) for name, tensor in tensors.items()}


def _make_call(
    folder: pathlib.Path,
    sums: Mapping[str, str],
    description: Mapping[str, Any],
    variables: Any,
    slices: jax.ShapeDtypeStruct,
) -> Callable[[Any, jax.Array], jax.Array]:
    """A jitted (variables, slices) -> what the network says of each pixel: the export's function,
    or the network built again."""
    platform = _JAX_NAMES.get(jax.default_backend(), jax.default_backend())
    # On a CPU computed as the program computes, whatever the caller's process has set.
    options = cpu.compiler_options() if platform == 'cpu' else {}
    jit = functools.partial(jax.jit, compiler_options=options or None)
    name, refusal = _FUNCTION.format(platform), f'it has no function for {platform}'
    if name in sums:
        try:
            return _read_function(folder, name, jit, variables, slices)
        except FileFault:
            raise
        except Exception as error:  # nothing checks the content: JAX and MLIR raise whatever it is
            refusal = f'JAX {jax.__version__} does not read its {name} ({one_line(error)})'
    try:
        network = _rebuild(folder, description)
    except InputError as error:
        raise InputError(f'{folder}: {refusal}, and {error}') from error
    if name in sums and hosts.is_first():
        print(
            f'note: {folder}: {refusal}; the network is built from its weights instead',
            file=sys.stderr,
        )
    call = jit(make_predict(network, description['volumes'].get('output', 'sigmoid')))
    try:
        call.lower(variables, slices)  # the first prediction does not do it again
    except (FlaxError, TypeError, ValueError) as error:
        raise _misfit(folder, 'the network of model.json') from error
    return call


def _read_function(
    folder: pathlib.Path, name: str, jit: Callable, variables: Any, slices: jax.ShapeDtypeStruct
) -> Callable[[Any, jax.Array], jax.Array]:
    function = export.deserialize(bytearray((folder / name).read_bytes()))
    version = function.calling_convention_version
    if version not in _CALLING_CONVENTIONS:  # JAX would try
        raise ValueError(f'calling convention {version}')
    (wanted, _), _ = jax.tree.unflatten(function.in_tree, function.in_avals)
    if _shapes(wanted) != _shapes(variables):
        raise _misfit(folder, 'the function')
    call = jit(function.call)
    call.lower(variables, slices)  # only here does JAX read the program itself
    return call


def _misfit(folder: pathlib.Path, what: str) -> FileFault:
    return FileFault(folder / 'weights.safetensors', f'does not fit {what}', _EXPORT_AGAIN)


def _shapes(variables: Any) -> Any:
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), variables)


def _rebuild(folder: pathlib.Path, description: Mapping[str, Any]) -> nn.Module:
    """The network that model.json describes."""
    try:
        # Versions before 4 do not say the dtype; float32 is at least as exact as the others.
        return build_network({'dtype': 'float32', **description['network']})
    except (InputError, KeyError, TypeError) as error:
        raise FileFault(
            folder / 'model.json', 'does not say what network it is of, or of another version',
            'export it again',
        ) from error  # fmt: skip


def _check_sums(folder: pathlib.Path) -> dict[str, str]:
    """The export's files and their checksums, all of them right."""
    path = folder / _SUMS
    if not path.is_file():
        raise InputError(f'{folder}: not an export (no {_SUMS} in it); --stages=export writes one')
    sums = read_sums(path)
    for name in ('model.json', 'weights.safetensors'):
        if name not in sums:
            raise FileFault(path, f'says nothing of {name}', _EXPORT_AGAIN)
    for name, expected in sums.items():
        file = folder / name
        if pathlib.Path(name).name != name or not file.is_file():
            raise FileFault(file, 'is missing', _EXPORT_AGAIN)
        if sha256(file) != expected:
            raise FileFault(file, f'is not the file that was exported (see {_SUMS})', _EXPORT_AGAIN)
    return sums


def _read_description(path: pathlib.Path) -> dict:
    try:
        description = json.loads(path.read_text(encoding='utf-8'))
        is_export, version = description['format'] == FORMAT, int(description['version'])
    except (ValueError, KeyError, TypeError):
        is_export, version = False, 0
    if not is_export:
        raise FileFault(path, f'is not of a {FORMAT}', 'name the folder of one')
    if version > VERSION:
        raise FileFault(
            path, f'is of version {version}, this program knows {VERSION}',
            'take a newer covseg_jax',
        )  # fmt: skip
    return description
