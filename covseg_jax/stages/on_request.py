"""The stages that run on request, beside the pipeline."""

import contextlib
import csv
import dataclasses
import json
import pathlib
import signal
from collections.abc import Callable, Iterator, Sequence

from covseg_jax import atomic, hosts, manifest, mirror, written
from covseg_jax.errors import FileFault, InputError, Stopped
from covseg_jax.evaluation.folders import FILES, pair_masks, score_folder
from covseg_jax.imaging.masks import MaskSettings
from covseg_jax.imaging.studies import find_inputs, find_studies
from covseg_jax.prepare.lung_network import FILE as LUNG_NETWORK
from covseg_jax.prepare.prepare_studies import PrepareSettings
from covseg_jax.prepare.verify import COLUMNS, NOTE, UNUSABLE, Finding, verify_studies
from covseg_jax.stages import inputs
from covseg_jax.stages.evaluate_export import run_evaluate_export
from covseg_jax.stages.inputs import Config, Request
from covseg_jax.stages.outcome import show_table, table_of_summary
from covseg_jax.stages.pipeline import PIPELINE, TRAINED
from covseg_jax.stages.settings import begin_lungs, import_settings

STOPPED = 'stopped'  # a file in the work directory of a run that was stopped, until it goes on
_MOST_SHOWN = 25  # studies in a table


def _claim_outputs(given: Request, paths: Sequence[pathlib.Path]) -> None:
    """To be called before any work with what a stage is to write. --output is a person's folder: a
    file that this program did not write is refused. In the work directory all is the program's."""
    if given.output:
        written.refuse_foreign(paths)
    elif hosts.is_first():
        written.adopt(paths)


def run_verify(config: Config, workdir: pathlib.Path, given: Request) -> None:
    """Checks the config's data set, or --input, and writes verify.csv."""
    strays: list[FileFault] = []
    if given.input:
        studies = find_inputs(given.input, config.data.layout, strays.append)
    else:
        folder = inputs.data_folder(config, workdir)
        studies = find_studies(folder, config.data.layout, strays.append)
    path = (given.output or workdir) / 'verify.csv'
    _claim_outputs(given, [path])
    findings = verify_studies(
        studies, PrepareSettings(**config.prepare), num_workers=inputs.num_workers(config, studies)
    )
    findings += [Finding('', str(s.file), NOTE, s.fault, s.remedy) for s in strays]
    if hosts.is_first():
        with written.new_file(path) as temporary, temporary.open('w', newline='') as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(dataclasses.asdict(finding) for finding in findings)
    lungs = {each.study: each for each in findings if each.right_lung_ml is not None}
    columns = ('study', 'right_lung_ml', 'left_lung_ml')
    shown = list(lungs.values())[:_MOST_SHOWN]
    show_table([[getattr(each, name) for name in columns] for each in shown], columns)
    if len(lungs) > _MOST_SHOWN:
        print(f'and {len(lungs) - _MOST_SHOWN} more, in {path}')
    for finding in findings:
        name = pathlib.Path(finding.file).name
        if finding.status == UNUSABLE:
            print(f'verify: {finding.study}: {name}: {finding.fault}; {finding.what_to_do}')
        elif finding.status == NOTE:
            of_study = f'{finding.study}: ' if finding.study else ''
            remedy = f'; {finding.what_to_do}' if finding.what_to_do else ''
            print(f'verify: {of_study}note: {name}: {finding.fault}{remedy}')
    unusable = {finding.study for finding in findings if finding.status == UNUSABLE}
    print(f'verify: {len(studies)} studies, {len(unusable)} unusable; {path}')
    if unusable:
        raise InputError(
            f'{len(unusable)} of {len(studies)} studies cannot be used; mend or remove what '
            f'{path} names'
        )


def run_compile_check(config: Config, workdir: pathlib.Path, given: Request) -> None:
    """Compiles what the config's stages run for TPU topologies, and writes compile_check.json."""
    del given
    from covseg_jax.stages.compile_check import run_check
    from covseg_jax.stages.cost import estimate_costs

    topologies = [name.strip() for name in config.compile_check.topology.split(',')]
    price = config.compile_check.price_per_chip_hour
    path = workdir / 'compile_check.json'
    programs = {}
    for topology in topologies:
        programs[topology] = run_check(config, topology)
        costs = estimate_costs(programs, price)
        workdir.mkdir(parents=True, exist_ok=True)
        # after each: the next one's compiler may take an hour
        atomic.write_text(path, json.dumps({'programs': programs, 'training': costs}, indent=2))
        print(f'compile_check: {topology}, costs of one device')
        rows = [
            (stage, name, result['batch_size'], *_cost_cells(result))
            for stage, results in programs[topology].items()
            for name, result in results.items()
        ]
        show_table(rows, ('stage', 'program', 'batch', *_COSTS, 'collectives'))
    print('compile_check: the training steps of the whole run')
    columns = ['topology', 'stage', 'chips', 'hours', 'samples_per_s_per_chip', 'efficiency']
    columns += ['price'] if price > 0 else []
    show_table([[row.get(name) for name in columns] for row in costs], columns)
    print(f'compile_check: {path}')


_COSTS = {
    'GiB': '{peak_gib:.2f}', 'of': '{memory_gib:g}', 'GFLOP': '{gflops:.0f}',
    'GB': '{gbytes:.1f}', 'ms, estimated': '{estimated_ms:.1f}',
    'ms, arithmetic': '{arithmetic_ms:.1f}', 'ms, bytes': '{bytes_ms:.1f}',
    'ms, links': '{links_ms:.2f}',
}  # fmt: skip


def _cost_cells(result: dict) -> list[str]:
    if not result['fits']:
        return [f'does not fit; the largest batch that does: {result["largest_batch_size"]}']
    collectives = [
        f'{kind} {each["count"]}, {each["bytes"] / 1e6:.1f} MB'
        for kind, each in result['collectives'].items()
    ]
    return [*(cost.format(**result) for cost in _COSTS.values()), '; '.join(collectives)]


def run_lungs(config: Config, workdir: pathlib.Path, given: Request) -> None:
    """Trains a network that finds lungs, on phantoms; its file goes to --output too."""
    from covseg_jax.lungs.train import train_lungs

    copy = given.output / LUNG_NETWORK if given.output else None
    if copy:
        written.refuse_foreign([copy])
    hosts.first_alone(lambda: begin_lungs(config, workdir), 'the training is recorded')
    path = train_lungs(config, workdir / 'lungs', inputs.num_workers(config))
    if copy and hosts.is_first():
        with written.new_file(copy) as temporary:
            temporary.write_bytes(path.read_bytes())
    print(f'lungs: {copy or path}; --config.prepare.lung_network takes it')


def run_import_weights(config: Config, workdir: pathlib.Path, given: Request) -> None:
    """Published weights -> a checkpoint that train goes on from and evaluate and predict use."""
    if not given.input:
        raise InputError('--stages=import_weights needs --input=FILE (.safetensors, .npz or .pt)')
    if config.train.init:
        raise InputError(
            'train.init: imported weights are what the training goes on from; leave this flag or '
            'import_weights out'
        )
    from covseg_jax.segmentation.import_weights import import_transunet, read_tensors

    folder = workdir / 'transunet'
    import_transunet(config, read_tensors(given.input), folder)
    cuts = inputs.given_cuts(config)
    calibration = inputs.describe_cuts(cuts or MaskSettings(0.5, seed_threshold=0.5))
    calibration['checkpoint_step'] = 0
    atomic.write_text(folder / 'calibration.json', json.dumps(calibration, indent=2))
    settings = import_settings(config)
    hosts.first_alone(lambda: manifest.begin(workdir, 'train', settings), 'the import is recorded')
    print(f'import_weights: {given.input} is checkpoint 0 of {folder}')
    if not config.network.published_attention:
        print(
            'import_weights: note: weights trained by the published code need its attention in '
            'every later command: --config.network.published_attention=true'
        )


def run_evaluate_given(config: Config | None, workdir: pathlib.Path, given: Request) -> None:
    """Scores the masks in --input against those in --reference, whatever made them; or an export,
    --model, on a data set."""
    if given.model:
        run_evaluate_export(config, workdir, given)
        return
    if not given.reference:
        raise InputError('--stages=evaluate with --input=PREDICTIONS needs --reference=MASKS')
    pairs, alone = pair_masks(given.input, given.reference)
    folder = given.output or workdir / 'evaluation_of_folder'
    _claim_outputs(given, [folder / name for name in FILES])
    summary = score_folder(pairs, folder, config.data.subject_pattern)
    show_table(*table_of_summary(summary))
    if alone:
        print(f'evaluate: note: in one folder alone, not scored: {", ".join(alone)}')
    print(f'evaluate: {len(pairs)} studies; {folder}')


def run_compare(config: Config, workdir: pathlib.Path, given: Request) -> None:
    """Compares two evaluated runs, --input=FIRST,SECOND, study by study."""
    from covseg_jax.evaluation.compare import compare_runs

    names = str(given.input or '').split(',')
    if len(names) != 2:
        raise InputError('--stages=compare needs --input=FIRST,SECOND, two evaluated runs')
    if given.output:
        written.refuse_foreign([given.output / 'compare.json'])
    differences, alone = compare_runs(*map(pathlib.Path, names))
    print(f'compare: second minus first; first {names[0]}, second {names[1]}')
    rows = [dataclasses.asdict(each) for each in differences]
    cells = [row | {'ci95': '[{:+.3f}, {:+.3f}]'.format(*row['ci95'])} for row in rows]
    head = ('metric', 'n', 'subjects', 'first', 'second', 'difference')
    show_table([[*row.values()] for row in cells], (*head, '95 % interval', "Wilcoxon's p"))
    if alone:
        print(f'compare: note: in one run alone, left out: {", ".join(alone)}')
    if given.output and hosts.is_first():
        text = json.dumps([each.to_json() for each in differences], indent=2, allow_nan=False)
        written.write_text(given.output / 'compare.json', text)


def run_status(config: Config, workdir: pathlib.Path, given: Request) -> None:
    """Prints where a work directory stands."""
    from covseg_jax.training.logging import read_newest

    if not (workdir / 'config.json').exists():
        raise InputError(f'{workdir}: no run was begun there')
    rows = []
    for stage in PIPELINE:
        folder = workdir / TRAINED.get(stage, '')
        values = read_newest(folder / 'metrics.jsonl') if stage in TRAINED else {}
        step = ''
        if values:
            path = folder / 'config.json'  # older runs have that of their last stage alone
            path = path if path.exists() else workdir / 'config.json'
            begun = json.loads(path.read_text(encoding='utf-8'))
            step = f'{values["step"]} of {begun[stage]["num_steps"]}'
        shown = ('loss/total', 'validation/dice', 'validation/removed', 'speed/steps_per_s')
        listed = [f'{key} {values[key]:.4g}' for key in shown if values.get(key) is not None]
        state = manifest.describe(workdir, stage)
        if state == manifest.NOT_BEGUN and stage not in config.stages:
            state = 'not in config.stages'
        rows.append((stage, state, step, ', '.join(listed)))
    show_table(rows, ('stage', 'state', 'step', 'newest values'))
    if (workdir / STOPPED).exists():
        print(f'status: {(workdir / STOPPED).read_text(encoding="utf-8").strip()}')


def run_export(config: Config, workdir: pathlib.Path, given: Request) -> None:
    """The trained network as one folder that predicts without this config."""
    from covseg_jax.predict.export import Exported, refuse_other_contents, write_export
    from covseg_jax.segmentation.train import load_variables, volume_settings

    folder = given.output or workdir / 'export'
    refuse_other_contents(folder)
    masks = inputs.load_masks(config, workdir)
    network, variables, step = load_variables(config, workdir / 'transunet')
    preparation, facts = PrepareSettings(**config.prepare), _facts(config, workdir, step)
    volumes = volume_settings(config)
    contents = Exported(preparation, volumes, masks, facts, onnx=config.export.onnx)
    hosts.first_alone(
        lambda: write_export(folder, network, variables, contents), 'the export is written'
    )
    mirror.share()
    size = sum(path.stat().st_size for path in folder.iterdir())
    show_table([('export', folder), ('step', step), ('MB', size / 1e6)])


def _facts(config: Config, workdir: pathlib.Path, step: int) -> dict:
    """What an export says of the run that it comes from."""
    calibration = inputs.read_calibration(workdir)
    summary_path, metrics = workdir / 'evaluation' / 'summary.json', None
    if summary_path.exists():
        summary = json.loads(summary_path.read_text(encoding='utf-8'))
        cuts = ('threshold', 'seed_threshold', 'share_of_max')
        same_cuts = all(summary.get(name) == calibration.get(name) for name in cuts)
        if summary['checkpoint_step'] == step and same_cuts and config.network.name != 'none':
            names = ('data_sets', 'studies', 'subjects', 'protocols')
            metrics = {name: summary.get(name) for name in names}
            metrics['data_sets'] = inputs.name_data_sets(config, metrics['data_sets'])
    return {
        'config': f'{config.name}:{config.variant}',
        'checkpoint_step': step,
        'metrics': metrics,
        'training_data': inputs.describe_training_data(config, workdir),
        'licence': config.export.licence,
    }


@contextlib.contextmanager
def _interrupted_by_signals() -> Iterator[None]:
    """Within the block, Ctrl-C and SIGTERM raise KeyboardInterrupt. Set for both, for a shell lets
    a program in the background ignore Ctrl-C."""
    chosen = (signal.SIGINT, signal.SIGTERM)
    before = {s: signal.signal(s, signal.default_int_handler) for s in chosen}
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def run_predict(config: Config | None, workdir: pathlib.Path, given: Request) -> None:
    """Scans -> NIfTI masks on their own grids, by the work directory's network or --model."""
    if not given.input or not given.output:
        raise InputError(
            'predict needs --input=FILE|FOLDER, the scans, and --output=FOLDER, for their masks'
        )
    from covseg_jax.predict import dicom_seg
    from covseg_jax.predict.default import CARD, DEFAULT, FOLDER, INTENDED_USE
    from covseg_jax.predict.export import load
    from covseg_jax.predict.model import RANGE
    from covseg_jax.predict.studies import METHODS, REPORT, Extras, predict_studies

    layout = (config or inputs.NO_CONFIG).data.layout
    studies = find_inputs(given.input, layout, inputs.tell_stray('predict'))
    if given.dicom_seg:
        dicom_seg.refuse_impossible(studies)
    if given.model:
        model = load(*given.model.split(','))
        if DEFAULT in given.model.split(','):
            print(f'predict: the model that comes with covseg_jax, {FOLDER / CARD}')
            print(f'predict: {INTENDED_USE}')
    else:
        model, _ = inputs.load_model(config, workdir)
    if given.disagreement and model.num_networks == 1:
        print('predict: note: --disagreement: the model is one network; no map is written')
    try:
        with _interrupted_by_signals():
            rows, faults = predict_studies(
                studies,
                model,
                given.output,
                num_workers=given.num_workers
                or inputs.num_workers(config, studies, dicom_seg=given.dicom_seg),
                wanted=Extras(
                    **{each.name: getattr(given, each.name) for each in dataclasses.fields(Extras)}
                ),
                resume=given.resume,
            )
    except KeyboardInterrupt as stop:
        message = 'predict: stopped; run it again with --resume to go on'
        raise Stopped(message, exit_code=130) from stop
    _show_predicted(rows, faults, RANGE if model.num_networks > 1 else (), given)
    if given.report:
        print(f'predict: open {given.output / REPORT} in a browser to look at the results')
    if given.report and len(faults) < len(rows):
        print(f"predict: {given.output / METHODS} is a paragraph for a paper's methods section")
    if len(faults) == 1 and len(rows) == 1:
        raise InputError(faults[0])
    if faults:
        raise InputError(f'{len(faults)} of {len(rows)} studies set aside: ' + '; '.join(faults))


def _show_predicted(
    rows: Sequence[dict], faults: Sequence[str], ends: Sequence[str], given: Request
) -> None:
    """Prints a table of the studies that are done, with the `ends` of their range, and what was
    noted of them."""
    columns = (
        'study_id', 'lesion_ml', *ends, 'lung_ml', 'right_lung_ml', 'left_lung_ml',
        'infection_percent', 'severity', 'seconds',
    )  # fmt: skip
    done = [row for row in rows if row['status'] == 'ok']
    show_table([[row[name] for name in columns] for row in done[:_MOST_SHOWN]], columns)
    if len(done) > _MOST_SHOWN:
        print(f'and {len(done) - _MOST_SHOWN} more, in {given.output / "results.csv"}')
    for row in done:
        if row.get('notes'):
            print(f'predict: {row["study_id"]}: note: {row["notes"]}')
    noun = 'study' if len(done) == 1 else 'studies'
    print(f'predict: {len(done)} {noun} done, {len(faults)} set aside; {given.output}')


def run_pseudo_masks(config: Config, workdir: pathlib.Path, given: Request) -> None:
    """Pseudo-masks -> NIfTI on the studies' own grids, and the training set in nnU-Net's layout."""
    if not given.output:
        raise InputError('--stages=pseudo_masks needs --output=FOLDER')
    from covseg_jax.predict import pseudo_masks

    splits = inputs.split_studies(config, workdir)
    studies = find_studies(inputs.data_folder(config, workdir), config.data.layout)
    known = {study.study_id: study for study in studies}
    masks, raw = given.output / 'pseudo_masks', given.output / 'nnUNet_raw'
    learnt = splits.train + splits.validation
    covid = learnt + splits.evaluation
    read, cuts = inputs.pseudo_probability_reader(config, workdir), inputs.pseudo_mask_cuts(config)
    pseudo_masks.refuse_foreign_files(covid, masks, splits, raw)
    pseudo_masks.write_pseudo_masks(covid, read, masks, cuts)
    data_set = pseudo_masks.write_nnunet_data_set(splits, known, masks, raw)
    rows = [
        ('pseudo-masks', len(covid), masks),
        ('to train on, with pseudo-masks', len(learnt), data_set),
        ('to train on, healthy', len(splits.healthy_train), data_set),
    ]
    show_table(rows, ('pseudo_masks', 'studies', 'in'))


BEFORE: dict[str, Callable] = {
    'verify': run_verify,
    'compile_check': run_compile_check,
    'import_weights': run_import_weights,
    'lungs': run_lungs,
}
AFTER: dict[str, Callable] = {
    'export': run_export,
    'predict': run_predict,
    'pseudo_masks': run_pseudo_masks,
    'compare': run_compare,
    'status': run_status,
}
# What runs in place of a stage of the pipeline where --input or --model is given.
ON_INPUT: dict[str, Callable] = {'evaluate': run_evaluate_given}
