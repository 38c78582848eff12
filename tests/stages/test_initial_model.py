"""A training that goes on from a model: which model, what is refused, and the first state."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest

import covseg_jax
from configs import transunet
from covseg_jax import manifest
from covseg_jax.errors import InputError
from covseg_jax.imaging.masks import MaskSettings
from covseg_jax.predict import export
from covseg_jax.predict.default import MEMBERS
from covseg_jax.segmentation import train as segmentation
from covseg_jax.segmentation.volumes import predict_volumes
from covseg_jax.stages import initial_model, settings
from covseg_jax.training import sharding
from tests.settings import prepare_settings

GRID = (16, 32, 32)


def tiny(**fields):
    config = transunet.get_config('tiny').unlock()
    config.update_from_flattened_dict(fields)
    return config


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """An export of the tiny network, without functions and of random weights: quick to make."""
    folder, config = tmp_path_factory.mktemp('model') / 'export', tiny()
    network, rng = segmentation.make_network(config), np.random.default_rng(3)
    slices = jax.ShapeDtypeStruct((1, *GRID[1:], 1), np.float32)
    shapes = jax.eval_shape(network.init, jax.random.key(0), slices)
    ranges = {'params': (-0.2, 0.2), 'batch_stats': (0.5, 1.5)}  # variances are positive
    variables = {
        name: jax.tree.map(lambda leaf, r=r: rng.uniform(*r, leaf.shape).astype('f4'), shapes[name])
        for name, r in ranges.items()
    }
    contents = export.Exported(
        preparation=prepare_settings(grid=GRID),
        volumes=segmentation.volume_settings(config),
        masks=MaskSettings(0.5, 0.6, 0.1),
        facts={'config': 'made', 'training_data': {'human_masks': False}},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, 'PLATFORMS', ())
        export.write_export(folder, network, variables, contents)
    return folder


def test_training_begins_with_the_models_predictions_bit_for_bit(exported):
    config = tiny(**{'train.init': str(exported)})
    parts = segmentation.build_segmentation(config, sharding.make_local_mesh())
    state = parts.start_from(initial_model.load(config, lambda of: export.read_variables(of[0])))
    predict = segmentation.make_predict(parts.network)
    volumes = segmentation.volume_settings(config)
    rng = np.random.default_rng(0)
    volume = rng.random(GRID, np.float32), np.ones(GRID, np.uint8)
    expected = covseg_jax.load(exported).probabilities[0](*volume)
    assert expected.std() > 0
    trained = {'params': state.params['network'], 'batch_stats': state.batch_stats}
    for weights in (state.ema, trained):
        found = predict_volumes(functools.partial(predict, weights), volumes)(*volume)
        np.testing.assert_array_equal(found, expected)
    assert int(state.step) == 0
    same = jax.tree.map(
        lambda leaf, like: (leaf.shape, leaf.dtype, leaf.sharding)
        == (like.shape, like.dtype, like.sharding),
        state, parts.abstract_state,
    )  # fmt: skip
    assert all(jax.tree.leaves(same))
    # A step donates the state: no two of its arrays may be one.
    arrays = [leaf for leaf in jax.tree.leaves(state) if leaf.size > 1]
    assert len({each.unsafe_buffer_pointer() for each in arrays}) == len(arrays)


def test_other_weights_than_model_json_describes_are_refused(exported):
    parts = segmentation.build_segmentation(tiny(**{'network.width': 16}))
    with pytest.raises(InputError, match=r'train\.init.*shapes'):
        parts.start_from(export.read_variables(exported))


@pytest.mark.parametrize(
    ('fields', 'parts'),
    [
        (
            {'network.num_heads': 4},
            ['network.num_heads is 2 and 4', '--config.network.num_heads=2'],
        ),
        ({'prepare.window_hu': (-900.0, 400.0)}, ["'--config.prepare.window_hu=(-1000.0, 400.0)'"]),
        ({'network.name': 'unet'}, ['network.name is transunet and unet']),
        ({'train.init': 'nowhere/'}, ['train.init=nowhere/', "'default'", '--stages=export']),
        ({'train.init': 'default'}, ['network.width is 16 and 8', 'transunet.py:phantom_fine']),
        ({'train.init': f'EXPORTED,{MEMBERS[0]}'}, [f'={MEMBERS[0]}: in', 'width is 16']),
        ({'train.init': 'EXPORTED, nowhere/'}, ['train.init=nowhere/']),
        ({'train.init': 'EXPORTED,'}, ['train.init=: no export', 'several with commas']),
        ({'train.init': 'EXPORTED,OTHER'}, ['goes on from one', 'synthesize.source=model']),
        ({'train.init': 'EXPORTED,OTHER', 'synthesize.source': 'model'}, ['/other sees scans']),
        ({'train.init': 'EXPORTED,EXPORTED', 'synthesize.source': 'model'}, ['twice']),
        ({'train.init': '', 'synthesize.source': 'model'}, ['--config.train.init=default']),
        ({'synthesize.source': 'model', 'synthesize.share_of_max': 0.2}, ['share_of_max']),
        (
            {
                'synthesize.source': 'model',
                'train.statistics': 'scans',
                'masks.share_of_max': 0.2,
            },
            ['share_of_max', 'scans'],
        ),
    ],
)
def test_model_that_does_not_fit_is_refused_in_one_line(exported, tmp_path, fields, parts):
    initial_model.refuse_misfit(tiny(**{'train.init': str(exported), 'network.dropout_rate': 0.3}))
    other = shutil.copytree(exported, tmp_path / 'other')  # other weights, wider margins
    sums = (other / 'SHA256SUMS').read_text()
    at = sums.index('weights.safetensors') - 66
    (other / 'SHA256SUMS').write_text(f'{sums[:at]}{"0" * 64}{sums[at + 64 :]}')
    model = json.loads((other / 'model.json').read_text())
    model['preparation']['margin_mm'] += 9
    (other / 'model.json').write_text(json.dumps(model))
    init = fields.get('train.init', 'EXPORTED')
    init = init.replace('EXPORTED', str(exported)).replace('OTHER', str(other))
    with pytest.raises(InputError) as error:
        initial_model.refuse_misfit(tiny(**{**fields, 'train.init': init}))
    assert len(str(error.value).splitlines()) == 1
    for part in parts:
        assert part in str(error.value)


def test_a_teacher_of_a_coarser_grid_is_taken_and_one_of_a_finer_grid_is_not(exported, tmp_path):
    teacher = shutil.copytree(exported, tmp_path / 'teacher')

    def name(side):
        sums = (exported / 'SHA256SUMS').read_text()
        at = sums.index('weights.safetensors') - 66
        (teacher / 'SHA256SUMS').write_text(f'{sums[:at]}{"0" * 64}{sums[at + 64 :]}')
        model = json.loads((exported / 'model.json').read_text())
        model['preparation']['grid'] = [GRID[0], side, side]
        (teacher / 'model.json').write_text(json.dumps(model))
        return tiny(**{'train.init': f'{exported},{teacher}', 'synthesize.source': 'model'})

    initial_model.refuse_misfit(name(16))
    first, second = initial_model.read_initial_models(name(16))
    assert (first.pixels, second.pixels) == ((32, 32), (16, 16))
    with pytest.raises(InputError, match=r'finer than .*; name the finest first'):
        initial_model.refuse_misfit(name(64))


def test_variant_phantom_fine_has_the_default_models_sizes():
    config = transunet.get_config('phantom_fine').unlock()
    config.train.init = 'default'
    initial_model.refuse_misfit(config)
    sums = (MEMBERS[0] / 'SHA256SUMS').read_text()
    assert initial_model.read_initial_models(config)[0].weights_sha256 in sums


def test_resumed_run_keeps_the_model_that_it_began_with(exported, tmp_path):
    begun = tiny(**{'train.init': str(exported), 'synthesize.source': 'model'})
    (tmp_path / 'studies').mkdir()
    for stage in ('synthesize', 'train'):
        manifest.begin(tmp_path, stage, settings.stage_settings(begun, tmp_path)[stage])
    (tmp_path / 'transunet' / 'checkpoints' / '4').mkdir(parents=True)
    moved = tmp_path / 'moved'  # the weights count, not where they lie
    moved.mkdir()
    for file in exported.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    same = tiny(**{'train.init': str(moved), 'synthesize.source': 'model'})
    settings.refuse_other_settings(same, tmp_path, 'train')
    weights = json.loads((tmp_path / 'manifests' / 'train.begun.json').read_text())['train']['init']
    assert weights == initial_model.identify(same)
    with pytest.raises(InputError, match=f'train.init was {weights}, is none'):
        settings.refuse_other_settings(tiny(), tmp_path, 'train')


def test_imported_weights_and_a_model_are_not_both_the_start(exported, tmp_path):
    manifest.begin(tmp_path, 'train', settings.import_settings(tiny()))
    (tmp_path / 'studies').mkdir()
    (tmp_path / 'transunet' / 'checkpoints' / '0').mkdir(parents=True)
    settings.refuse_other_settings(tiny(), tmp_path, 'train')
    with pytest.raises(InputError, match=r'train\.init was none'):
        settings.refuse_other_settings(tiny(**{'train.init': str(exported)}), tmp_path, 'train')


def test_teachers_are_all_networks_of_a_model_and_their_cuts(tmp_path):
    default, first = tiny(**{'train.init': 'default'}), tiny(**{'train.init': str(MEMBERS[0])})
    assert initial_model.identify(default) == initial_model.identify(first)
    shutil.copytree(MEMBERS[0], tmp_path / 'a')
    told = [initial_model.identify_teachers(each) for each in (default, first)]
    copied = tiny(**{'train.init': str(tmp_path / 'a')})
    assert initial_model.identify_teachers(copied) == told[1] != told[0]
    listed = tiny(**{'train.init': f'{tmp_path / "a"},{MEMBERS[1]}'})
    assert initial_model.identify_teachers(listed) == told[0]
    assert initial_model.identify(listed) == initial_model.identify(default)
    assert initial_model.load(listed, list) == [tmp_path / 'a', MEMBERS[1]]
    model = json.loads((tmp_path / 'a' / 'model.json').read_text())
    model['masks']['threshold'] += 0.1
    (tmp_path / 'a' / 'model.json').write_text(json.dumps(model))
    assert initial_model.identify_teachers(copied) != told[1]


def test_adapted_teachers_are_their_weights_and_what_they_are_adapted_by(tmp_path):
    def told(**fields):
        named = {'train.init': 'default', 'train.statistics': 'scans'} | fields
        config = tiny(**{'synthesize.source': 'model'} | named)
        recorded = settings.stage_settings(config, tmp_path)['synthesize']
        return json.dumps({key: recorded[key] for key in recorded if 'pseudo_mask_model' in key})

    shutil.copytree(MEMBERS[0], tmp_path / 'a')
    model = json.loads((tmp_path / 'a' / 'model.json').read_text())
    model['masks']['threshold'] += 0.1  # its cuts are not used
    (tmp_path / 'a' / 'model.json').write_text(json.dumps(model))
    first, other_cuts = ({'train.init': str(each)} for each in (MEMBERS[0], tmp_path / 'a'))
    assert told(**first) == told(**other_cuts, **{'predict.batch_size': 3}) != told()
    changes = {
        'train.statistics': 'training', 'train.init': str(MEMBERS[1]),
        'train.max_healthy_ml': 9.0, 'train.batch_size': 4, 'predict.smoothing_pixels': 0.0,
        'masks.min_component_ml': 0.3, 'train.compute_dtype': 'bfloat16',
        'network.num_heads': 4,
    }  # fmt: skip
    assert len({told(), *(told(**{name: value}) for name, value in changes.items())}) == 9
