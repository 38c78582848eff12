"""Flags to stages: `python -m covseg_jax.main --config=configs/transunet.py`.

Stages import what they need themselves: the processes that prepare studies import this module too
and must not start JAX.
"""

import csv
import dataclasses
import json
import os
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from importlib import metadata

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from covseg_jax import atomic, manifest
from covseg_jax.errors import InputError, Stopped

_CONFIG = config_flags.DEFINE_config_file('config', None, 'configs/NAME.py[:VARIANT]')
_WORKDIR = flags.DEFINE_string('workdir', None, 'default: runs/<config>-<variant>')
_STAGES = flags.DEFINE_string('stages', None, "comma list; default: the config's")
_INPUT = flags.DEFINE_string(
    'input', None, 'predict, verify: scans; import_weights: a weights file'
)
_OUTPUT = flags.DEFINE_string('output', None, 'predict, verify: the folder for what they write')

Config = ml_collections.ConfigDict


def _prepared_folder(config: Config, workdir: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(config.data.prepared or workdir / 'prepared')


def _data_folder(config: Config, workdir: pathlib.Path) -> pathlib.Path:
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

    folder = _data_folder(config, workdir)
    if config.phantom.make:
        from covseg_jax.imaging.phantom import write_phantom_data_set

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
    prepared = _prepared_folder(config, workdir)
    report = prepare_studies(
        take_shard(find_studies(folder, config.data.layout), config.prepare.shard),
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
    if not report.made and not report.kept:
        raise InputError(f'{folder}: no study can be used; what is wrong with each stands above')
    return [prepared / study_id / 'geometry.json' for study_id in (*report.made, *report.kept)]


def run_verify(config: Config, workdir: pathlib.Path) -> list[pathlib.Path]:
    """Checks the config's data set, or --input, and writes verify.csv."""
    from covseg_jax.imaging.studies import find_inputs, find_studies
    from covseg_jax.imaging.verify import COLUMNS, NOTE, UNUSABLE, verify_studies

    if _INPUT.value:
        studies = find_inputs(pathlib.Path(_INPUT.value), config.data.layout)
    else:
        studies = find_studies(_data_folder(config, workdir), config.data.layout)
    findings = verify_studies(studies, _prepare_settings(config), num_workers=_num_workers(config))
    path = pathlib.Path(_OUTPUT.value or workdir) / 'verify.csv'
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
    return [path]


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


def run_import_weights(config: Config, workdir: pathlib.Path) -> list[pathlib.Path]:
    """Published weights -> a checkpoint that train goes on from and evaluate and predict use."""
    if not _INPUT.value:
        raise InputError('--stages=import_weights needs --input=FILE (.safetensors, .npz or .pt)')
    from covseg_jax.training.published_weights import import_transunet, read_tensors

    folder = workdir / 'transunet'
    import_transunet(config, read_tensors(pathlib.Path(_INPUT.value)), folder)
    calibration = {'threshold': 0.5, 'checkpoint_step': 0}
    atomic.write_text(folder / 'calibration.json', json.dumps(calibration, indent=2))
    print(f'import_weights: {_INPUT.value} is checkpoint 0 of {folder}')
    if not config.network.published_attention:
        print(
            'import_weights: note: weights trained by the published code need its attention in '
            'every later command: --config.network.published_attention=true'
        )
    return []


def _pseudo_mask_folder(config: Config, workdir: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(config.data.pseudo_masks or workdir / 'pseudo_masks')


def _pseudo_mask_reader(config: Config, workdir: pathlib.Path):
    from covseg_jax.inference.synthesize import read_pseudo_mask

    folder = _pseudo_mask_folder(config, workdir)
    return lambda case: read_pseudo_mask(folder, case.study_id)


def run_train(config: Config, workdir: pathlib.Path) -> list[pathlib.Path]:
    """Trains the segmentation network, and finds its thresholds on held-out healthy scans."""
    from covseg_jax.data.opacities import paint_scans
    from covseg_jax.inference.predict import calibrate_mask
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
    atomic.write_text(folder / 'calibration.json', json.dumps(calibration, indent=2))
    print(
        f'train: threshold {settings.threshold}, of which {settings.seed_threshold} somewhere in '
        'each lesion, found on held-out healthy scans with painted opacities; '
        f'false positives without them {false_positive_ml:.1f} ml'
    )
    return [folder / 'metrics.jsonl', folder / 'calibration.json']


def _load_segmenter(config: Config, workdir: pathlib.Path):
    """The trained network's probability function, its mask settings, its checkpoint's step."""
    from covseg_jax.inference.predict import MaskSettings
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
    from covseg_jax.inference.predict import MaskSettings

    splits = _splits(config, workdir)
    if not splits.evaluation:
        raise InputError(
            f'{_data_folder(config, workdir)}: no study has a lesion mask, so there is nothing to '
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


def run_predict(config: Config, workdir: pathlib.Path) -> list[pathlib.Path]:
    """NIfTI in -> NIfTI out on the same grid."""
    if not _INPUT.value or not _OUTPUT.value:
        raise InputError('--stages=predict needs --input=FILE|FOLDER and --output=FOLDER')
    from covseg_jax.imaging.studies import find_inputs
    from covseg_jax.inference.predict import predict_studies

    studies = find_inputs(pathlib.Path(_INPUT.value), config.data.layout)
    probability, settings, _ = _load_segmenter(config, workdir)
    output = pathlib.Path(_OUTPUT.value)
    rows, faults = predict_studies(
        studies,
        probability,
        _prepare_settings(config),
        settings,
        output,
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
    return []


# Stages in their order, with the groups of the config that each one's result depends on, beside
# what the stages before it depend on.
PIPELINE: dict[str, tuple[Callable, tuple[str, ...]]] = {
    'prepare': (run_prepare, ('data', 'phantom', 'prepare')),
    'gan': (run_gan, ('seed', 'gan')),
    'synthesize': (run_synthesize, ('synthesize',)),
    # The thresholds are found on what prediction makes of the network's answer.
    'train': (run_train, ('network', 'train', 'predict')),
    'evaluate': (run_evaluate, ()),
}
# Fields that change how a stage runs and not what it makes.
_HARMLESS = (
    'num_workers', 'on_bad_study', 'shard', 'log_every', 'save_every', 'write_probability',
)  # fmt: skip
ON_REQUEST: dict[str, Callable] = {
    'verify': run_verify,
    'import_weights': run_import_weights,
    'predict': run_predict,
}


def _stage_settings(config: Config, workdir: pathlib.Path) -> dict[str, dict]:
    """For each stage of the pipeline, everything that its result depends on."""
    settings: dict[str, dict] = {}
    so_far: dict = {}
    values = {
        group: {k: v for k, v in fields.items() if k not in _HARMLESS}
        if isinstance(fields, dict)
        else fields
        for group, fields in config.to_dict().items()
    }
    for stage, (_, groups) in PIPELINE.items():
        so_far = so_far | {group: values[group] for group in groups}
        if stage == 'prepare':
            so_far['studies'] = _describe_files(_data_folder(config, workdir))
        settings[stage] = so_far
        if stage == 'prepare':  # a shard changes who prepares, and not what
            settings[stage] = so_far | {'shard': config.prepare.shard}
    return settings


def _describe_files(folder: pathlib.Path) -> str:
    """A fingerprint of the names, sizes and times of a data set's files."""
    files = sorted(p for p in folder.rglob('*') if p.is_file() and not p.name.startswith('.'))
    rows = [(str(p.relative_to(folder)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return manifest.fingerprint(rows)


def run_stages(config: Config, workdir: pathlib.Path, stages: Iterable[str]) -> None:
    """Runs stages in order; one that is done and unchanged is skipped with a line that says so."""
    for stage in stages:
        if stage in ON_REQUEST:
            ON_REQUEST[stage](config, workdir)
            continue
        settings = _stage_settings(config, workdir)[stage]
        if manifest.is_done(workdir, stage, manifest.fingerprint(settings)):
            print(f'{stage}: done before with the same settings, skipped')
            continue
        if stage in ('gan', 'train'):
            manifest.refuse_other_settings(workdir, stage, settings)
        manifest.begin(workdir, stage, settings)
        began = time.monotonic()
        outputs = PIPELINE[stage][0](config, workdir)
        seconds = time.monotonic() - began
        # The stage may have made the studies that its settings describe.
        settings = _stage_settings(config, workdir)[stage]
        manifest.finish(workdir, stage, settings, outputs, seconds)
        print(f'{stage}: done in {seconds:.0f} s')


def _describe_environment() -> dict:
    packages = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy', 'nibabel')
    revision = subprocess.run(
        ['git', 'rev-parse', 'HEAD'],
        capture_output=True,
        text=True,
        check=False,
        cwd=pathlib.Path(__file__).parent,
    )
    return {
        'python': platform.python_version(),
        'platform': platform.platform(),
        'packages': {name: metadata.version(name) for name in packages},
        'git_revision': revision.stdout.strip() or None,
    }


def _check_stages(text: str) -> list[str]:
    known = ['verify', 'import_weights', *PIPELINE, 'predict']  # the order in which they run
    stages = [stage.strip() for stage in text.split(',') if stage.strip()]
    unknown = [stage for stage in stages if stage not in known]
    if unknown or not stages:
        named = ', '.join(unknown) or 'none'
        raise InputError(f'--stages: {named} is not known; choose from {", ".join(known)}')
    return sorted(stages, key=known.index)


def _run(arguments: list[str]) -> None:
    if len(arguments) > 1:
        raise InputError(f'{arguments[1]}: not a flag; flags begin with --')
    config = _CONFIG.value
    if config is None:
        raise InputError('--config is missing; for example --config=configs/transunet.py:phantom')
    try:
        stages = _check_stages(_STAGES.value or config.stages)
    except OSError as error:  # config_flags tells of a missing file at the first use only
        raise InputError(f'--config: {_one_line(error)}') from error
    workdir = pathlib.Path(_WORKDIR.value or f'runs/{config.name}-{config.variant}')
    if any(stage in PIPELINE for stage in stages):
        workdir.mkdir(parents=True, exist_ok=True)
        atomic.write_text(workdir / 'config.json', config.to_json_best_effort(indent=2))
        atomic.write_text(
            workdir / 'environment.json', json.dumps(_describe_environment(), indent=2)
        )
    run_stages(config, workdir, stages)


def main(arguments: list[str]) -> int:
    """Runs, and turns what a person can mend into one line and an exit code."""
    logging.set_verbosity(logging.ERROR)  # Orbax tells of each file that it opens and closes
    try:
        _run(arguments)
    except InputError as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    except OSError as error:  # a full or read-only disk, a folder where a file should be
        print(f'error: {error.filename or "disk"}: {error.strerror or error}', file=sys.stderr)
        return 1
    except (Stopped, KeyboardInterrupt) as stop:
        what = str(stop) or 'stopped'
        print(f'{what}; run the same command again to go on', file=sys.stderr)
    return 0


def _parse_flags(arguments: list[str]) -> list[str]:
    try:
        return flags.FLAGS(arguments)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        # A misspelt field, a value of the wrong type, a variant that is not there.
        print(f'error: {_one_line(error)}', file=sys.stderr)
        sys.exit(2)


def _one_line(error: Exception) -> str:
    # config_flags wraps errors in errors, and puts whole tracebacks into its messages; their last
    # line says what was wrong.
    while error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if 'Traceback' in text or isinstance(error, OSError) else '; '.join(lines)


if __name__ == '__main__':
    app.run(main, flags_parser=_parse_flags)
