"""The model that a training goes on from, `train.init`: which it is, and whether it fits a config.

Only `load` imports JAX: a model that does not fit is refused before the first stage begins.
"""

import dataclasses
import json
import pathlib
import shlex
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from covseg_jax import hosts, manifest
from covseg_jax.checksums import read_sums
from covseg_jax.errors import InputError
from covseg_jax.predict.default import DEFAULT, MEMBERS
from covseg_jax.stages.inputs import Config

NONE = 'none'
# Fields of a network that change neither its weights' shapes nor what they mean.
_FREE = ('name', 'dropout_rate', 'initial_logit', 'dtype', 'num_classes')
_Loaded = TypeVar('_Loaded')


@dataclasses.dataclass(frozen=True)
class InitialModel:
    """An export that a training goes on from."""

    folder: pathlib.Path
    description: Mapping[str, Any]  # its model.json
    weights_sha256: str

    def describe(self) -> dict[str, Any]:
        """What a run that goes on from it says of it."""
        told = {name: self.description.get(name) for name in ('config', 'training_data')}
        return {'weights_sha256': self.weights_sha256, **told}


def read_initial_model(config: Config) -> InitialModel | None:
    """What `train.init` names; None where it names nothing. Checksums are compared by `load`.

    Raises:
      InputError: it is not an export.
    """
    name = config.train.init
    if not name:
        return None
    # A training goes on from one network: of the model of several from its first.
    return _read_export(MEMBERS[0] if name == DEFAULT else pathlib.Path(name), name)


def _read_export(folder: pathlib.Path, name: str) -> InitialModel:
    try:
        description = json.loads((folder / 'model.json').read_text(encoding='utf-8'))
        sums = read_sums(folder / 'SHA256SUMS')
        _network_fields(description['network'])
        return InitialModel(folder, description, sums['weights.safetensors'])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f'train.init={name}: no export of this program, or of another version; name '
            f'{DEFAULT!r}, or a folder that --stages=export wrote'
        ) from error


def identify(config: Config) -> str:
    """What records hold in place of `train.init`: the weights count, wherever they lie."""
    model = read_initial_model(config)
    return f'a model of weights {model.weights_sha256}' if model else NONE


def identify_start(config: Config) -> str:
    """`identify`, and whether its batch statistics become the scans'. The field that says so has no
    part in a comparison with the record of an earlier version, which does not name it."""
    adapts = config.train.statistics == 'scans'
    return f'{identify(config)}{", with the statistics of scans" if adapts else ""}'


def teacher_folders(config: Config) -> tuple[pathlib.Path, ...]:
    """The exports that pseudo-masks are of where synthesize.source is 'model', averaged: all that
    `train.init` names, though a training goes on from the first alone."""
    if config.train.init == DEFAULT:
        return MEMBERS
    return (pathlib.Path(config.train.init),) if config.train.init else ()


def identify_teachers(config: Config) -> str:
    """What records hold of `teacher_folders`: weights, and the cuts, unless the networks adapt to
    scans: others are found then."""
    models = [_read_export(folder, config.train.init) for folder in teacher_folders(config)]
    if not models:
        return NONE
    adapt = config.train.statistics == 'scans'
    told = [
        each.weights_sha256
        if adapt
        else (each.weights_sha256, each.description['masks'], each.description['volumes'])
        for each in models
    ]
    statistics = ', with the statistics of scans' if adapt else ''
    return f'{len(told)} networks of {manifest.fingerprint(told)}{statistics}'


def refuse_misfit(config: Config) -> None:
    """To be called before any work.

    Raises:
      InputError: `train.init` is not an export, or its network or what it sees differs from the
        config's; or pseudo-masks are to come from a model, and there is none that gives them.
    """
    model, from_model = read_initial_model(config), config.synthesize.source == 'model'
    if model is None:
        if from_model:
            raise InputError(
                "synthesize.source='model' and train.init names no model; give "
                f"--config.train.init={DEFAULT}, or an export's folder"
            )
        return
    _refuse_other_fields(config, model)
    adapts = config.train.statistics == 'scans'
    cut = config.masks.to_dict() if adapts else model.description['masks']
    if from_model and (config.synthesize.share_of_max or cut.get('share_of_max')):
        raise InputError(
            "synthesize.source='model' needs masks that are cut at a threshold, and "
            'synthesize.share_of_max of the config or masks.share_of_max of the model, with '
            "train.statistics='scans' of the config, is not 0; "
            "take a variant other than the published ones, or synthesize.source='gan'"
        )


def _refuse_other_fields(config: Config, model: InitialModel) -> None:
    network = config.network.to_dict()
    if network['name'] == 'unet':
        network = {'name': 'unet', **config.unet}
    preparation, volumes = model.description['preparation'], model.description['volumes']
    theirs = _network_fields(model.description['network']) | {
        'prepare.grid': preparation['grid'],
        'prepare.window_hu': preparation['window_hu'],
        'predict.output': volumes.get('output', 'sigmoid'),  # version 1 knew no other
    }
    ours = _network_fields(network) | {
        'prepare.grid': config.prepare.grid,
        'prepare.window_hu': config.prepare.window_hu,
        'predict.output': config.predict.output,
    }
    both = [(name, *_plain(value, ours[name])) for name, value in theirs.items() if name in ours]
    other = [each for each in both if each[1] != each[2]]
    if other:
        listed = ', '.join(f'{name} is {value} and {own}' for name, value, own in other)
        flags = ' '.join(shlex.quote(f'--config.{name}={value}') for name, value, _ in other)
        or_variant = ''
        if config.train.init == DEFAULT:
            or_variant = ', or take --config=configs/transunet.py:phantom, which has its sizes'
        raise InputError(
            f'train.init={config.train.init}: in this model and in the config {listed}; give '
            f'{flags}{or_variant}'
        )


def _network_fields(network: Mapping[str, Any]) -> dict[str, Any]:
    """A network's fields that must be the same, by the names that they have in a config."""
    group = 'unet' if network['name'] == 'unet' else 'network'
    fields = {f'{group}.{key}': value for key, value in network.items() if key not in _FREE}
    return {'network.name': network['name']} | fields


def _plain(*values: Any) -> list[Any]:
    """JSON has lists where a config has tuples."""
    return [tuple(value) if isinstance(value, list) else value for value in values]


def load(config: Config, read: Callable[[pathlib.Path], _Loaded]) -> _Loaded | None:
    """What `read` makes of the folder of `train.init`, on each host; None where it names nothing.

    Raises:
      InputError: on all hosts, where one of them cannot read it or has other weights than the
        first.
    """
    if not config.train.init:
        return None
    expected = hosts.first_decides(lambda: identify(config), 'the initial model is known')

    def load_here() -> _Loaded:
        own = identify(config)
        if own != expected:
            raise InputError(
                f'train.init={config.train.init}: {expected} on the first host and {own} on host '
                f'{hosts.index()}; copy the same model to all of them'
            )
        return read(read_initial_model(config).folder)

    return hosts.on_each(load_here)
