"""The program as a person runs it: every stage on tiny phantoms, twice, and its complaints."""

import json
import shutil

import jax
import jax.numpy as jnp
import nibabel
import numpy as np
import pytest
from matplotlib import image
from tensorboard.backend.event_processing import event_accumulator

from configs import transunet
from covseg_jax import main
from covseg_jax.data import feeds
from covseg_jax.errors import InputError
from covseg_jax.evaluation import scores
from covseg_jax.imaging.studies import find_studies
from covseg_jax.predict import export
from covseg_jax.segmentation import train as segmentation
from covseg_jax.stages import guide, settings
from covseg_jax.stages.inputs import Request
from launch import measure
from tests.program import assert_one_line_error, run
from tests.segmentation.test_import_weights import write_weights


def test_main_runs_every_stage_to_a_summary(tiny_run):
    workdir, _ = tiny_run
    summary = json.loads((workdir / 'evaluation' / 'summary.json').read_text())
    assert {'protocols', 'pseudo_masks', 'threshold', 'checkpoint_step', 'studies'} <= set(summary)
    assert set(summary['protocols']) == {'volume', 'slice_infection_over_1pct', 'slice_all'}
    assert summary['studies'] == 2
    assert summary['checkpoint_step'] == 8
    for name in ('cases.csv', 'slices.csv', 'report.html', 'figures/dice_vs_infection.png'):
        assert (workdir / 'evaluation' / name).stat().st_size > 0
    for name in ('gan', 'transunet'):
        steps = [
            json.loads(line)['step']
            for line in (workdir / name / 'metrics.jsonl').read_text().splitlines()
        ]
        assert steps == sorted(steps)
        assert steps[-1] == 8
        assert list((workdir / name / 'tensorboard').iterdir())
    assert json.loads((workdir / 'environment.json').read_text())['packages']['jax']


def test_main_ends_each_stage_with_a_table(tiny_run):
    _, done = tiny_run
    for row in ('made', 'validation/removed', 'median infection, %', 'threshold', 'slice_all'):
        assert any(line.startswith(row) or f' {row} ' in line for line in done.stdout.splitlines())
    assert '%|' not in done.stderr  # progress bars are for terminals


def test_main_says_before_each_stage_what_it_does_and_where(tiny_run):
    workdir, done = tiny_run
    for name, place in (('gan', 'gan'), ('train', 'transunet'), ('synthesize', 'pseudo_masks')):
        line = f'{name}: {guide.STAGES[name]}; writes {workdir / place}\n'
        assert 0 <= done.stdout.index(line) < done.stdout.index(f'{name}: done in')


def test_main_leaves_pictures_and_tensorboard_of_the_whole_run(tiny_run):
    workdir, _ = tiny_run
    assert image.imread(workdir / 'progress.png').shape[1] > 1000
    summary = json.loads((workdir / 'evaluation' / 'summary.json').read_text())
    found = event_accumulator.EventAccumulator(str(workdir / 'evaluation' / 'tensorboard')).Reload()
    volume = summary['protocols']['volume']
    for metric in ('dice', 'hd95_mm'):
        if volume[metric]['mean'] is not None:
            (point,) = found.Scalars(f'evaluation_volume/{metric}')
            assert (point.step, point.value) == (8, pytest.approx(volume[metric]['mean'], rel=1e-6))
    assert 'pictures/dice_vs_infection' in found.Tags()['images']
    assert found.PluginTagToContent('pr_curves').keys() == {'evaluation_volume/voxels_in_lungs'}
    assert found.PluginTagToContent('hparams')
    report = (workdir / 'evaluation' / 'report.html').read_text()
    for metric in ('sensitivity', 'specificity_lung', 'nsd', 'brier'):
        assert f'<td class="number">{volume[metric]["mean"]:.3f}</td>' in report


def test_main_leaves_nothing_that_needs_pickle(tiny_run):
    workdir, _ = tiny_run
    for path in workdir.rglob('*.npy'):
        np.load(path, allow_pickle=False)
    assert not [p for p in workdir.rglob('*') if p.suffix in ('.pkl', '.pickle', '.pt')]


def test_main_run_twice_does_nothing_and_says_so(tiny_run):
    workdir, _ = tiny_run
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob('*') if p.is_file()}
    again = run('--config=configs/transunet.py:tiny', f'--workdir={workdir}')
    assert again.returncode == 0
    for stage in ('prepare', 'gan', 'synthesize', 'train', 'evaluate'):
        assert f'{stage}: done before with the same settings, skipped' in again.stdout
    after = {p: p.stat().st_mtime_ns for p in workdir.rglob('*') if p.is_file()}
    assert after == before


def test_main_predict_writes_masks_on_the_studies_own_grid(tiny_run, tmp_path):
    workdir, _ = tiny_run
    scans = tmp_path / 'scans'
    scans.mkdir()
    source = next((workdir / 'studies' / 'studies').rglob('*.nii.gz'))
    (scans / source.name).write_bytes(source.read_bytes())
    (scans / 'broken.nii.gz').write_bytes(source.read_bytes()[:-100])
    done = run(
        '--config=configs/transunet.py:tiny',
        f'--workdir={workdir}',
        '--stages=predict',
        f'--input={scans}',
        f'--output={tmp_path / "masks"}',
        '--probability',
    )
    # One study is damaged: it is named, the other is done all the same.
    assert_one_line_error(done, '1 of 2', 'broken.nii.gz')
    image = nibabel.load(source)
    stem = source.name.removesuffix('.nii.gz')
    for kind, dtype in (('mask', np.uint8), ('probability', np.float32)):
        found = nibabel.load(tmp_path / 'masks' / f'{stem}_{kind}.nii.gz')
        assert found.shape == image.shape
        assert found.get_data_dtype() == dtype
        np.testing.assert_allclose(found.affine, image.affine, atol=1e-6)
    rows = (tmp_path / 'masks' / 'results.csv').read_text().splitlines()
    assert rows[0].startswith('study_id,status,lesion_ml,lung_ml,infection_percent')
    assert len(rows) == 3


def test_main_exports_a_model_that_predicts_without_a_config(tiny_run, tmp_path):
    workdir, _ = tiny_run
    tiny = '--config=configs/transunet.py:tiny', f'--workdir={workdir}'
    exported = run(*tiny, '--stages=export', f'--output={tmp_path / "export"}')
    assert exported.returncode == 0, exported.stderr
    scans = workdir / 'studies' / 'studies' / 'CT-1'
    by_run, by_export = tmp_path / 'by_run', tmp_path / 'by_export'
    wanted = f'--input={scans}', '--probability'
    done = run(*tiny, '--stages=predict', *wanted, f'--output={by_run}')
    assert done.returncode == 0, done.stderr
    flags = f'--model={tmp_path / "export"}', *wanted, f'--output={by_export}'
    done = run(*flags, '--preview', '--per_lung')
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in by_run.glob('*.nii.gz'))
    assert len(names) == 2 * len(list(scans.iterdir()))
    for name in names:
        assert (by_run / name).read_bytes() == (by_export / name).read_bytes()
    before = {path: path.stat().st_mtime_ns for path in by_export.glob('study_*')}
    again = run(*flags, '--preview', '--per_lung', '--resume')
    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before
    wrong = run(*flags, '--stages=predict,evaluate')
    assert_one_line_error(wrong, '--model', 'predict')


def test_a_training_goes_on_with_the_statistics_of_its_scans(tiny_run, tmp_path, monkeypatch):
    workdir, _ = tiny_run
    monkeypatch.setattr(export, 'PLATFORMS', ())  # quick to write, and the weights are there
    call(workdir, 'export', {}, output=tmp_path / 'export')
    adapted, make_real = [], segmentation.make_adapt

    def make_adapt(parts, *settings):
        def adapt(state, feed):
            adapted.append(feed.batches[0][feeds.IMAGE])
            if len(adapted) == 1:  # the teacher
                return make_real(parts, *settings)(state, feed)
            sevens = jax.tree.map(lambda leaf: jnp.full_like(leaf, 7), state.ema['batch_stats'])
            return state.replace(ema=state.ema | {'batch_stats': sevens})

        return adapt

    monkeypatch.setattr(segmentation, 'make_adapt', make_adapt)
    config = transunet.get_config('tiny').unlock()
    config.update_from_flattened_dict({
        'train.init': str(tmp_path / 'export'), 'synthesize.source': 'model',
        'train.statistics': 'scans', 'train.rounds': ('targets',), 'train.round_shares': (1.0,),
        'train.num_steps': 1, 'train.learning_rate': 0.0, 'train.ema_decay': 0.0,
        'data.prepared': str(workdir / 'prepared'), 'data.folder': str(workdir / 'studies'),
        'phantom.make': False,
    })  # fmt: skip
    on = tmp_path / 'on'
    main.run_stages(config.lock(), on, ['prepare', 'synthesize'], Request())
    for path in (on / 'pseudo_masks').glob('*.npy'):  # so small a teacher finds nothing
        np.save(path, np.ones_like(np.load(path)))
    main.run_stages(config, on, ['train'], Request())
    by_teacher, by_student = adapted
    assert by_teacher.shape == (8, 32, 32, 1)
    np.testing.assert_array_equal(by_teacher, by_student)
    begun = json.loads((on / 'manifests' / 'synthesize.begun.json').read_text())
    assert begun['pseudo_mask_model'].endswith('with the statistics of all slices of the scans')
    assert begun['pseudo_mask_model_adapted_by']['train']['batch_size'] == 8
    summary = json.loads((on / 'pseudo_masks' / 'summary.json').read_text())
    calibration = json.loads((on / 'transunet' / 'calibration.json').read_text())
    assert summary['statistics'] == calibration['training_data']['statistics'] == 'scans'
    _, found, _ = segmentation.load_variables(config, on / 'transunet')
    before = export.read_variables(tmp_path / 'export')
    jax.tree.map(np.testing.assert_array_equal, found['params'], before['params'])
    assert {float(each) for leaf in jax.tree.leaves(found['batch_stats']) for each in leaf} == {7.0}


def test_run_is_measured_beside_others_as_it_was_evaluated(tiny_run, tmp_path):
    workdir, _ = tiny_run
    studies = {study.study_id: study for study in find_studies(workdir / 'studies')}
    case_rows, _ = scores.read_tables(workdir / 'evaluation')
    sets = {'phantoms': [studies[row['study_id']] for row in case_rows]}
    (recipe,) = measure.measure(tmp_path, {'run': {'run': (workdir,)}}, sets, num_workers=0)
    expected = [row['dice'] for row in case_rows]
    np.testing.assert_allclose(recipe.column('phantoms', 'dice'), [expected])


def test_main_says_where_a_run_stands_and_scores_any_folder_of_masks(tiny_run, tmp_path):
    workdir, _ = tiny_run
    tiny = '--config=configs/transunet.py:tiny', f'--workdir={workdir}'
    status = run(*tiny, '--stages=status')
    assert status.returncode == 0, status.stderr
    assert status.stdout.count('  done 20') == 5
    assert status.stdout.count('8 of 8') == 2
    masks = workdir / 'studies' / 'masks'
    scored = run(*tiny, '--stages=evaluate', f'--input={masks}', f'--reference={masks}',
                 f'--output={tmp_path}')  # fmt: skip
    assert scored.returncode == 0, scored.stderr
    summary = json.loads((tmp_path / 'summary.json').read_text())
    assert summary['protocols']['volume']['dice']['mean'] == 1
    compared = run(*tiny, '--stages=compare', f'--input={workdir},{workdir}')
    assert compared.returncode == 0, compared.stderr
    assert '[+0.000, +0.000]' in compared.stdout


def test_main_hands_out_pseudo_masks_and_the_training_set_made_of_them(tiny_run, tmp_path):
    workdir, _ = tiny_run
    done = run(
        '--config=configs/transunet.py:tiny',
        f'--workdir={workdir}',
        '--stages=pseudo_masks',
        f'--output={tmp_path}',
    )
    assert done.returncode == 0, done.stderr
    data_set = tmp_path / 'nnUNet_raw' / 'Dataset501_CovidPseudoMasks'
    names = {p.name.removesuffix('.nii.gz') for p in (data_set / 'labelsTr').iterdir()}
    described = json.loads((data_set / 'dataset.json').read_text())
    assert described['numTraining'] == len(names) > 0
    masked = {p.name.split('_mask')[0] for p in (workdir / 'studies' / 'masks').iterdir()}
    assert not names & masked
    name = min(p.stem for p in (workdir / 'pseudo_masks').glob('*.npy') if p.stem not in masked)
    source = next((workdir / 'studies' / 'studies').rglob(f'{name}.nii.gz'))
    copy = data_set / 'imagesTr' / f'{name}_0000.nii.gz'
    assert copy.read_bytes() == source.read_bytes()
    label = nibabel.load(data_set / 'labelsTr' / f'{name}.nii.gz')
    mask = nibabel.load(tmp_path / 'pseudo_masks' / f'{name}_mask.nii.gz')
    np.testing.assert_array_equal(label.get_fdata(), mask.get_fdata())
    np.testing.assert_array_equal(label.affine, nibabel.load(source).affine)


def test_main_refuses_to_train_on_under_other_settings(tiny_run):
    workdir, _ = tiny_run
    done = run(
        '--config=configs/transunet.py:tiny',
        f'--workdir={workdir}',
        '--stages=train',
        '--config.train.learning_rate=0.5',
    )
    usual = str(transunet.get_config('tiny').train.learning_rate)
    assert_one_line_error(done, 'train.learning_rate', usual, '0.5', '--workdir')


def test_a_stage_that_is_stopped_half_way_is_no_success(monkeypatch, capsys):
    """launch/*.sh and retry_tpu_vm.sh would go on with what is not there."""

    def stop(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(main, '_run', stop)
    assert main.main([]) == 130
    assert 'run the same command again' in capsys.readouterr().err


def call(workdir, stage, fields, **given):
    """A stage of the tiny variant in this process."""
    config = transunet.get_config('tiny').unlock()
    config.update_from_flattened_dict(fields)
    main.run_stages(config.lock(), workdir, [stage], Request(**given))


@pytest.mark.parametrize(
    ('stage', 'field', 'value'),
    [
        ('gan', 'prepare.window_hu', (-900.0, 400.0)),  # the cases were prepared with another
        ('synthesize', 'gan.generator.input_shift', 0.2),
        ('synthesize', 'data.calibration_fraction', 0.6),
        ('train', 'opacities.core_share', 0.9),
        ('evaluate', 'network.published_attention', True),
        ('evaluate', 'data.evaluation_pattern', 'study_0001'),
        ('predict', 'network.num_heads', 4),
        ('predict', 'prepare.window_hu', (-900.0, 400.0)),
        ('predict', 'masks.min_component_ml', 5.0),
        ('export', 'predict.flip', False),
        ('pseudo_masks', 'synthesize.percentile', 50.0),
    ],
)
def test_main_refuses_what_a_run_was_not_made_with_and_leaves_the_run_as_it_was(
    tiny_run, tmp_path, stage, field, value
):
    workdir, _ = tiny_run
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob('*') if p.is_file()}
    usual = transunet.get_config('tiny')
    for name in field.split('.'):
        usual = usual[name]
    usual, wanted = json.loads(json.dumps([usual, value]))
    scans = workdir / 'studies' / 'studies' / 'CT-1'
    given = {'output': tmp_path, **({'input': scans} if stage == 'predict' else {})}
    with pytest.raises(InputError) as error:
        call(workdir, stage, {field: value}, **given)
    assert f'{field} was {usual}, is {wanted}' in str(error.value)
    assert 'use those, or ' in str(error.value)
    assert {p: p.stat().st_mtime_ns for p in workdir.rglob('*') if p.is_file()} == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ('stage', 'fields'),
    [
        ('predict', {'data.layout': 'plain', 'prepare.lesion_labels': (255,), 'train.num_steps': 9,
                     'data.folder': 'elsewhere', 'predict.batch_size': 3}),
        ('evaluate', {'data.prepared': 'elsewhere', 'predict.batch_size': 3, 'train.save_every': 1,
                      'prepare.lesion_labels': (255,), 'train.max_skipped_steps': 3}),
        ('evaluate', {'network.name': 'none', 'train.num_steps': 9}),
        ('train', {'train.log_every': 1, 'train.save_every': 7}),
    ],
)  # fmt: skip
def test_stages_take_settings_that_change_nothing_of_what_they_use(tiny_run, stage, fields):
    workdir, _ = tiny_run
    config = transunet.get_config('tiny').unlock()
    config.update_from_flattened_dict(fields)
    assert config.to_dict() != transunet.get_config('tiny').to_dict()
    settings.refuse_other_settings(config, workdir, stage)


def test_main_keeps_with_each_network_what_it_was_trained_with(tiny_run, tmp_path):
    workdir, _ = tiny_run
    for name in ('gan', 'transunet'):
        begun = json.loads((workdir / name / 'config.json').read_text())
        assert begun['train']['num_steps'] == 8
        assert json.loads((workdir / name / 'environment.json').read_text())['packages']['jax']
    copy = tmp_path / 'run'
    shutil.copytree(workdir, copy)
    (copy / 'config.json').write_text(json.dumps({'train': {'num_steps': 5}}))  # of a later stage
    status = run('--config=configs/transunet.py:tiny', f'--workdir={copy}', '--stages=status')
    assert status.stdout.count('8 of 8') == 2
    # Files that were touched are the same data; a changed one is another data set.
    mask = next((copy / 'studies' / 'masks').iterdir())
    mask.touch()
    settings.refuse_other_settings(transunet.get_config('tiny'), copy, 'train')
    mask.write_bytes(mask.read_bytes() + b'0')
    with pytest.raises(InputError, match='data_set was'):
        settings.refuse_other_settings(transunet.get_config('tiny'), copy, 'train')


def test_imported_weights_are_held_to_the_settings_of_their_import(tiny_run, tmp_path):
    workdir, _ = tiny_run
    fields = {'network.final_width': 0, 'network.published_attention': True}
    call(tmp_path, 'import_weights', fields, input=write_weights(tmp_path / 'weights.safetensors'))
    scans = {'input': workdir / 'studies' / 'studies' / 'CT-1', 'output': tmp_path / 'masks'}
    forgotten = 'network.published_attention was True, is False'
    with pytest.raises(InputError, match=forgotten):
        call(tmp_path, 'predict', {'network.final_width': 0}, **scans)
    prepared = {f'data.{name}': str(workdir / name) for name in ('prepared', 'pseudo_masks')}
    with pytest.raises(InputError, match=forgotten):
        call(tmp_path, 'train', prepared | {'network.final_width': 0})
    with pytest.raises(InputError, match='batch_size'):
        call(tmp_path, 'train', prepared | fields | {'train.batch_size': 7})
    # A training that came to nothing binds nobody; its own settings may be any.
    config = transunet.get_config('tiny').unlock()
    config.update_from_flattened_dict(prepared | fields | {'train.learning_rate': 0.1})
    settings.refuse_other_settings(config, tmp_path, 'train')


@pytest.mark.parametrize(
    ('flags', 'parts'),
    [
        (['--config=configs/transunet.py:huge'], ['huge', 'tiny']),
        (['--config=configs/nothing.py'], ['nothing.py']),
        (
            ['--config=configs/transunet.py:tiny', '--config.train.batchsize=3'],
            ['no field', 'batchsize'],
        ),
        (['--config=configs/transunet.py:tiny', '--config.workdir=w'], ['no field', 'workdir']),
        (
            ['--config=configs/transunet.py:tiny', '--config.train.batch_size=x'],
            ['batch_size=x: must be a whole number'],
        ),
        (['--input=scan.nii.gz', '--output=o', '--num_workers=-1'], ['num_workers', '0 or more']),
        (
            ['--config=configs/transunet.py:tiny', '--config.opacities.edge=0.3'],
            ['opacities.edge', '(low, high)'],
        ),
        (['--config=configs/transunet.py:tiny', '--stages=trian'], ['trian', 'train']),
        ([], ['--config']),
        (['--config=configs/transunet.py:tiny', '--stages=predict'], ['--input']),
        (['--config=configs/transunet.py:tiny', '--stages=pseudo_masks'], ['--output']),
        (['--config=configs/transunet.py', '--config.data.folder={tmp}/none'], ['none', 'folder']),
        (['--config=configs/transunet.py', '--config.data.folder={tmp}'], ['{tmp}']),
    ],
)
def test_main_says_what_is_wrong_in_one_line(flags, parts, tmp_path):
    def fill(text):
        return text.replace('{tmp}', str(tmp_path))

    work = [] if any('stages=predict' in f for f in flags) else [f'--workdir={tmp_path / "w"}']
    assert_one_line_error(run(*map(fill, flags), *work), *map(fill, parts))
