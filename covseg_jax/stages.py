"""The stages: each takes its settings from the config and calls what does the work.

Stages import what they need themselves: the processes that prepare studies import this module too
and must not start JAX.
"""

import csv
import dataclasses
import json
import os
import pathlib
from collections.abc import Callable

import ml_collections

from covseg_jax import atomic, hosts
from covseg_jax.errors import InputError

Config = ml_collections.ConfigDict
STOPPED = 'stopped'  # a file in the work directory of a run that was stopped, until it goes on


@dataclasses.dataclass(frozen=True)
class Given:
    """What the command line names beside the config: --input, --output and --reference, None where
    not given."""

    input: pathlib.Path | None = None
    output: pathlib.Path | None = None
    reference: pathlib.Path | None = None


def _prepared_folder(config: Config, workdir: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(config.data.prepared or workdir / 'prepared')


def data_folder(config: Config, workdir: pathlib.Path) -> pathlib.Path:
    # Prepared cases note their files' paths: they should hold from another folder too.
    return pathlib.Path(config.data.folder or workdir / 'studies').absolute()


def _prepare_settings(config: Config):
    from covseg_jax.imaging.prepare import PrepareSettings

    return PrepareSettings(
        grid=tuple(config.prepare.grid),
        window_hu=tuple(config.prepare.window_hu),
        margin_mm=config.prepare.margin_mm,
        lungs_source=config.prepare.lungs_source,
        lesion_labels=tuple(config.prepare.lesion_labels),
    )


def _num_workers(config: Config) -> int:
    return config.data.num_workers or os.cpu_count() or 1


def _splits(config: Config, workdir: pathlib.Path):
    from covseg_jax.data.cases import find_cases, split_cases

    cases = find_cases(
        _prepared_folder(config, workdir), subject_pattern=config.data.subject_pattern
    )
    return split_cases(
        cases,
        seed=config.seed,
        calibration_fraction=config.data.calibration_fraction,
        validation_fraction=config.data.validation_fraction,
        evaluation_pattern=config.data.evaluation_pattern,
    )


def run_prepare(config: Config, workdir: pathlib.Path) -> list[pathlib.Path]:
    """Studies -> prepared cases; makes phantom studies first where the config says so."""
    from covseg_jax.imaging.prepare import prepare_studies, take_shard
    from covseg_jax.imaging.studies import find_studies

    folder = data_folder(config, workdir)
    if config.phantom.make:
        from covseg_jax.imaging.phantom import write_phantom_data_set

        def make_phantoms() -> None:
            try:
                write_phantom_data_set(
                    folder,
                    num_healthy=config.phantom.num_healthy,
                    num_covid=config.phantom.num_covid,
                    num_masked=config.phantom.num_masked,
                    seed=config.phantom.seed,
                    shape=tuple(config.phantom.shape),
                    spacing_mm=tuple(config.phantom.spacing_mm),
                    num_workers=_num_workers(config),
                )
            except ValueError as error:
                raise InputError(f'config.phantom: {error}') from error

        hosts.first_alone(make_phantoms, 'phantoms are made')
    prepared = _prepared_folder(config, workdir)
    studies = take_shard(find_studies(folder, config.data.layout), config.prepare.shard)
    own = hosts.share(studies)
    report = prepare_studies(
        own,
        prepared,
        _prepare_settings(config),
        num_workers=_num_workers(config),
        on_bad_study=config.data.on_bad_study,
    )
    print(f'prepare: {len(report.made)} made, {len(report.kept)} kept, {len(report.bad)} set aside')
    for study_id, notes in report.notes.items():
        for note in notes:
            print(f'prepare: note: {study_id}: {note}')
    for study_id, message in report.bad.items():
        print(f'prepare: set aside: {study_id}: {message}')
    # One host's share may hold none that can be used.
    good = hosts.gather([study.study_id not in report.bad for study in own], len(studies))
    if not any(good):
        raise InputError(f'{folder}: no study can be used; what is wrong with each stands above')
    return [
        prepared / study.study_id / 'geometry.json'
        for study, is_good in zip(studies, good, strict=True)
        if is_good
    ]


def run_verify(config: Config, workdir: pathlib.Path, given: Given) -> None:
    """Checks the config's data set, or --input, and writes verify.csv."""
    from covseg_jax.imaging.studies import find_inputs, find_studies
    from covseg_jax.imaging.verify import COLUMNS, NOTE, UNUSABLE, verify_studies

    if given.input:
        studies = find_inputs(given.input, config.data.layout)
    else:
        studies = find_studies(data_folder(config, workdir), config.data.layout)
    findings = verify_studies(studies, _prepare_settings(config), num_workers=_num_workers(config))
    path = (given.output or workdir) / 'verify.csv'
    with atomic.new_file(path) as temporary, temporary.open('w', newline='') as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(dataclasses.asdict(finding) for finding in findings)
    for finding in findings:
        name = pathlib.Path(finding.file).name
        if finding.status == UNUSABLE:
            print(f'verify: {finding.study}: {name}: {finding.fault}; {finding.what_to_do}')
        elif finding.status == NOTE:
            print(f'verify: {finding.study}: note: {name}: {finding.fault}')
    unusable = {finding.study for finding in findings if finding.status == UNUSABLE}
    print(f'verify: {len(studies)} studies, {len(unusable)} unusable; {path}')
    if unusable:
        raise InputError(
            f'{len(unusable)} of {len(studies)} studies cannot be used; mend or remove what '
            f'{path} names'
        )


def run_compile_check(config: Config, workdir: pathlib.Path, given: Given) -> None:
    """Compiles the training steps for a TPU topology, and writes compile_check.json."""
    del given
    from covseg_jax.training.compile_check import run_check

    topology = config.compile_check.topology
    found = run_check(config, topology)
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / 'compile_check.json'
    atomic.write_text(path, json.dumps(found, indent=2))
    for stage, result in found.items():
        start = f'compile_check: {stage}, {topology}, batch {result["batch_size"]}:'
        if not result['fits']:
            print(f'{start} does not fit; the largest that does: {result["largest_batch_size"]}')
            continue
        print(
            f'{start} {result["peak_gib"]:.2f} of {result["memory_gib"]} GiB a chip; '
            f'{result["gflops"]:.0f} GFLOP, {result["gbytes"]:.1f} GB; '
            f'{result["estimated_ms"]:.1f} ms estimated, floors {result["arithmetic_ms"]:.1f} ms '
            f'(arithmetic) and {result["bytes_ms"]:.1f} ms (bytes), ratio {result["ratio"]:.2f}'
        )
        for kind, each in result['collectives'].items():
            print(f'compile_check: {stage}: {kind}: {each["count"]}, {each["bytes"] / 1e6:.1f} MB')
    print(f'compile_check: {path}')


def run_gan(config: Config, workdir: pathlib.Path) -> list[pathlib.Path]:
    """Trains the GAN."""
    from covseg_jax.training.gan import train_gan

    train_gan(config, _splits(config, workdir), workdir / 'gan')
    return [workdir / 'gan' / 'metrics.jsonl']


def run_synthesize(config: Config, workdir: pathlib.Path) -> list[pathlib.Path]:
    """GAN -> pseudo-masks of all COVID studies."""
    from covseg_jax.inference.synthesize import PseudoMaskSettings, empty_lungs, synthesize
    from covseg_jax.training.gan import load_generator

    recipe = config.gan.recipe
    heal = empty_lungs if recipe == 'none' else load_generator(config, workdir / 'gan')
    splits = _splits(config, workdir)
    folder = _pseudo_mask_folder(config, workdir)
    summary = synthesize(
        heal,
        splits.healthy_calibration,
        splits.train + splits.validation + splits.evaluation,
        folder,
        PseudoMaskSettings(**config.synthesize.to_dict()),
    )
    print(
        f'synthesize: threshold {summary["threshold"]:.4f}, false positives in held-out healthy '
        f'lungs {summary["healthy_false_positive_ml"]["mean"]:.1f} ml'
    )
    return [*(folder / f'{name}.npy' for name in summary['infection_percent']),
            folder / 'summary.json']  # fmt: skip


def run_import_weights(config: Config, workdir: pathlib.Path, given: Given) -> None:
    """Published weights -> a checkpoint that train goes on from and evaluate and predict use."""
    if not given.input:
        raise InputError('--stages=import_weights needs --input=FILE (.safetensors, .npz or .pt)')
    from covseg_jax.training.published_weights import import_transunet, read_tensors

    folder = workdir / 'transunet'
    import_transunet(config, read_tensors(given.input), folder)
    calibration = {'threshold': 0.5, 'checkpoint_step': 0}
    atomic.write_text(folder / 'calibration.json', json.dumps(calibration, indent=2))
    print(f'import_weights: {given.input} is checkpoint 0 of {folder}')
    if not config.network.published_attention:
        print(
            'import_weights: note: weights trained by the published code need its attention in '
            'every later command: --config.network.published_attention=true'
        )


def _pseudo_mask_folder(config: Config, workdir: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(config.data.pseudo_masks or workdir / 'pseudo_masks')


def _pseudo_mask_reader(config: Config, workdir: pathlib.Path):
    from covseg_jax.inference.synthesize import read_pseudo_mask

    folder = _pseudo_mask_folder(config, workdir)
    return lambda case: read_pseudo_mask(folder, case.study_id)


def run_train(config: Config, workdir: pathlib.Path) -> list[pathlib.Path]:
    """Trains the segmentation network, and finds its thresholds on held-out healthy scans."""
    from covseg_jax.data.opacities import paint_scans
    from covseg_jax.inference.calibrate import calibrate_mask
    from covseg_jax.training.gan import opacity_model
    from covseg_jax.training.segmentation import load_probability, train_segmentation

    splits, folder = _splits(config, workdir), workdir / 'transunet'
    train_segmentation(config, splits, _pseudo_mask_reader(config, workdir), folder)
    probability, step = load_probability(config, folder)
    healthy = splits.healthy_calibration
    settings, false_positive_ml = calibrate_mask(
        probability,
        paint_scans(healthy, opacity_model(config)),
        healthy,
        max_healthy_ml=config.train.max_healthy_ml,
        min_component_ml=config.predict.min_component_ml,
    )
    calibration = {
        'threshold': settings.threshold,
        'seed_threshold': settings.seed_threshold,
        'checkpoint_step': step,
        'healthy_false_positive_ml': false_positive_ml,
    }
    if hosts.is_first():
        atomic.write_text(folder / 'calibration.json', json.dumps(calibration, indent=2))
    print(
        f'train: threshold {settings.threshold}, of which {settings.seed_threshold} somewhere in '
        'each lesion, found on held-out healthy scans with painted opacities; '
        f'false positives without them {false_positive_ml:.1f} ml'
    )
    return [folder / 'metrics.jsonl', folder / 'calibration.json']


def _load_segmenter(config: Config, workdir: pathlib.Path):
    """The trained network's probability function, its mask settings, its checkpoint's step."""
    from covseg_jax.inference.masks import MaskSettings
    from covseg_jax.training.segmentation import load_probability

    calibration = workdir / 'transunet' / 'calibration.json'
    if not calibration.exists():
        raise InputError(
            f'{calibration}: no trained network in {workdir}; run the stages up to train first'
        )
    cuts = json.loads(calibration.read_text(encoding='utf-8'))
    settings = MaskSettings(
        cuts['threshold'],
        cuts.get('seed_threshold', cuts['threshold']),
        config.predict.min_component_ml,
    )
    probability, step = load_probability(config, workdir / 'transunet')
    return probability, settings, step


def run_evaluate(config: Config, workdir: pathlib.Path) -> list[pathlib.Path]:
    """Scores the network and the pseudo-masks on the studies with a true mask; with the network
    'none' the pseudo-masks alone."""
    import numpy as np

    from covseg_jax.evaluation.cohort import PSEUDO_MASK_CUT, evaluate_cohort, format_summary
    from covseg_jax.inference.masks import MaskSettings

    splits = _splits(config, workdir)
    if not splits.evaluation:
        raise InputError(
            f'{data_folder(config, workdir)}: no study has a lesion mask, so there is nothing to '
            'evaluate against; leave evaluate out of --stages'
        )
    read_pseudo_mask = None
    if _pseudo_mask_folder(config, workdir).exists():
        read_pseudo_mask = _pseudo_mask_reader(config, workdir)
    if config.network.name == 'none':
        if read_pseudo_mask is None:
            raise InputError("network.name='none' evaluates pseudo-masks; run synthesize first")
        predict, read_pseudo_mask = read_pseudo_mask, None
        settings = MaskSettings(PSEUDO_MASK_CUT, min_component_ml=config.predict.min_component_ml)
        step = 0
    else:
        probability, settings, step = _load_segmenter(config, workdir)

        def predict(case):
            return probability(np.asarray(case.image()), np.asarray(case.lungs()))

    folder = workdir / 'evaluation'
    summary = evaluate_cohort(
        splits.evaluation,
        predict,
        read_pseudo_mask,
        settings,
        folder,
        {
            'config': f'{config.name}:{config.variant}',
            'threshold': settings.threshold,
            'seed_threshold': settings.seed_threshold,
            'checkpoint_step': step,
        },
    )
    print(format_summary(summary))
    names = ('cases.csv', 'slices.csv', 'summary.json', 'report.html')
    return [folder / name for name in names]


def run_evaluate_folder(config: Config, workdir: pathlib.Path, given: Given) -> None:
    """Scores the masks in --input against those in --reference, whatever made them."""
    from covseg_jax.evaluation.cohort import format_summary
    from covseg_jax.evaluation.folders import pair_masks, score_folder

    if not given.reference:
        raise InputError('--stages=evaluate with --input=PREDICTIONS needs --reference=MASKS')
    pairs, alone = pair_masks(given.input, given.reference)
    folder = given.output or workdir / 'evaluation_of_folder'
    print(format_summary(score_folder(pairs, folder)))
    if alone:
        print(f'evaluate: note: in one folder alone, not scored: {", ".join(alone)}')
    print(f'evaluate: {len(pairs)} studies; {folder}')


def run_compare(config: Config, workdir: pathlib.Path, given: Given) -> None:
    """Compares two evaluated runs, --input=FIRST,SECOND, study by study."""
    from covseg_jax.evaluation.compare import compare_runs

    names = str(given.input or '').split(',')
    if len(names) != 2:
        raise InputError('--stages=compare needs --input=FIRST,SECOND, two evaluated runs')
    differences, alone = compare_runs(*map(pathlib.Path, names))
    print(f'compare: second minus first; first {names[0]}, second {names[1]}')
    for each in differences:
        low, high = each.ci95
        print(
            f'compare: {each.metric:>16}: {each.first:.3f} -> {each.second:.3f}, difference '
            f'{each.difference:+.3f} [{low:+.3f}, {high:+.3f}], Wilcoxon p = {each.wilcoxon_p:.3g} '
            f'(n = {each.n})'
        )
    if alone:
        print(f'compare: note: in one run alone, left out: {", ".join(alone)}')
    if given.output:
        rows = [dataclasses.asdict(each) for each in differences]
        atomic.write_text(given.output / 'compare.json', json.dumps(rows, indent=2))


def run_status(config: Config, workdir: pathlib.Path, given: Given) -> None:
    """Prints where a work directory stands."""
    from covseg_jax.manifest import describe
    from covseg_jax.training.logging import read_rows

    if not (workdir / 'config.json').exists():
        raise InputError(f'{workdir}: no run was begun there')
    begun = json.loads((workdir / 'config.json').read_text(encoding='utf-8'))
    logs = {'gan': workdir / 'gan', 'train': workdir / 'transunet'}
    for stage in PIPELINE:
        print(f'status: {stage:>10}: {describe(workdir, stage)}')
        log = logs.get(stage, workdir) / 'metrics.jsonl'
        if log.exists():
            values: dict = {}
            for row in read_rows(log):
                values |= row
            shown = ('loss/total', 'validation/dice', 'validation/removed', 'speed/steps_per_s')
            listed = [f'{key} {values[key]:.4g}' for key in shown if values.get(key) is not None]
            total = begun[stage]['num_steps']
            print(f'status: {"":>10}  step {values["step"]} of {total}, {", ".join(listed)}')
    if (workdir / STOPPED).exists():
        print(f'status: {(workdir / STOPPED).read_text(encoding="utf-8").strip()}')


def run_predict(config: Config, workdir: pathlib.Path, given: Given) -> None:
    """NIfTI in -> NIfTI out on the same grid."""
    if not given.input or not given.output:
        raise InputError('--stages=predict needs --input=FILE|FOLDER and --output=FOLDER')
    from covseg_jax.imaging.studies import find_inputs
    from covseg_jax.inference.predict import predict_studies

    studies = find_inputs(given.input, config.data.layout)
    probability, settings, _ = _load_segmenter(config, workdir)
    rows, faults = predict_studies(
        studies,
        probability,
        _prepare_settings(config),
        settings,
        given.output,
        num_workers=_num_workers(config),
        write_probability=config.predict.write_probability,
    )
    for row in rows:
        if row['status'] == 'ok':
            print(
                f'predict: {row["study_id"]}: lesion {row["lesion_ml"]:.1f} ml, lungs '
                f'{row["lung_ml"]:.0f} ml, infection {row["infection_percent"]:.2f} %'
            )
    if len(faults) == 1 and len(rows) == 1:
        raise InputError(faults[0])
    if faults:
        raise InputError(f'{len(faults)} of {len(rows)} studies set aside: ' + '; '.join(faults))


# The pipeline in its order, with the groups of the config that each stage's result depends on,
# beside what the stages before it depend on.
PIPELINE: dict[str, tuple[Callable, tuple[str, ...]]] = {
    'prepare': (run_prepare, ('data', 'phantom', 'prepare')),
    'gan': (run_gan, ('seed', 'gan')),
    'synthesize': (run_synthesize, ('synthesize',)),
    # The thresholds are found on what prediction makes of the network's answer.
    'train': (run_train, ('network', 'train', 'predict')),
    'evaluate': (run_evaluate, ()),
}
BEFORE: dict[str, Callable] = {
    'verify': run_verify,
    'compile_check': run_compile_check,
    'import_weights': run_import_weights,
}
AFTER: dict[str, Callable] = {
    'predict': run_predict,
    'compare': run_compare,
    'status': run_status,
}
# What a stage of the pipeline does with --input instead.
ON_INPUT: dict[str, Callable] = {'evaluate': run_evaluate_folder}
