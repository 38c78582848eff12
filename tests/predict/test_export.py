"""One folder that predicts what the training code predicts, or says what is wrong with it."""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

import covseg_jax
from configs import transunet
from covseg_jax.errors import InputError
from covseg_jax.imaging import nifti
from covseg_jax.imaging.masks import MaskSettings
from covseg_jax.predict import export
from covseg_jax.predict.default import FOLDER
from covseg_jax.predict.model import Measures, Model, average_models
from covseg_jax.prepare import lung_network
from covseg_jax.segmentation import train as segmentation
from covseg_jax.segmentation.network import make_predict
from tests.imaging.chest import AFFINE, SHAPE, draw_chest, write_study
from tests.settings import prepare_settings

GRID = (16, 32, 32)


@pytest.fixture(scope='module')
def config():
    config = transunet.get_config('tiny').unlock()
    config.predict.batch_size = 6  # 16 slices are three batches, one of them padded
    return config


def make_variables(config, seed):
    network = segmentation.make_network(config)
    image = np.zeros((1, *GRID[1:], 1), np.float32)
    return jax.jit(network.init)(jax.random.key(seed), image)


@pytest.fixture(scope='module')
def variables(config):
    return make_variables(config, 1)


def write(config, variables, folder, **changes):
    contents = export.Exported(
        preparation=prepare_settings(grid=GRID),
        volumes=segmentation.volume_settings(config),
        masks=MaskSettings(0.5, 0.6, 0.1),
        facts={'licence': 'none'},
    )
    network = segmentation.make_network(config)
    export.write_export(folder, network, variables, dataclasses.replace(contents, **changes))
    return folder


@pytest.fixture(scope='module')
def folder(config, variables, tmp_path_factory):
    return write(config, variables, tmp_path_factory.mktemp('run') / 'export')


@pytest.fixture
def copied(folder, tmp_path):
    """The export, to be spoilt."""
    return shutil.copytree(folder, tmp_path / 'export')


def make_volume(seed=0):
    rng = np.random.default_rng(seed)
    lungs = rng.random(GRID) < 0.7
    return (rng.random(GRID) * lungs).astype(np.float16), lungs.astype(np.uint8)


def test_exported_function_equals_the_training_codes_prediction_bit_for_bit(
    config, variables, folder
):
    expected = segmentation.make_probability(config, segmentation.make_network(config), variables)
    model = covseg_jax.load(folder)
    volume = make_volume()
    found = model.probabilities[0](*volume)
    assert found.std() > 0
    np.testing.assert_array_equal(found, expected(*volume))
    # One function a device, each with the same weights.
    assert len(model.probabilities) == len(jax.local_devices())
    np.testing.assert_array_equal(model.probabilities[1](*volume), found)


PREDICT = """
import os, sys
import jax, numpy as np
import covseg_jax
from covseg_jax import cpu
jax.numpy.zeros(3) + 1  # XLA has read its flags
cpu._CONVOLUTIONS = sys.argv[4]
before = dict(os.environ)
found = covseg_jax.load(sys.argv[1]).probabilities[0](np.load(sys.argv[2]), np.load(sys.argv[3]))
assert dict(os.environ) == before
np.save(sys.argv[5], found)
"""


@pytest.mark.parametrize('flag', ['xla_cpu_experimental_ynn_fusion_type', 'xla_cpu_of_another'])
def test_loading_leaves_the_environment_and_gives_the_same_bits_where_xla_can(
    folder, tmp_path, flag
):
    flags = [each for each in os.environ['XLA_FLAGS'].split() if 'ynn_fusion' not in each]
    volume = make_volume()
    for name, array in zip(('image', 'lungs'), volume, strict=True):
        np.save(tmp_path / f'{name}.npy', array)
    files = [tmp_path / f'{name}.npy' for name in ('image', 'lungs', 'found')]
    done = subprocess.run(
        [sys.executable, '-c', PREDICT, folder, *files[:2], flag, files[2]],
        env=os.environ | {'XLA_FLAGS': ' '.join(flags)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = covseg_jax.load(folder).probabilities[0](*volume)
    same = np.array_equal(np.load(files[2]), expected)
    assert same == (flag != 'xla_cpu_of_another')


def test_export_keeps_the_raw_output_and_its_cut(config, variables, tmp_path):
    published = config.copy_and_resolve_references().unlock()
    published.predict.output, published.masks.share_of_max = 'linear', 0.2
    volumes = segmentation.volume_settings(published)
    cut = MaskSettings(min_component_ml=0.0, share_of_max=0.2)
    folder = write(config, variables, tmp_path / 'export', volumes=volumes, masks=cut)
    model = covseg_jax.load(folder)
    assert model.masks == cut
    network = segmentation.make_network(published)
    expected = segmentation.make_probability(published, network, variables)
    volume = make_volume()
    found = model.probabilities[0](*volume)
    np.testing.assert_array_equal(found, expected(*volume))
    assert 0 == found.min() < found.max() <= 1
    # not a sigmoid's: half of the voxels or so are below 0, and no sigmoid is
    assert (found[volume[1] > 0] == 0).any()
    other = dataclasses.replace(model, masks=MaskSettings(0.5))
    with pytest.raises(InputError, match='different rules'):
        average_models([model, other])


def test_export_of_version_1_is_read_as_it_was_meant(config, folder, tmp_path):
    old = tmp_path / 'export'
    shutil.copytree(folder, old)
    description = json.loads((old / 'model.json').read_text()) | {'version': 1}
    del description['volumes']['output'], description['masks']['share_of_max']
    del description['preparation']['lung_network']
    (old / 'model.json').write_text(json.dumps(description))
    sums = subprocess.run(
        'sha256sum model.json weights.safetensors function_*.bin',
        cwd=old, shell=True, check=True, capture_output=True, text=True,
    )  # fmt: skip
    (old / 'SHA256SUMS').write_text(sums.stdout)
    model, volume = covseg_jax.load(old), make_volume()
    assert model.masks == MaskSettings(0.5, 0.6, 0.1)
    np.testing.assert_array_equal(
        model.probabilities[0](*volume), covseg_jax.load(folder).probabilities[0](*volume)
    )


def test_export_has_a_function_for_each_platform_and_says_what_it_is(folder):
    names = {path.name for path in folder.iterdir()}
    assert names == {
        'model.json', 'weights.safetensors', 'SHA256SUMS', 'function_cpu.bin', 'function_tpu.bin',
        'function_cuda.bin',
    }  # fmt: skip
    subprocess.run(['sha256sum', '--check', '--quiet', 'SHA256SUMS'], cwd=folder, check=True)
    description = json.loads((folder / 'model.json').read_text())
    assert 'Not a medical device' in description['intended_use']
    assert description['preparation']['window_hu'] == [-1000, 400]
    assert description['masks']['threshold'] == 0.5
    assert covseg_jax.load(folder).description == description


def sum_again(folder):
    names = sorted(path.name for path in folder.iterdir() if path.name != 'SHA256SUMS')
    sums = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    lines = [f'{each}  {name}\n' for name, each in sums.items()]
    (folder / 'SHA256SUMS').write_text(''.join(lines))


def of_a_newer_calling_convention(content):
    function = jax.export.deserialize(bytearray(content))
    return dataclasses.replace(function, calling_convention_version=1000).serialize()


def of_another_dialect(content):
    assert content.count(b'vhlo') == 1  # the versioned form of StableHLO
    return content.replace(b'vhlo', b'vhl9')


def corrupted(content):
    return content[::-1]


def test_network_is_built_again_where_the_function_is_not_read(config, variables, copied, capfd):
    path = copied / 'function_cpu.bin'
    content, volume = path.read_bytes(), make_volume()
    network = segmentation.make_network(config)
    expected = segmentation.make_probability(config, network, variables)(*volume)
    for change in (of_a_newer_calling_convention, of_another_dialect, corrupted):
        path.write_bytes(change(content))
        sum_again(copied)
        model = covseg_jax.load(copied)
        np.testing.assert_array_equal(model.probabilities[0](*volume), expected)
        notes = [line for line in capfd.readouterr().err.splitlines() if line.startswith('note: ')]
        assert len(notes) == 1
        assert 'function_cpu.bin' in notes[0]
    path.unlink()
    sum_again(copied)
    found = covseg_jax.load(copied).probabilities[0](*volume)
    np.testing.assert_array_equal(found, expected)
    assert capfd.readouterr().err == ''


def describe_otherwise(folder, **changes):
    path = folder / 'model.json'
    description = json.loads(path.read_text())
    description['network'] |= changes
    path.write_text(json.dumps(description))
    (folder / 'function_cpu.bin').unlink(missing_ok=True)
    sum_again(folder)


@pytest.mark.parametrize(
    ('changes', 'parts'),
    [
        ({'name': 'mamba'}, ['no function for cpu', r'model\.json']),
        ({'field_of_a_newer_version': 1}, ['no function for cpu', r'model\.json']),
        ({'mlp_dim': 17}, [r'weights\.safetensors', 'does not fit']),
    ],
)
def test_network_that_cannot_be_built_again_is_refused_in_one_line(copied, changes, parts):
    describe_otherwise(copied, **changes)
    with pytest.raises(InputError, match='.*'.join(parts)):
        covseg_jax.load(copied)


def test_export_before_version_4_is_built_again_in_float32_with_slices_as_they_are(copied):
    describe_otherwise(copied)
    description = json.loads((copied / 'model.json').read_text()) | {'version': 3}
    description['volumes'] |= {'smoothing_pixels': 0.0, 'border_factor': 1.0}
    (copied / 'model.json').write_text(json.dumps(description))
    sum_again(copied)
    expected = covseg_jax.load(copied).probabilities[0](*make_volume())
    del description['network']['dtype'], description['network']['num_classes']
    del description['volumes']['smoothing_pixels'], description['volumes']['border_factor']
    (copied / 'model.json').write_text(json.dumps(description))
    sum_again(copied)
    found = covseg_jax.load(copied).probabilities[0](*make_volume())
    np.testing.assert_array_equal(found, expected)


def test_compact_export_is_small_and_predicts_the_same_but_for_rounding(
    config, variables, tmp_path
):
    source, folder = tmp_path / 'export', tmp_path / 'compact'
    preparation = prepare_settings(grid=GRID, lungs_source='network')
    write(config, variables, source, preparation=preparation)
    for _ in range(2):  # its own files are replaced
        export.write_compact(folder, source)
    names = {path.name for path in folder.iterdir()}
    assert names == {'model.json', 'weights.safetensors', 'SHA256SUMS'}
    tensors = safetensors.numpy.load_file(folder / 'weights.safetensors')
    assert {(each.ndim > 1, str(each.dtype)) for each in tensors.values()} == {
        (True, 'float16'), (False, 'float32'),
    }  # fmt: skip
    whole, compact = (covseg_jax.load(each) for each in (source, folder))
    assert compact.preparation == dataclasses.replace(whole.preparation, lung_network='')
    first, second = (model.probabilities[0](*make_volume()) for model in (whole, compact))
    # Each weight is rounded by at most 2^-11 of itself.
    assert 0 < np.abs(first - second).max() < 2e-3

    (source / lung_network.FILE).write_bytes(b'another')  # not the program's own
    sum_again(source)
    export.write_compact(folder, source)
    assert (folder / lung_network.FILE).read_bytes() == b'another'
    (folder / 'thesis.txt').write_text('three years')
    with pytest.raises(InputError, match=r'thesis\.txt'):
        export.write_compact(folder, source)


def test_model_of_the_program_is_whole_and_small():
    model = covseg_jax.load()
    assert model.identity == covseg_jax.load('default').identity
    assert sum(path.stat().st_size for path in FOLDER.glob('*/*')) <= 8_000_000
    # It finds lungs with the network beside the code: make the model again where that is another.
    shipped = hashlib.sha256(lung_network.SHIPPED.read_bytes()).hexdigest()
    networks = model.description['ensemble']
    assert {each['lung_network_sha256'] for each in networks} == {shipped}
    assert 'Not a medical device' in (FOLDER / 'MODEL_CARD.md').read_text()


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize('name', ['model.json', 'weights.safetensors', 'function_cpu.bin'])
def test_damaged_export_is_refused_by_the_files_name(copied, name):
    flip_bit(copied / name)
    with pytest.raises(InputError, match=rf'{name}.*not the file that was exported'):
        covseg_jax.load(copied)
    (copied / name).unlink()
    with pytest.raises(InputError, match=rf'{name}.*missing'):
        covseg_jax.load(copied)


@pytest.mark.parametrize('content', [b'\xff\n', b'', b'0  ../model.json\n'])
def test_damaged_checksums_are_refused(copied, content):
    (copied / 'SHA256SUMS').write_bytes(content)
    with pytest.raises(InputError, match='SHA256SUMS'):
        covseg_jax.load(copied)


def test_export_replaces_an_export_and_nothing_else(config, variables, tmp_path):
    folder = tmp_path / 'results'
    folder.mkdir()
    for _ in range(2):
        write(config, variables, folder)
    covseg_jax.load(folder)
    (folder / 'thesis.txt').write_text('three years')
    with pytest.raises(InputError, match=r'thesis\.txt'):
        write(config, variables, folder)
    assert (folder / 'thesis.txt').read_text() == 'three years'
    (tmp_path / 'link').symlink_to(folder)
    with pytest.raises(InputError, match='link'):
        write(config, variables, tmp_path / 'link')


def edit_model(folder):
    path = folder / 'model.json'
    path.write_text(path.read_text().replace('"threshold": 0.5', '"threshold": 0.4'))
    return path


def add_network(folder):
    (folder / 'network.onnx').write_bytes(b'converted by a person')
    return folder / 'network.onnx'


def add_folder(folder):
    (folder / 'notes').mkdir()
    return folder / 'notes'


@pytest.mark.parametrize('change', [edit_model, add_network, add_folder])
def test_export_that_a_person_changed_is_not_replaced(config, variables, copied, change):
    path = change(copied)
    before = {path: path.is_dir() or path.read_bytes() for path in copied.iterdir()}
    with pytest.raises(InputError, match=rf'{path.name}: is in the way'):
        write(config, variables, copied)
    assert {path: path.is_dir() or path.read_bytes() for path in copied.iterdir()} == before


def test_folder_of_another_program_with_checksums_is_not_replaced(config, variables, tmp_path):
    for name in ('model.json', 'weights.safetensors'):
        (tmp_path / name).write_text('{}')
    sums = subprocess.run(
        ['sha256sum', 'model.json', 'weights.safetensors'],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    (tmp_path / 'SHA256SUMS').write_text(sums.stdout)
    with pytest.raises(InputError, match='is in the way'):
        write(config, variables, tmp_path)
    assert (tmp_path / 'model.json').read_text() == '{}'


def test_folder_that_is_no_export_is_refused(tmp_path):
    with pytest.raises(InputError, match='not an export'):
        covseg_jax.load(tmp_path)


def test_ensemble_averages_probabilities_and_thresholds(config, folder, tmp_path):
    other = write(
        config, make_variables(config, 2), tmp_path / 'other', masks=MaskSettings(0.3, 0.8, 0.1)
    )
    members, volume = [covseg_jax.load(each) for each in (folder, other)], make_volume()
    both = covseg_jax.load(folder, other)
    expected = np.mean([member.probabilities[0](*volume) for member in members], axis=0)
    np.testing.assert_array_equal(both.probabilities[0](*volume), expected)
    assert both.masks == MaskSettings(pytest.approx(0.4), pytest.approx(0.7), 0.1)
    assert len({both.identity, *(member.identity for member in members)}) == 3

    for grid in ((8, 32, 32), (16, 32, 48)):  # other slices, and another field of view
        other = dataclasses.replace(members[1], preparation=prepare_settings(grid=grid))
        with pytest.raises(InputError, match='ensemble'):
            average_models([members[0], other])


def test_networks_whose_pixels_alone_differ_are_averaged_on_the_finest_grid():
    def model(side, change):
        return Model(
            probabilities=(lambda image, lungs: change(image) * lungs,),
            preparation=prepare_settings(grid=(2, side, side)), masks=MaskSettings(0.4),
            identity=str(side),
        )  # fmt: skip

    fine, coarse = model(4, lambda image: image), model(2, lambda image: image / 2)
    for models in ([fine, coarse], [coarse, fine]):
        both = average_models(models)
        assert both.preparation.grid == (2, 4, 4)
        inside = np.ones((2, 4, 4), np.uint8)
        inside[:, :, 2:] = 0
        image = np.zeros((2, 4, 4), np.float32)
        image[1, :2, :2] = 0.8
        # Down the rows, in the triangles of prepare: 3/7, 3/7 and 1/7 of pixels, and half of these.
        upper, lower = 0.4 * 6 / 7, 0.4 * 1 / 7
        ramp = np.array([upper, 0.75 * upper + 0.25 * lower, 0.25 * upper + 0.75 * lower, lower])
        found = both.probabilities[0](image, inside)
        np.testing.assert_allclose(found[0], 0)
        np.testing.assert_allclose(found[1, :, 2:], 0)
        np.testing.assert_allclose(found[1, :, 0], (image[1, :, 0] + ramp) / 2, rtol=1e-6)


def test_export_has_the_lung_network_that_it_was_made_with(config, variables, tmp_path):
    own = tmp_path / 'own.safetensors'
    own.write_bytes(lung_network.SHIPPED.read_bytes())
    preparation = prepare_settings(grid=GRID, lungs_source='network', lung_network=str(own))
    folders = [tmp_path / name for name in ('first', 'second')]
    write(config, variables, folders[0], preparation=preparation)
    shutil.copytree(*folders)
    own.unlink()
    model = covseg_jax.load(*folders)  # of one network, though it lies in two places
    path = folders[0] / lung_network.FILE
    assert model.preparation.lung_network == str(path)
    assert path.read_bytes() == lung_network.SHIPPED.read_bytes()
    assert str(tmp_path) not in (folders[0] / 'model.json').read_text()
    other = dataclasses.replace(model, preparation=prepare_settings(grid=GRID))
    with pytest.raises(InputError, match='see studies in different ways'):
        average_models([model, other])


def test_onnx_is_refused_where_it_cannot_be_written(config, variables, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'jax2onnx', None)
    with pytest.raises(InputError, match='pip install jax2onnx'):
        write(config, variables, tmp_path / 'export', onnx=True)
    assert list(tmp_path.iterdir()) == []


def test_onnx_gives_the_same_probabilities(config, variables, tmp_path):
    pytest.importorskip('jax2onnx')
    runtime = pytest.importorskip('onnxruntime')
    folder = write(config, variables, tmp_path / 'export', onnx=True)
    session = runtime.InferenceSession(folder / 'network.onnx')
    image = np.random.default_rng(0).random((5, *GRID[1:], 1), np.float32)
    predict = make_predict(segmentation.make_network(config))
    (found,) = session.run(None, {'image': image})
    np.testing.assert_allclose(found, predict(variables, image), atol=1e-5)


def test_one_call_predicts_a_scan_voxel_for_voxel(folder, tmp_path):
    def mark_opacity(image, lungs):
        return np.where(np.asarray(image, np.float32) > 0.25, 0.9, 0.0) * lungs

    fine = prepare_settings(grid=(28, 64, 64))
    model = covseg_jax.load(folder)
    model = dataclasses.replace(model, probabilities=(mark_opacity,), preparation=fine)
    write_study(tmp_path, 'a', lesion=False)
    found = model.predict(tmp_path / 'a.nii.gz')
    _, opacity = draw_chest('any')
    assert found.mask.shape == found.probability.shape == SHAPE
    np.testing.assert_array_equal(found.affine, AFFINE)
    assert 2 * (found.mask * opacity).sum() / (found.mask.sum() + opacity.sum()) > 0.9
    assert found.lesion_ml == pytest.approx(33.5, rel=0.15)  # a sphere of radius 20 mm
    assert found.infection_percent == pytest.approx(100 * found.lesion_ml / found.lung_ml)
    assert found.severity == 'CT-1'
    assert found.probability[found.mask > 0].mean() > 0.6
    assert found.probability.max() < 0.91
    assert nifti.read_volume(tmp_path / 'a.nii.gz').notes == found.notes


@pytest.mark.parametrize(
    ('lesion_ml', 'severity'),
    [
        (0, 'CT-0'),
        (1, 'CT-1'),
        (25, 'CT-1'),
        (26, 'CT-2'),
        (50, 'CT-2'),
        (75, 'CT-3'),
        (76, 'CT-4'),
    ],
)
def test_severity_goes_by_the_share_of_the_lungs(lesion_ml, severity):
    assert Measures(lesion_ml, 100).severity == severity
