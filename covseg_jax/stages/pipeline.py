"""The stages of the pipeline, each from what those before it made."""

import itertools
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from covseg_jax import atomic, hosts, mirror, written
from covseg_jax.errors import InputError
from covseg_jax.gan.synthesize import PseudoMaskSettings, empty_lungs, synthesize
from covseg_jax.imaging.masks import MaskSettings
from covseg_jax.imaging.studies import find_studies
from covseg_jax.imaging.study import Study
from covseg_jax.prepare.cases import Case, Splits, evaluation_cases
from covseg_jax.prepare.prepare_studies import PrepareReport, PrepareSettings, prepare_studies
from covseg_jax.segmentation.targets import (
    human_mask_cases,
    learned_cases,
    learns_from_covid,
)
from covseg_jax.segmentation.volumes import Probability
from covseg_jax.stages import human_masks, initial_model, inputs
from covseg_jax.stages.inputs import Config
from covseg_jax.stages.outcome import Outcome, table_of_summary


def run_prepare(config: Config, workdir: pathlib.Path) -> Outcome:
    """Studies -> prepared cases; makes phantom studies first where the config says so."""
    folder = inputs.data_folder(config, workdir)
    if config.phantom.make:
        from covseg_jax.phantom.studies import write_phantom_data_set

        made = config.phantom.to_dict()
        del made['make']

        def make_phantoms() -> None:
            try:
                write_phantom_data_set(folder, **made, num_workers=inputs.num_workers(config))
            except ValueError as error:
                raise InputError(f'config.phantom: {error}') from error

        hosts.first_alone(make_phantoms, 'phantoms are made')
        mirror.share()
    prepared = inputs.prepared_folder(config, workdir)
    studies = find_studies(folder, config.data.layout, inputs.tell_stray('prepare'))
    settings = PrepareSettings(**config.prepare)
    good, report = prepare_shared(config, studies, folder, prepared, settings)
    outputs = [prepared / study.study_id / 'geometry.json' for study in good]
    counts = {'made': report.made, 'kept': report.kept, 'set aside': report.bad}
    return Outcome(outputs, [(name, len(named)) for name, named in counts.items()])


def prepare_shared(
    config: Config,
    studies: Sequence[Study],
    folder: pathlib.Path,
    prepared: pathlib.Path,
    settings: PrepareSettings,
    num_workers: int | None = None,
) -> tuple[list[Study], PrepareReport]:
    """Prepares this host's share of a folder's studies and prints what there is to say of them.
    Returns the studies of all hosts that can be used, and the report of this one.

    Raises:
      InputError: no study can be used.
    """
    own = hosts.share(studies)
    report = hosts.on_each(
        lambda: prepare_studies(
            own,
            prepared,
            settings,
            num_workers=num_workers or inputs.num_workers(config, own),
            on_bad_study=config.data.on_bad_study,
        )
    )
    for line in join_notes(report.notes):
        print(f'prepare: note: {line}')
    for study_id, message in report.bad.items():
        print(f'prepare: set aside: {study_id}: {message}')
    is_good = hosts.gather([study.study_id not in report.bad for study in own], len(studies))
    mirror.share()
    good = [study for study, kept in zip(studies, is_good, strict=True) if kept]
    if not good:
        raise InputError(f'{folder}: no study can be used; the faults are listed above')
    return good, report


# A number with its unit, and not the end of a range. No file's name is taken for one.
_MEASURED = re.compile(r'(?<![\w.-])(?<!to )-?\d+(?:\.\d+)?(?= (?:%|mm|ml|HU)(?!\w))')


def join_notes(notes: Mapping[str, Sequence[str]]) -> list[str]:
    """A line for what is said of studies, however many: notes that differ in what was measured
    alone are one, with the least and the greatest. `notes` are those of each study."""
    said: dict[tuple[str, ...], list[tuple[str, list[str]]]] = {}
    for study_id, of_study in notes.items():
        for note in of_study:
            words = tuple(_MEASURED.split(note))
            said.setdefault(words, []).append((study_id, _MEASURED.findall(note)))
    lines = []
    for words, found in said.items():
        ranges = map(_range, zip(*(numbers for _, numbers in found), strict=True))
        note = ''.join(itertools.chain(*itertools.zip_longest(words, ranges, fillvalue='')))
        first, *others = dict(found)
        names = f'{first} and {len(others)} more' if others else first
        lines.append(f'{names}: {note}')
    return lines


def _range(numbers: Sequence[str]) -> str:
    least, greatest = min(numbers, key=float), max(numbers, key=float)
    return least if float(least) == float(greatest) else f'{least} to {greatest}'


_SPEEDS = ('speed/steps_per_s', 'speed/input_wait_share')


def _pick(values: dict, names: tuple[str, ...]) -> list[tuple[str, float]]:
    return [(name, values[name]) for name in names if values.get(name) is not None]


def run_gan(config: Config, workdir: pathlib.Path) -> Outcome:
    """Trains the GAN."""
    from covseg_jax.gan.train import train_gan
    from covseg_jax.training.logging import read_newest

    train_gan(config, inputs.split_studies(config, workdir), workdir / 'gan')
    log = workdir / 'gan' / 'metrics.jsonl'
    shown = ('step', 'loss/total', 'validation/removed', *_SPEEDS)
    return Outcome([log], _pick(read_newest(log), shown))


def _load_teacher(config: Config, splits: Splits) -> tuple[Probability, MaskSettings]:
    """The mean of the models of `train.init`, as a function of volumes, and its cuts. Where batch
    statistics are to be those of the scans, each network is adapted to them, and cuts are found for
    the mean."""
    from covseg_jax.predict.export import load, read_variables
    from covseg_jax.predict.model import MeanProbability

    if config.train.statistics == 'training':
        model = initial_model.load(config, lambda folders: load(*folders))
        return model.probabilities[0], model.masks
    from covseg_jax.segmentation.train import adapt_to_scans

    initials = initial_model.load(config, lambda folders: [*map(read_variables, folders)])
    pixels = [each.pixels for each in initial_model.read_initial_models(config)]
    probability = MeanProbability(adapt_to_scans(config, splits, initials, pixels))
    masks, _ = _find_cuts(config, 'synthesize', probability, splits.healthy_calibration)
    return probability, masks


def run_synthesize(config: Config, workdir: pathlib.Path) -> Outcome:
    """GAN, or the model that training goes on from -> pseudo-masks of all COVID studies."""
    splits = inputs.split_studies(config, workdir)
    folder, new_file = inputs.pseudo_mask_folder(config, workdir), atomic.new_file
    covid = splits.train + splits.validation + splits.evaluation
    if config.data.pseudo_masks:  # a person's folder
        files = [*(folder / f'{case.study_id}.npy' for case in covid), folder / 'summary.json']
        hosts.first_alone(lambda: written.refuse_foreign(files), 'pseudo-masks may be written')
        new_file = written.new_file
    settings, calibration = PseudoMaskSettings(**config.synthesize), splits.healthy_calibration
    if settings.source == 'model':
        from covseg_jax.predict.self_training import predict_pseudo_masks

        model = _load_teacher(config, splits)
        least = settings.min_component_ml
        facts = {
            'models': [each.describe() for each in initial_model.read_initial_models(config)],
            'statistics': config.train.statistics,
        }
        summary = predict_pseudo_masks(*model, calibration, covid, folder, least, facts, new_file)
    else:
        from covseg_jax.gan.train import load_generator

        is_none = config.gan.recipe == 'none'
        heal = empty_lungs if is_none else load_generator(config, workdir / 'gan')
        summary = synthesize(heal, calibration, covid, folder, settings, new_file)
    infection = summary['infection_percent']
    return Outcome(
        [*(folder / f'{name}.npy' for name in infection), folder / 'summary.json'],
        [
            ('studies', len(infection)),
            ('median infection, %', float(np.median(list(infection.values())))),
            *_pick(summary, ('threshold', 'share_of_max')),
            ('in held-out healthy lungs, ml', summary['healthy_false_positive_ml']['mean']),
        ],
    )


def run_train(config: Config, workdir: pathlib.Path) -> Outcome:
    """Trains the segmentation network, and finds its thresholds on held-out healthy scans where the
    config gives no share of the maximum."""
    from covseg_jax.predict.export import read_variables
    from covseg_jax.segmentation import train as segmentation
    from covseg_jax.training.logging import read_newest

    needs_covid = learns_from_covid(config.train.rounds)
    splits = inputs.split_studies(config, workdir, needs_covid=needs_covid)
    folder = workdir / 'transunet'
    training_data = _describe_training_data(config, splits)
    initial = initial_model.load(config, lambda folders: read_variables(folders[0]))
    log, calibration_path = folder / 'metrics.jsonl', folder / 'calibration.json'
    read_pseudo_mask = inputs.pseudo_mask_reader(config, workdir)
    segmentation.train_segmentation(config, splits, read_pseudo_mask, folder, initial)
    network, variables, step = segmentation.load_variables(config, folder)
    probability = segmentation.make_probability(config, network, variables)
    healthy = splits.healthy_calibration
    settings, false_positive_ml = _find_cuts(config, 'train', probability, healthy)
    cuts = inputs.describe_cuts(settings)
    learned = _learned_covid(config, splits) + splits.healthy_train + healthy
    calibration = {
        **cuts,
        'checkpoint_step': step,
        'healthy_false_positive_ml': false_positive_ml,
        'training_data': training_data,
        _TRAINED_ON: sorted({case.subject for case in learned}),
    }
    if hosts.is_first():
        atomic.write_text(calibration_path, json.dumps(calibration, indent=2))
    shown = ('step', 'loss/total', 'validation/dice', *_SPEEDS)
    # Found on held-out healthy scans with painted opacities, or given.
    of_cuts = {_CUTS[name]: value for name, value in cuts.items()}
    of_cuts['in held-out healthy lungs, ml'] = false_positive_ml
    return Outcome(
        [log, calibration_path],
        [
            *_pick(read_newest(log), shown),
            *((name, value) for name, value in of_cuts.items() if value is not None),
            ('held-out healthy scans', len(healthy)),
            *_rows_of(training_data),
        ],
    )


def _find_cuts(
    config: Config, stage: str, probability: Probability, healthy: Sequence[Case]
) -> tuple[MaskSettings, float | None]:
    """The cuts of a network's masks, those of the config where it gives a share of the maximum, and
    the ml that they mark in a held-out healthy scan on average."""
    from covseg_jax.data.opacities import opacity_model, paint_scans
    from covseg_jax.predict.calibrate import calibrate_mask, marked_ml

    given = inputs.given_cuts(config)
    if given is not None:
        return given, marked_ml(probability, healthy, given)
    found, healthy_ml = calibrate_mask(
        probability,
        paint_scans(healthy, opacity_model(config), config.seed),
        healthy,
        max_healthy_ml=config.train.max_healthy_ml,
        min_component_ml=config.masks.min_component_ml,
    )
    _tell_doubt(stage, healthy_ml, len(healthy), config.train.max_healthy_ml)
    return found, healthy_ml


def _tell_doubt(stage: str, healthy_ml: float | None, number: int, limit: float) -> None:
    """Says what cuts that were found do not warrant."""
    if healthy_ml is None:
        print(
            f'{stage}: note: no healthy scan is held out, so the cuts are the lowest that are '
            'tried; raise data.calibration_fraction'
        )
    elif healthy_ml > limit:
        print(
            f'{stage}: note: the cuts mark {healthy_ml:.0f} ml in held-out healthy scans on '
            f'average, which is above train.max_healthy_ml={limit:g}, and there are {number} of '
            'them; hold out more with data.calibration_fraction, and see whether these say so too'
        )


def _describe_training_data(config: Config, splits: Splits) -> dict[str, Any]:
    """What a network says that it was trained on, as calibration.json and exports have it.

    Raises:
      InputError: a model of `train.init` has learned from the mask of a study that is kept for
        evaluation.
    """
    models = initial_model.read_initial_models(config)
    taught = config.synthesize.source == 'model'  # else a training goes on from the first alone
    before = [each.description.get('training_data') for each in (models if taught else models[:1])]
    human_masks.refuse_learned([c for c in splits.evaluation if c.has_lesion_mask], before)
    masked = human_mask_cases(config.train.targets, splits)
    covid = _learned_covid(config, splits)
    healthy = splits.healthy_train + splits.healthy_calibration
    return {
        'data_sets': sorted({case.description['data_set'] for case in covid + healthy}),
        'covid_studies': len(covid),
        'healthy_studies': len(healthy),
        **human_masks.describe_human_masks(masked, before),
        **({'initial_model': models[0].describe()} if models else {}),
        **({'teachers': [each.weights_sha256 for each in models]} if taught else {}),
        **({'statistics': 'scans'} if config.train.statistics == 'scans' else {}),
    }


def _learned_covid(config: Config, splits: Splits) -> tuple[Case, ...]:
    return learned_cases(config.train.rounds, config.train.targets, splits)


def _rows_of(training_data: Mapping[str, Any]) -> list[tuple[str, object]]:
    number = human_masks.count_human_masks([training_data])
    rows = [('COVID scans learned from', training_data['covid_studies'])]
    rows += [] if number == 0 else [('human masks trained on', number or 'not known')]
    if 'initial_model' in training_data:
        rows.append(('went on from weights', training_data['initial_model']['weights_sha256']))
    return rows


_CUTS = {
    'threshold': 'threshold',
    'seed_threshold': 'threshold once in each lesion',
    'share_of_max': "cut at this share of a study's maximum",
}

_TRAINED_ON = 'subjects'  # of calibration.json; it stays in the work directory, no export has it


def _refuse_trained_subjects(cases: Sequence[Case], workdir: pathlib.Path) -> None:
    """Masks may have come since the training, of subjects that it learned from."""
    trained = set((inputs.read_calibration(workdir) or {}).get(_TRAINED_ON, ()))
    both = sorted({case.subject for case in cases} & trained)
    if both:
        raise InputError(
            f'{both[0]}: the network learned from this subject, which has a lesion mask now '
            f'({len(both)} such subjects); train again in another --workdir, where it is kept for '
            'evaluation'
        )


def run_evaluate(config: Config, workdir: pathlib.Path) -> Outcome:
    """Scores the network and the pseudo-masks on the studies with a true mask; with the network
    'none' the pseudo-masks alone.

    What it writes in the work directory's evaluation/ is the program's by its place, whatever
    version wrote it and whoever changed it since: it is replaced, and no other file there goes.
    """
    from covseg_jax.evaluation.evaluate_cases import Sources, evaluate_cases
    from covseg_jax.training.progress import draw_progress

    data = inputs.data_folder(config, workdir)
    known = {study.study_id: study for study in find_studies(data, config.data.layout)}
    # The folder may hold cases of another data set, that the network learned from.
    prepared = inputs.prepared_cases(config, inputs.prepared_folder(config, workdir), only=known)
    cases = evaluation_cases(prepared, config.data.evaluation_pattern)
    if not cases:
        raise InputError(
            f'{data}: no prepared study has a lesion mask and is kept for evaluation '
            '(data.evaluation_pattern), so there is nothing to evaluate against; leave evaluate '
            'out of --stages'
        )
    learned = []  # of the network
    read_pseudo_mask, pseudo_masks = None, inputs.pseudo_mask_folder(config, workdir)
    # A data set that the run was not made from has none.
    if any((pseudo_masks / f'{case.study_id}.npy').exists() for case in cases):
        read_pseudo_mask = inputs.pseudo_probability_reader(config, workdir)
    if config.network.name == 'none':
        if read_pseudo_mask is None:
            raise InputError("network.name='none' evaluates pseudo-masks; run synthesize first")
        predict, read_pseudo_mask = read_pseudo_mask, None
        settings, step = inputs.pseudo_mask_cuts(config), 0
    else:
        _refuse_trained_subjects(cases, workdir)
        learned = [(inputs.read_calibration(workdir) or {}).get('training_data')]
        human_masks.refuse_learned(cases, learned)
        model, step = inputs.load_model(config, workdir, num_devices=1)
        settings, predict = model.masks, inputs.case_predictor(model)
    labels = tuple(config.prepare.lesion_labels)
    folder = workdir / 'evaluation'
    curves = draw_progress(workdir) if hosts.is_first() else None
    cuts = inputs.pseudo_mask_cuts(config)
    data_sets = sorted({case.description['data_set'] for case in cases})
    summary = evaluate_cases(
        cases,
        Sources(known, predict, settings, labels, read_pseudo_mask, cuts),
        folder,
        {
            'config': f'{config.name}:{config.variant}',
            **inputs.describe_cuts(settings),
            'checkpoint_step': step,
            'data_sets': inputs.name_data_sets(config, data_sets),
            'human_masks_trained_on': human_masks.count_human_masks(learned),
        },
        made_with={'seed': config.seed} | {name: config[name].to_dict() for name in _OF_MODELS},
        learning_curves=[curves] if curves else [],
    )
    names = ('cases.csv', 'slices.csv', 'summary.json', 'report.html')
    return Outcome([folder / name for name in names], *table_of_summary(summary))


# The groups of the config that both models depend on.
_OF_MODELS = ('gan', 'opacities', 'synthesize', 'network', 'unet', 'train', 'predict', 'masks')

# The pipeline in its order. Each stage's result depends on these groups of the config, and on those
# of the stages before it.
PIPELINE: dict[str, tuple[Callable, tuple[str, ...]]] = {
    'prepare': (run_prepare, ('data', 'phantom', 'prepare')),
    'gan': (run_gan, ('seed', 'gan', 'opacities')),
    'synthesize': (run_synthesize, ('synthesize',)),
    # The thresholds are found on what prediction makes of the network's answer.
    'train': (run_train, ('network', 'unet', 'train', 'predict', 'masks')),
    'evaluate': (run_evaluate, ()),
}
# Those that train a network, and its folder in the work directory.
TRAINED = {'gan': 'gan', 'train': 'transunet'}
