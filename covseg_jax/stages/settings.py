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
from covseg_jax.prepare.prepare_studies import CASE_VERSION, PrepareSettings, lung_network_crc32
from covseg_jax.stages import initial_model
from covseg_jax.stages.inputs import Config, data_folder
from covseg_jax.stages.pipeline import PIPELINE, TRAINED

# Fields that change how a stage runs and not what it makes.
_HARMLESS = (
    'num_workers', 'on_bad_study', 'log_every', 'save_every',
    'profile_steps', 'max_skipped_steps', 'predict.batch_size',
    'data.folder', 'prepare.lung_network',  # the files count, wherever they lie
)  # fmt: skip
_DATA_SET, _CASES, _LUNG_NETWORK = 'data_set', 'case_version', 'lung_network'
_PSEUDO_MASK_MODEL, _ADAPTED_BY = 'pseudo_mask_model', 'pseudo_mask_model_adapted_by'
LUNGS = 'lungs'  # the stage on request that trains, and its group of the config
# In these evaluate may differ from the training: other data, or masks that were mended.
_OF_DATA = (
    'phantom', _DATA_SET, _CASES, 'data.layout', 'data.prepared', 'data.pseudo_masks',
    'prepare.lesion_labels',
)  # fmt: skip
# What a network is as a function of scans, and with which thresholds its masks were cut.
_OF_PREDICTION = (
    'network', 'unet', 'predict', 'masks', 'train.compute_dtype', 'prepare.grid',
    'prepare.window_hu', 'prepare.margin_mm', 'prepare.lungs_source',
)  # fmt: skip
# How a teacher adapts to scans, is run and is cut, beside its weights.
_OF_ADAPTING = (
    'network', 'unet', 'predict', 'masks', 'train.compute_dtype', 'train.batch_size',
    'train.max_healthy_ml',
)  # fmt: skip
_OF_IMPORT = ('network', 'unet', 'prepare.grid', 'prepare.window_hu')
# The stages whose records a stage must agree with; its own is among them where it goes on.
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
    settings, so_far = {}, {}
    values = _without(config.to_dict(), _HARMLESS)
    known = workdir / 'manifests' / 'data_set.json'
    for stage, (_, groups) in PIPELINE.items():
        so_far = so_far | {group: values[group] for group in groups}
        if stage == 'prepare':
            so_far[_DATA_SET] = describe_data_set(data_folder(config, workdir), known)
            so_far[_CASES] = CASE_VERSION  # raised when the same files give other cases
            so_far[_LUNG_NETWORK] = lung_network_crc32(PrepareSettings(**config.prepare))
        if stage == 'synthesize' and config.synthesize.source == 'model':
            so_far[_PSEUDO_MASK_MODEL] = initial_model.identify_teachers(config)
            if config.train.statistics == 'scans':
                so_far[_ADAPTED_BY] = _only(values, _OF_ADAPTING)
        if stage == 'train':
            so_far['train'] = values['train'] | {'init': initial_model.identify_start(config)}
        settings[stage] = so_far
        if stage == 'evaluate':  # tables of earlier code may lack a column that this one reads
            settings[stage] = so_far | {'tables': [CASE_COLUMNS, SLICE_COLUMNS]}
    return settings


def import_settings(config: Config) -> dict:
    """What imported weights are held to later, as if `train` had begun with them."""
    settings = _only(_without(config.to_dict(), _HARMLESS), _OF_IMPORT)
    return settings | {'train': {'init': initial_model.identify(config)}}


def begin_lungs(config: Config, workdir: pathlib.Path) -> None:
    """Records what a network that finds lungs is trained with, in a work directory of its own or a
    run's.

    Raises:
      InputError: its training was begun with other settings.
    """
    settings = _without(config.to_dict(), _HARMLESS)
    settings = {name: settings[name] for name in ('seed', LUNGS)}
    manifest.refuse_other_settings(workdir, LUNGS, settings, 'use those, or another --workdir')
    manifest.begin(workdir, LUNGS, settings)


def refuse_other_settings(config: Config, workdir: pathlib.Path, stage: str) -> None:
    """Raises an InputError that names each setting in which a stage differs from those it goes on
    from, with both values and what to do."""
    if stage in ('export', 'predict'):
        values = _without(config.to_dict(), _HARMLESS)
        lungs = {_LUNG_NETWORK: lung_network_crc32(PrepareSettings(**config.prepare))}
        settings = {'train': _only(values, _OF_PREDICTION) | lungs}
    elif stage in _HELD_TO:
        settings = stage_settings(config, workdir)
    for earlier in _HELD_TO.get(stage, ()):
        if stage == 'evaluate' and earlier == 'train' and config.network.name == 'none':
            continue  # the pseudo-masks alone
        held, remedy = settings[earlier], f'use those, or run --stages={earlier} again'
        if earlier in TRAINED:
            remedy = 'use those, or another --workdir'
            step = newest_step(workdir, earlier)
            if step is None:
                continue  # nothing of it is there that could differ
            if step == 0:  # a training from imported weights may have begun, and come to nothing
                held = import_settings(config)
        if stage == 'evaluate':
            held = _without(held, _OF_DATA)
        manifest.refuse_other_settings(workdir, earlier, held, remedy)


def is_work_directory(folder: pathlib.Path) -> bool:
    """Whether a run was begun in a folder: its manifests, checkpoints or config are there."""
    if any(manifest.read_begun(folder, stage) is not None for stage in (*PIPELINE, LUNGS)):
        return True
    if any(newest_step(folder, stage) is not None for stage in TRAINED):
        return True
    try:
        content = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.keys() >= {'variant', 'stages', *TRAINED}


def refuse_foreign_workdir(workdir: pathlib.Path) -> None:
    """Raises an InputError where no run was begun in a folder and it holds what a run replaces."""
    if is_work_directory(workdir):
        return
    files = ('config.json', 'environment.json', 'progress.png')
    for name in (*files, *TRAINED.values(), 'evaluation'):
        if (workdir / name).exists():
            raise InputError(
                f'{workdir / name}: is in the way, for no run was begun in this folder; name '
                'another --workdir'
            )


def newest_step(workdir: pathlib.Path, stage: str) -> int | None:
    """The step of a training's newest checkpoint: 0 of imported weights, None without any."""
    checkpoints = workdir / TRAINED[stage] / 'checkpoints'
    names = [path.name for path in checkpoints.iterdir()] if checkpoints.is_dir() else []
    return max((int(name) for name in names if name.isdigit()), default=None)


def _without(values: Mapping, names: tuple[str, ...], group: str = '') -> dict:
    """Nested settings without those called by a name, or a dotted name: predict.batch_size."""
    return {
        key: _without(value, names, f'{group}{key}.') if isinstance(value, Mapping) else value
        for key, value in values.items()
        if key not in names and f'{group}{key}' not in names
    }


def _only(values: Mapping, names: tuple[str, ...]) -> dict:
    """The settings that are named: groups, and fields as group.field."""
    chosen = {}
    for name in names:
        group, _, field = name.partition('.')
        if field:
            chosen.setdefault(group, {})[field] = values[group][field]
        else:
            chosen[group] = values[group]
    return chosen
