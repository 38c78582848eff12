"""An exported network, scored on any data set with lesion masks."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from covseg_jax import atomic, written
from covseg_jax.errors import InputError
from covseg_jax.stages.inputs import Config, Request, data_folder, describe_cuts, num_workers
from covseg_jax.stages.outcome import show_table, table_of_summary
from covseg_jax.stages.pipeline import prepare_shared

if TYPE_CHECKING:
    from covseg_jax.imaging.studies import Study
    from covseg_jax.predict.model import Model
    from covseg_jax.prepare.cases import Case
    from covseg_jax.prepare.prepare_studies import PrepareSettings

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
    from covseg_jax.evaluation.evaluate_cases import evaluate_cases
    from covseg_jax.evaluation.tensorboard import list_hparams
    from covseg_jax.imaging.studies import find_inputs
    from covseg_jax.predict.export import load

    folder = (given.input or data_folder(config, workdir)).absolute()
    output = given.output
    _refuse_other_contents(output)
    atomic.remove_leftovers(output)
    studies = find_inputs(folder, config.data.layout if config else 'auto')
    model = load(*given.model.split(','))
    labels = tuple(config.prepare.lesion_labels) if config else (1,)
    settings = dataclasses.replace(model.preparation, lesion_labels=labels)
    cases, num_bad = _prepare_masked(studies, folder, output / _PREPARED, settings, config, given)

    def predict(case) -> np.ndarray:
        return model.probabilities[0](np.asarray(case.image()), np.asarray(case.lungs()))

    run = _describe(model, given, folder, cases, num_bad)
    groups = ('network', 'preparation', 'volumes', 'masks')
    made_with = {name: model.description.get(name, {}) for name in groups}  # {} of several exports
    with written.new_files(output) as temporary:
        summary = evaluate_cases(
            cases,
            {study.study_id: study for study in studies},
            predict,
            None,
            model.masks,
            temporary,
            run,
            lesion_labels=labels,
            hparams={'model': given.model} | list_hparams(made_with),
        )
        # Its name is another each time.
        written.remove((output / 'tensorboard').glob('events.out.tfevents.*'))
    show_table(*table_of_summary(summary))
    print(f'evaluate: {len(cases)} studies with a mask, {num_bad} set aside; {output}')


def _refuse_other_contents(output: pathlib.Path) -> None:
    """What an evaluation writes replaces what is there: it may be another evaluation, as this
    program wrote it, or nothing."""
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
    studies: 'Sequence[Study]',
    folder: pathlib.Path,
    prepared: pathlib.Path,
    settings: 'PrepareSettings',
    config: Config | None,
    given: Request,
) -> 'tuple[tuple[Case, ...], int]':
    """The prepared cases to score, and how many of the masked studies cannot be used."""
    from covseg_jax.prepare.cases import evaluation_cases, find_cases

    masked = [study for study in studies if study.lesion_mask is not None]
    if not masked:
        raise InputError(
            f'{folder}: none of its {len(studies)} studies has a lesion mask, so there is nothing '
            'to evaluate against; the README says where each layout keeps them'
        )
    good, _ = prepare_shared(
        masked,
        prepared,
        settings,
        num_workers=given.num_workers or num_workers(config),
        on_bad_study=config.data.on_bad_study if config else 'skip',
    )
    if not good:
        raise InputError(f'{folder}: no study can be used; the faults are listed above')
    patterns = (
        {
            'subject_pattern': config.data.subject_pattern,
            'healthy_pattern': config.data.healthy_pattern,
        }
        if config
        else {}
    )
    # An earlier call may have left cases of another data set here.
    cases = find_cases(prepared, only={study.study_id for study in good}, **patterns)
    cases = evaluation_cases(cases, config.data.evaluation_pattern if config else '.*')
    if not cases:
        raise InputError(
            f'{folder}: data.evaluation_pattern {config.data.evaluation_pattern!r} matches no '
            'subject with a lesion mask'
        )
    return cases, len(masked) - len(good)


def _describe(
    model: 'Model', given: Request, folder: pathlib.Path, cases: 'Sequence[Case]', num_bad: int
) -> dict:
    """What summary.json and the report say beside the scores."""
    members = model.description.get('ensemble', [model.description])
    return {
        'config': ', '.join(str(each.get('config', 'not stated')) for each in members),
        'model': given.model,
        **describe_cuts(model.masks),
        'checkpoint_step': max(each.get('checkpoint_step') or 0 for each in members),
        'data': str(folder),
        'data_sets': sorted({case.description['data_set'] for case in cases}),
        'studies_set_aside': num_bad,
    }
