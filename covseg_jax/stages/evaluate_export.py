"""An exported network, scored on any data set with lesion masks."""

import dataclasses
import pathlib
from collections.abc import Sequence

from covseg_jax import atomic, written
from covseg_jax.errors import InputError
from covseg_jax.imaging.studies import find_inputs
from covseg_jax.imaging.study import Study
from covseg_jax.prepare.cases import Case, evaluation_cases
from covseg_jax.prepare.prepare_studies import PrepareSettings
from covseg_jax.stages import human_masks, inputs
from covseg_jax.stages.inputs import Config, Request
from covseg_jax.stages.outcome import show_table, table_of_summary
from covseg_jax.stages.pipeline import prepare_shared

_PREPARED = 'prepared'
_TABLES = ('cases.csv', 'slices.csv', 'summary.json', 'report.html')
_FOLDERS = ('figures', 'tensorboard')
_NAMES = {_PREPARED, *_TABLES, *_FOLDERS}  # all that an evaluation leaves


def run_evaluate_export(config: Config | None, workdir: pathlib.Path, given: Request) -> None:
    """Scores --model on the masked studies of --input or of the config's data set, as `evaluate`
    does a run. They are prepared into `prepared/` of --output as the export says, and kept there.

    Raises:
      InputError: a flag is missing, the data set has no lesion mask that can be used, --output
        holds something else, or the exports cannot be loaded.
    """
    if not given.output or not (given.input or config):
        raise InputError(
            '--stages=evaluate with --model needs --output=FOLDER, and --input=DATASET_FOLDER or a '
            '--config that names the data set'
        )
    if given.reference:
        raise InputError(
            '--reference is for --input=PREDICTIONS; with --model the true masks are those of the '
            'data set'
        )
    from covseg_jax.evaluation.evaluate_cases import Sources, evaluate_cases
    from covseg_jax.predict.export import load

    folder = (given.input or inputs.data_folder(config, workdir)).absolute()
    config, output = config or inputs.NO_CONFIG, given.output
    _refuse_other_contents(output)
    atomic.remove_leftovers(output)
    studies = find_inputs(folder, config.data.layout, inputs.tell_stray('evaluate'))
    model = load(*given.model.split(','))
    labels = tuple(config.prepare.lesion_labels)
    settings = dataclasses.replace(model.preparation, lesion_labels=labels)
    cases, num_bad = _prepare_masked(studies, folder, output / _PREPARED, settings, config, given)
    known = {study.study_id: study for study in studies}
    members = model.description.get('ensemble', [model.description])
    training_data = [each.get('training_data') for each in members]
    human_masks.refuse_learned(cases, training_data)
    run = {
        'config': ', '.join(str(each.get('config', 'not stated')) for each in members),
        'model': given.model,
        **inputs.describe_cuts(model.masks),
        'checkpoint_step': max(each.get('checkpoint_step') or 0 for each in members),
        'human_masks_trained_on': human_masks.count_human_masks(training_data),
        'data': str(folder),
        'data_sets': sorted({case.description['data_set'] for case in cases}),
        'studies_set_aside': num_bad,
    }
    groups = ('network', 'preparation', 'volumes', 'masks')
    made_with = {name: model.description.get(name, {}) for name in groups}  # {} of several exports
    with written.new_files(output) as temporary:
        summary = evaluate_cases(
            cases,
            Sources(known, inputs.case_predictor(model), model.masks, labels),
            temporary,
            run,
            made_with={'model': given.model} | made_with,
        )
        # Event files have another name each time: the new one would not replace the old.
        written.remove((output / 'tensorboard').glob('events.out.tfevents.*'))
    show_table(*table_of_summary(summary))
    print(f'evaluate: {len(cases)} studies with a mask, {num_bad} set aside; {output}')


def _refuse_other_contents(output: pathlib.Path) -> None:
    """The folder may be new, or hold another such evaluation, as this program wrote it."""
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise InputError(f'{output}: is not a folder; name one that is new')
    names = {path.name for path in output.iterdir()} if output.exists() else set()
    names = {name for name in names if not name.startswith('.')}
    if names and (_PREPARED not in names or not names <= _NAMES):
        raise InputError(
            f'{output}: holds other files than the evaluation of an export '
            f'({min(names - _NAMES, default=min(names))}); name a new folder, such as one in it'
        )
    files = [output / name for name in _TABLES]
    for name in _FOLDERS:
        files += [path for path in (output / name).glob('[!.]*') if not path.is_dir()]
    written.refuse_foreign(files)


def _prepare_masked(
    studies: Sequence[Study],
    folder: pathlib.Path,
    prepared: pathlib.Path,
    settings: PrepareSettings,
    config: Config,
    given: Request,
) -> tuple[tuple[Case, ...], int]:
    """The prepared cases to score, and how many of the masked studies cannot be used."""
    masked = [study for study in studies if study.lesion_mask is not None]
    if not masked:
        raise InputError(
            f'{folder}: none of its {len(studies)} studies has a lesion mask, so there is nothing '
            'to evaluate against; docs/data.md says where each layout keeps them'
        )
    good, _ = prepare_shared(config, masked, folder, prepared, settings, given.num_workers)
    # An earlier call may have left cases of another data set here.
    cases = inputs.prepared_cases(config, prepared, only={study.study_id for study in good})
    cases = evaluation_cases(cases, config.data.evaluation_pattern)
    if not cases:
        raise InputError(
            f'{folder}: data.evaluation_pattern {config.data.evaluation_pattern!r} matches no '
            'subject with a lesion mask'
        )
    return cases, len(masked) - len(good)
