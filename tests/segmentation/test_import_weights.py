"""Published weights: files in, a checkpoint out that prediction uses and training goes on from."""

import io
import zipfile

import jax
import numpy as np
import pytest
import safetensors.numpy

from configs import transunet
from covseg_jax.errors import InputError
from covseg_jax.models import published
from covseg_jax.prepare.cases import Splits, find_cases
from covseg_jax.segmentation import import_weights
from covseg_jax.segmentation.train import (
    build_segmentation,
    load_variables,
    make_network,
    make_probability,
    train_segmentation,
)
from covseg_jax.training.checkpoint import restore_for_inference
from covseg_jax.training.flat import unflatten


@pytest.fixture(scope='module')
def config():
    config = transunet.get_config('tiny').unlock()
    config.train.num_steps = 2
    config.network.final_width = 0  # the published number of channels
    config.predict.update(flip=False, smoothing_pixels=0.0)
    return config.lock()


def make_variables(config):
    """Random variables of the config's network, running statistics included."""
    shapes = jax.eval_shape(unflatten, build_segmentation(config).abstract_state.ema)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.uniform(0.1, 0.5, leaf.shape).astype('f4'), shapes)


def write_weights(path):
    """A file of random weights for the tiny variant with the published number of channels."""
    config = transunet.get_config('tiny').unlock()
    config.network.final_width = 0
    safetensors.numpy.save_file(to_pytorch(config, make_variables(config)), path)
    return path


@pytest.fixture(scope='module')
def variables(config):
    return make_variables(config)


@pytest.fixture(scope='module')
def tensors(config, variables):
    return to_pytorch(config, variables)


def to_pytorch(config, variables):
    """Variables under PyTorch's names, in its layout."""
    state = {}
    for name, (path, _) in published.transunet_targets(config.network.num_blocks).items():
        array = variables
        for key in path:
            array = array[key]
        if path[-1] == 'kernel':
            array = array.transpose((3, 2, 0, 1) if array.ndim == 4 else (1, 0))
        state[name] = np.ascontiguousarray(
            array.reshape(1, 1, -1) if path[-1] == 'class_token' else array
        )
    return state


@pytest.mark.parametrize('kind', ['npz', 'safetensors', 'pt'])
def test_tensors_are_read_from_every_kind_of_file(tmp_path, tensors, kind):
    path = tmp_path / f'weights.{kind}'
    if kind == 'npz':
        np.savez(path, **tensors)
    elif kind == 'safetensors':
        safetensors.numpy.save_file(tensors, path)
    else:
        torch = pytest.importorskip('torch')
        torch.save({'model': {k: torch.tensor(v) for k, v in tensors.items()}, 'epoch': 3}, path)
    found = import_weights.read_tensors(path)
    assert found.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(found[name], array)


def test_files_that_are_no_weights_are_refused_in_one_line(tmp_path):
    for name, content in (('a.npz', b'PK no'), ('b.safetensors', b'\0' * 9), ('c.h5', b'')):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError) as error:
            import_weights.read_tensors(tmp_path / name)
        assert name in str(error.value)
        assert '\n' not in str(error.value)
    with pytest.raises(InputError, match='no such file'):
        import_weights.read_tensors(tmp_path / 'd.npz')


def test_arrays_of_objects_are_never_unpickled(tmp_path):
    np.savez(tmp_path / 'a.npz', x=np.array([{}], object))
    with pytest.raises(InputError, match='cannot be read'):
        import_weights.read_tensors(tmp_path / 'a.npz')


@pytest.mark.parametrize('kind', ['npz', 'pt'])
def test_archive_that_would_fill_the_memory_is_refused(tmp_path, kind):
    path = tmp_path / f'a.{kind}'
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('x.npy', b'\0' * 2**28)
    assert path.stat().st_size < 2**20
    with pytest.raises(InputError, match=r'a\.\w+: .* unpack to 268,435,456') as error:
        import_weights.read_tensors(path)
    assert '\n' not in str(error.value)


def test_array_whose_header_lies_about_its_size_is_refused_before_it_is_read(tmp_path):
    array = io.BytesIO()
    header = {'descr': '<f4', 'fortran_order': False, 'shape': (2**38,)}
    np.lib.format.write_array_header_1_0(array, header)
    with zipfile.ZipFile(tmp_path / 'a.npz', 'w') as archive:
        archive.writestr('x.npy', array.getvalue() + bytes(64))
    with pytest.raises(InputError, match=r'x\.npy has 192 bytes, and its header promises 1,099,'):
        import_weights.read_tensors(tmp_path / 'a.npz')


def test_damaged_entry_of_an_archive_is_refused(tmp_path):
    np.savez_compressed(tmp_path / 'a.npz', x=np.arange(1000))
    content = bytearray((tmp_path / 'a.npz').read_bytes())
    content[60:200] = bytes(140)
    (tmp_path / 'a.npz').write_bytes(content)
    with pytest.raises(InputError, match='cannot be read'):
        import_weights.read_tensors(tmp_path / 'a.npz')


def test_imported_weights_predict_and_train_on(tmp_path, config, variables, tensors, prepared):
    folder = tmp_path / 'transunet'
    import_weights.import_transunet(config, tensors, folder)
    network, averaged, step = load_variables(config, folder)
    probability = make_probability(config, network, averaged)
    cases = find_cases(prepared)[:3]
    case = cases[0]
    image, lungs = np.asarray(case.image(), np.float32), np.asarray(case.lungs())
    model = make_network(config)
    logits = jax.jit(model.apply)(variables, image[..., None]).logits
    expected = np.asarray(jax.nn.sigmoid(logits))[..., 0] * (lungs > 0)
    np.testing.assert_allclose(probability(image, lungs), expected, atol=1e-6)
    assert step == 0

    with pytest.raises(InputError, match='checkpoints already'):
        import_weights.import_transunet(config, tensors, folder)
    splits = Splits((), (), cases, cases[:1], ())  # no healthy scans: no synthetic round
    config = config.copy_and_resolve_references().unlock()
    config.train.rounds, config.train.round_shares = ('targets',), (1.0,)
    targets = {c.study_id: np.random.default_rng(0).uniform(size=c.lungs().shape) for c in cases}
    train_segmentation(config, splits, lambda c: targets[c.study_id], folder)
    _, _, step = load_variables(config, folder)
    assert step == 2


def test_weights_of_another_size_are_refused(tmp_path, config, tensors):
    wider = config.copy_and_resolve_references().unlock()
    wider.network.mlp_dim = 24
    with pytest.raises(InputError, match='another size than the config'):
        import_weights.import_transunet(wider, tensors, tmp_path)
    with pytest.raises(InputError, match='missing'):
        import_weights.import_transunet(config, {}, tmp_path)


def test_position_embedding_is_interpolated_to_the_grid(tmp_path, config, tensors):
    # weights for 64 x 64 slices; the tiny grid is 32 x 32, 2 x 2 tokens
    features = tensors['encoder.vit.embedding'].shape[1]
    grid = np.arange(4.0)[:, None, None] + np.zeros((4, 4, features))
    embedding = np.concatenate([np.full((1, features), 9.0), grid.reshape(16, features)])
    larger = {**tensors, 'encoder.vit.embedding': embedding.astype(np.float32)}
    import_weights.import_transunet(config, larger, tmp_path)
    state = build_segmentation(config).abstract_state
    restored, _ = restore_for_inference(tmp_path / 'checkpoints', state)
    found = np.asarray(unflatten(restored.ema)['params']['vit']['position_embedding'])[:, 0]
    np.testing.assert_allclose(found, [9.0, 0.5, 0.5, 2.5, 2.5], atol=1e-6)
