"""The models of `train.init`, of which a training goes on from the first, and of which pseudo-masks
may be: which they are, and whether they fit a config.

Only `load` imports JAX: a model that does not fit is refused before the first stage begins.
"""

import dataclasses
import json
import pathlib
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from covseg_jax import hosts, manifest
from covseg_jax.checksums import read_sums
from covseg_jax.errors import InputError
from covseg_jax.predict.default import DEFAULT, MEMBERS
from covseg_jax.prepare.prepare_studies import PrepareSettings
from covseg_jax.stages.inputs import Config

NONE = 'none'
# Fields of a network that change neither its weights' shapes nor what they mean.
_FREE = ('name', 'dropout_rate', 'initial_logit', 'dtype', 'num_classes')
_Loaded = TypeVar('_Loaded')
# Records of another way of adapting say it in other words.
_ADAPTED = ', with the statistics of all slices of the scans'


@dataclasses.dataclass(frozen=True)
class InitialModel:
    """An export that `train.init` names."""

    name: str  # as the person gave it
    folder: pathlib.Path
    description: Mapping[str, Any]  # its model.json
    weights_sha256: str

    @property
    def pixels(self) -> tuple[int, int]:
        """H and W of the slices that it sees."""
        _, height, width = self.description['preparation']['grid']
        return height, width

    def describe(self) -> dict[str, Any]:
        """What a run that goes on from it says of it."""
        told = {name: self.description.get(name) for name in ('config', 'training_data')}
        return {'weights_sha256': self.weights_sha256, **told}


def read_initial_models(config: Config) -> tuple[InitialModel, ...]:
    """What `train.init` names, of the default model each network. A training goes on from the
    first; where synthesize.source is 'model', pseudo-masks are of them all, averaged. Checksums are
    compared by `load`.

    Raises:
      InputError: one of them is not an export.
    """
    if not config.train.init:
        return ()
    return tuple(
        _read_export(folder, name)
        for name in map(str.strip, config.train.init.split(','))
        for folder in (MEMBERS if name == DEFAULT else (pathlib.Path(name),))
    )


def _read_export(folder: pathlib.Path, name: str) -> InitialModel:
    try:
        if not name:  # a comma too many
            raise ValueError
        description = json.loads((folder / 'model.json').read_text(encoding='utf-8'))
        sums = read_sums(folder / 'SHA256SUMS')
        _network_fields(description['network'])
        return InitialModel(name, folder, description, sums['weights.safetensors'])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f'train.init={name}: no export of this program, or of another version; name '
            f'{DEFAULT!r}, or a folder that --stages=export wrote, or several with commas'
        ) from error


def identify(config: Config) -> str:
    """What records hold of the model that a training goes on from: the weights count, wherever they
    lie."""
    models = read_initial_models(config)
    return f'a model of weights {models[0].weights_sha256}' if models else NONE


def identify_start(config: Config) -> str:
    """`identify`, and whether its batch statistics become the scans'. The field that says so has no
    part in a comparison with the record of an earlier version, which does not name it."""
    adapts = config.train.statistics == 'scans'
    return f'{identify(config)}{_ADAPTED if adapts else ""}'


def identify_teachers(config: Config) -> str:
    """What records hold of the models that pseudo-masks are of: weights and cuts; without these
    where the networks adapt to scans: others are found then."""
    models = read_initial_models(config)
    if not models:
        return NONE
    adapt = config.train.statistics == 'scans'
    told = [
        each.weights_sha256
        if adapt
        else (each.weights_sha256, each.description['masks'], each.description['volumes'])
        for each in models
    ]
    return f'{len(told)} networks of {manifest.fingerprint(told)}{_ADAPTED if adapt else ""}'


def refuse_misfit(config: Config) -> None:
    """To be called before any work.

    Raises:
      InputError: `train.init` is not an export, or its network or what it sees differs from the
        config's; several are named that cannot be averaged, or that nothing averages; or
        pseudo-masks are to come from a model, and there is none that gives them.
    """
    models, from_model = read_initial_models(config), config.synthesize.source == 'model'
    if not models and from_model:
        raise InputError(
            "synthesize.source='model' and train.init names no model; give "
            f"--config.train.init={DEFAULT}, or an export's folder"
        )
    for model in models:
        _refuse_other_fields(config, model, is_first=model is models[0])
    _refuse_list(config, models)
    adapts = config.train.statistics == 'scans'
    cuts = [config.masks] if adapts else [model.description['masks'] for model in models]
    if from_model and any(each.get('share_of_max') for each in (config.synthesize, *cuts)):
        raise InputError(
            "synthesize.source='model' needs masks that are cut at a threshold, and "
            'synthesize.share_of_max of the config or masks.share_of_max of the model, with '
            "train.statistics='scans' of the config, is not 0; "
            "take a variant other than the published ones, or synthesize.source='gan'"
        )


def _refuse_list(config: Config, models: Sequence[InitialModel]) -> None:
    """Several that nothing averages, or that cannot be averaged."""
    if ',' in config.train.init and config.synthesize.source != 'model':
        raise InputError(
            f'train.init={config.train.init}: a training goes on from one model; name one, or give '
            '--config.synthesize.source=model, which averages several for the pseudo-masks'
        )
    for number, model in enumerate(models):
        if model.weights_sha256 in [each.weights_sha256 for each in models[:number]]:
            raise InputError(f'train.init: names the weights of {model.folder} twice')
        if _field_of_view(model) != _field_of_view(models[0]):
            raise InputError(
                f'train.init={config.train.init}: {model.folder} sees scans in another way than '
                f'{models[0].folder} (preparation in model.json); name models of one kind'
            )
        if model.pixels > models[0].pixels:  # it would see slices that are blurred for it
            raise InputError(
                f'train.init={config.train.init}: the grid of {model.folder} is finer than that of '
                f'{models[0].folder}; name the finest first, or leave it out'
            )


def _field_of_view(model: InitialModel) -> PrepareSettings:
    return PrepareSettings(
        **{'lung_network': '', **model.description['preparation']}  # versions 1 and 2 knew none
    ).without_pixels()


def _refuse_other_fields(config: Config, model: InitialModel, is_first: bool) -> None:
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
    if not is_first:  # a teacher alone may have other pixels
        del theirs['prepare.grid']
    both = [(name, *_plain(value, ours[name])) for name, value in theirs.items() if name in ours]
    other = [each for each in both if each[1] != each[2]]
    if other:
        listed = ', '.join(f'{name} is {value} and {own}' for name, value, own in other)
        flags = ' '.join(shlex.quote(f'--config.{name}={value}') for name, value, _ in other)
        or_variant = ''
        if model.name == DEFAULT:
            or_variant = ', or take --config=configs/transunet.py:phantom_fine, which has its sizes'
        raise InputError(
            f'train.init={model.name}: in this model and in the config {listed}; give '
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


def load(config: Config, read: Callable[[Sequence[pathlib.Path]], _Loaded]) -> _Loaded | None:
    """What `read` makes of the folders of `train.init`, on each host; None where it names nothing.

    Raises:
      InputError: on all hosts, where one of them cannot read them or has other weights than the
        first.
    """
    if not config.train.init:
        return None

    def identify_all() -> str:
        return ', '.join(each.weights_sha256 for each in read_initial_models(config))

    expected = hosts.first_decides(identify_all, 'the initial model is known')

    def load_here() -> _Loaded:
        own = identify_all()
        if own != expected:
            raise InputError(
                f'train.init={config.train.init}: weights {expected} on the first host and {own} '
                f'on host {hosts.index()}; copy the same model to all of them'
            )
        return read([each.folder for each in read_initial_models(config)])

    return hosts.on_each(load_here)
