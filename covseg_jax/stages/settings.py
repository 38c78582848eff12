"""The settings that a stage's result depends on, and those that a later stage is held to.

A network's weights fit many settings that make another function of them: what it was trained with
decides, and another value is refused.
"""

import json
import pathlib
from collections.abc import Mapping

from covseg_jax import manifest
from covseg_jax.checksums import describe_data_set
from covseg_jax.errors import InputError
from covseg_jax.evaluation.scores import CASE_COLUMNS, SLICE_COLUMNS
from covseg_jax.prepare.prepare_studies import CASE_VERSION
from covseg_jax.stages.inputs import Config, data_folder
from covseg_jax.stages.pipeline import PIPELINE, TRAINED

# Fields that change how a stage runs and not what it makes.
_HARMLESS = (
    'num_workers', 'on_bad_study', 'log_every', 'save_every',
    'profile_steps', 'max_skipped_steps', 'predict.batch_size',
    'data.folder',  # its files count, wherever they lie
)  # fmt: skip
_DATA_SET, _CASES = 'data_set', 'case_version'
# Of these evaluate may have others than the training: other data, or masks that were mended.
_OF_DATA = (
    'phantom', _DATA_SET, _CASES, 'data.layout', 'data.prepared', 'data.pseudo_masks',
    'prepare.lesion_labels',
)  # fmt: skip
# What a network is as a function of scans, and with which thresholds its masks were cut.
_OF_PREDICTION = (
    'network', 'unet', 'predict', 'masks', 'train.compute_dtype', 'prepare.grid',
    'prepare.window_hu', 'prepare.margin_mm', 'prepare.lungs_source',
)  # fmt: skip
_OF_IMPORT = ('network', 'unet', 'prepare.grid', 'prepare.window_hu')
# The stages whose records a stage must agree with; of its own where it goes on.
_HELD_TO = {
    'gan': ('gan', 'prepare'),
    'synthesize': ('gan', 'prepare'),
    'train': ('train', 'gan', 'synthesize', 'prepare'),
    'evaluate': ('train', 'gan', 'synthesize', 'prepare'),
    'pseudo_masks': ('gan', 'synthesize', 'prepare'),
    'export': ('train',),
    'predict': ('train',),
}


def stage_settings(config: Config, workdir: pathlib.Path) -> dict[str, dict]:
    """For each stage of the pipeline, everything that its result depends on."""
    settings: dict[str, dict] = {}
    so_far: dict = {}
    values = _without(config.to_dict(), _HARMLESS)
    known = workdir / 'manifests' / 'data_set.json'
    for stage, (_, groups) in PIPELINE.items():
        so_far = so_far | {group: values[group] for group in groups}
        if stage == 'prepare':
            so_far[_DATA_SET] = describe_data_set(data_folder(config, workdir), known)
            so_far[_CASES] = CASE_VERSION  # raised when the same files give other cases
        settings[stage] = so_far
        if stage == 'evaluate':  # tables of earlier code may lack a column that this one reads
            settings[stage] = so_far | {'tables': [CASE_COLUMNS, SLICE_COLUMNS]}
    return settings


def import_settings(config: Config) -> dict:
    """What imported weights are held to later, as if `train` had begun with them."""
    return _only(_without(config.to_dict(), _HARMLESS), _OF_IMPORT)


def refuse_other_settings(config: Config, workdir: pathlib.Path, stage: str) -> None:
    """Holds a stage to the settings of those that it goes on from.

    Raises:
      InputError: a setting is another one; its name, both values, and what to do.
    """
    if stage in ('export', 'predict'):
        values = _without(config.to_dict(), _HARMLESS)
        settings = {'train': _only(values, _OF_PREDICTION)}
    elif stage in _HELD_TO:
        settings = stage_settings(config, workdir)
    for earlier in _HELD_TO.get(stage, ()):
        if stage == 'evaluate' and earlier == 'train' and config.network.name == 'none':
            continue  # the pseudo-masks alone
        held = settings[earlier]
        if earlier in TRAINED:
            step = newest_step(workdir, earlier)
            if step is None:
                continue  # nothing of it is there that could differ
            if step == 0:  # a training from imported weights may have begun, and come to nothing
                held = import_settings(config)
        held = _without(held, (*_HARMLESS, *(_OF_DATA if stage == 'evaluate' else ())))
        remedy = (
            'use those, or another --workdir'
            if earlier in TRAINED
            else f'use those, or run --stages={earlier} again'
        )
        manifest.refuse_other_settings(workdir, earlier, held, remedy)


def is_work_directory(folder: pathlib.Path) -> bool:
    """Whether a run was begun in a folder: its manifests, checkpoints or config are there."""
    is_begun = any(manifest.read_begun(folder, stage) is not None for stage in PIPELINE)
    is_trained = any(newest_step(folder, stage) is not None for stage in TRAINED)
    return is_begun or is_trained or _is_config(folder / 'config.json')


def _is_config(path: pathlib.Path) -> bool:
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.keys() >= {'variant', 'stages', *TRAINED}


def refuse_foreign_workdir(workdir: pathlib.Path) -> None:
    """A folder in which no run was begun must hold nothing that a run would replace.

    Raises:
      InputError: it does; names the file or folder.
    """
    if is_work_directory(workdir):
        return
    for name in (
        'config.json',
        'environment.json',
        'progress.png',
        *TRAINED.values(),
        'evaluation',
    ):
        if (workdir / name).exists():
            raise InputError(
                f'{workdir / name}: is in the way, for no run was begun in this folder; name '
                'another --workdir'
            )


def newest_step(workdir: pathlib.Path, stage: str) -> int | None:
    """Of a training's checkpoints; 0 of imported weights, None where there is none."""
    checkpoints = workdir / TRAINED[stage] / 'checkpoints'
    names = [path.name for path in checkpoints.iterdir()] if checkpoints.is_dir() else []
    return max((int(name) for name in names if name.isdigit()), default=None)


def _without(values: Mapping, names: tuple[str, ...], group: str = '') -> dict:
    """Nested settings without those of a name, or of a dotted name such as predict.batch_size."""
    return {
        key: _without(value, names, f'{group}{key}.') if isinstance(value, Mapping) else value
        for key, value in values.items()
        if key not in names and f'{group}{key}' not in names
    }


def _only(values: Mapping, names: tuple[str, ...]) -> dict:
    """The groups that are named, and the fields, as group.field."""
    fields = [name.split('.') for name in names if '.' in name]
    chosen = {name: values[name] for name in names if '.' not in name}
    for group, field in fields:
        chosen[group] = chosen.get(group, {}) | {field: values[group][field]}
    return chosen
