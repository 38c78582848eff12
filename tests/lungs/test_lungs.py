"""The lung network: what it learns from, and that NumPy computes what was trained."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import transunet
from covseg_jax.data.feeds import IMAGE, LUNGS
from covseg_jax.errors import InputError
from covseg_jax.lungs import slices, steps, train
from covseg_jax.prepare import lung_network
from covseg_jax.prepare.lung_network import SIZE, WINDOW_HU


@pytest.fixture(scope='module')
def parts():
    return train.build_lungs(transunet.get_config('tiny'))


@pytest.fixture(scope='module')
def variables(parts):
    """As after some training: no statistic is at its start."""
    state, rng = parts.make_state(), np.random.default_rng(0)
    params, batch_stats = (
        jax.device_get(steps.unflatten(each)) for each in (state.params, state.batch_stats)
    )

    def vary(leaf, low, high):
        return leaf + rng.uniform(low, high, leaf.shape).astype(np.float32)

    params = jax.tree.map(lambda leaf: vary(leaf, -0.1, 0.1), params)
    return params, jax.tree.map(lambda leaf: vary(leaf, -0.05, 0.2), batch_stats)


def test_numpy_computes_what_was_trained(parts, variables):
    image = np.random.default_rng(1).random((3, SIZE, SIZE, 3), np.float32)
    logits, _ = jax.jit(lambda *given: steps._apply(parts.network, *given, train=False))(
        *variables, image
    )
    found = train.fold_batch_norm(*variables)._apply(image)
    assert found.std() > 0.005
    np.testing.assert_allclose(found, jax.nn.sigmoid(logits), atol=1e-5)


def test_network_comes_back_from_its_file(variables, tmp_path):
    network = train.fold_batch_norm(*variables)
    path = tmp_path / 'lung_network.safetensors'
    path.write_bytes(lung_network.save_network(network))
    found = lung_network.load_network(path)
    assert len(found.convolutions) == len(network.convolutions)
    for pair, expected in zip(found.convolutions, network.convolutions, strict=True):
        for array, other in zip(pair, expected, strict=True):
            np.testing.assert_array_equal(array, other.astype(np.float16).astype(np.float32))
    path.write_bytes(b'no weights')
    lung_network.load_network.cache_clear()
    with pytest.raises(InputError, match='not the weights of a lung network'):
        lung_network.load_network(path)


def test_slices_are_seen_between_neighbours_a_centimetre_away():
    image = np.zeros((40, 90, 60), np.int16) - 1000
    image[20] = 300
    found, distance = lung_network.resize(image, (2.0, 3.0, 3.0))
    assert found.shape == (16, 128, 85)  # 80 mm
    assert distance == 2
    assert found.argmax(axis=0).ravel()[0] == 8
    one, distance = lung_network.resize(image[:1], (8.0, 3.0, 3.0))
    assert (len(one), distance) == (1, 1)
    numbered = np.arange(5.0)[:, None, None]
    triples = lung_network.with_neighbours(numbered, np.arange(5), 2)[:, 0, 0]
    assert triples.tolist() == [[0, 0, 2], [1, 1, 3], [0, 2, 4], [1, 3, 3], [2, 4, 4]]


def test_changed_slices_keep_their_lungs_and_have_none_beyond_the_field_of_view():
    side = slices.SIZE
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    disks = [np.hypot(y - 5, x - shift) < 30 for shift in (-40, 40)]
    lungs = np.broadcast_to(disks[0] | disks[1], (16, side, side)).astype(np.float32)
    image = np.repeat((0.2 + 0.6 * lungs)[..., None], 3, axis=-1)
    found, inside = jax.jit(steps.change_slices)(jax.random.key(0), image, lungs)
    assert found.shape == (16, SIZE, SIZE, 3)
    assert inside.shape == (16, SIZE, SIZE)
    assert set(np.unique(inside)) == {0, 1}
    assert 0 <= found.min() < found.max() <= 1
    # Outside the field of view all pixels of a slice have one value, and many slices have some.
    bright = np.asarray(found[..., 1]) > 0.5
    fills = np.array([np.unique(each, return_counts=True)[1].max() for each in found[..., 1]])
    padded = fills > SIZE
    assert 4 <= padded.sum() < 16
    agree = (bright == (np.asarray(inside) > 0))[~padded].mean()
    assert agree > 0.99
    sizes = np.asarray(inside).sum((1, 2))
    assert sizes.max() > 1.5 * sizes.min()


def test_consolidation_is_painted_into_lungs_alone(parts):
    rng = np.random.default_rng(0)
    lungs = np.zeros((4, 48, 48, 3), np.float32)
    lungs[:, 8:40, 8:40] = 1
    image = np.where(lungs > 0, 0.1, 0.8).astype(np.float32) + 0.02 * rng.random(lungs.shape)
    image[:, 20:28, 20:28] = 0.01  # an airway
    found = jax.jit(lambda *arrays: steps.paint_consolidation(*arrays, parts))(
        jax.random.key(3), jnp.asarray(image, jnp.float32), lungs
    )
    found = np.asarray(found)
    np.testing.assert_allclose(found[lungs == 0], image[lungs == 0], atol=1e-6)
    assert (found[lungs > 0] > 0.5).mean() > 0.05
    # The last of them has lobes without air, but for the airways, which patches fill.
    lobe = found[3][(lungs[3] > 0) & (image[3] > 0.05)]
    assert (lobe > (0 - WINDOW_HU[0]) / np.ptp(WINDOW_HU) - 0.1).mean() > 0.05
    np.testing.assert_allclose(found[3, 20:28, 20:28], 0.01, atol=1e-6)
    assert (found[:3, 20:28, 20:28] > 0.05).any()


def test_slices_are_cut_to_the_box_of_their_lungs_with_margins():
    lungs = np.zeros((2, 20, 20), np.float32)
    lungs[0, 5:16, 4:13] = 1  # rows 10, columns 8 from first to last
    margins = np.array([[0.25, 0.5, 0.1, 0.0]] * 2)
    outside = np.asarray(steps._outside_box(jnp.asarray(lungs), jnp.asarray(margins)))
    assert np.flatnonzero(~outside[0].all(axis=1)).tolist() == list(range(3, 20))
    assert np.flatnonzero(~outside[0].all(axis=0)).tolist() == list(range(4, 13))
    assert not outside[1].any()


def test_soft_tissue_is_varied_and_lungs_and_air_are_not():
    lungs = np.zeros((4, 32, 32, 3), np.float32)
    lungs[:, 8:24, 8:24] = 1
    image = np.where(lungs > 0, 0.1, 0.8).astype(np.float32)
    image[:, :4] = 0  # the room
    found = np.asarray(steps.vary_tissue(jax.random.key(0), jnp.asarray(image), lungs))
    is_tissue = image == np.float32(0.8)
    np.testing.assert_array_equal(found[~is_tissue], image[~is_tissue])
    assert 0.005 < found[is_tissue].std() < 0.1
    np.testing.assert_array_equal(found[..., 0], found[..., 2])


def test_training_writes_a_network_that_finds_probabilities(tmp_path, monkeypatch):
    one_device = train.sharding.make_local_mesh()
    monkeypatch.setattr(train.sharding, 'make_mesh', lambda: one_device)
    config = transunet.get_config('tiny').unlock()
    config.lungs.update(num_steps=2, batch_size=2)
    network = lung_network.load_network(train.train_lungs(config, tmp_path, 1))
    scan = np.random.default_rng(0).integers(-1000, 300, (3, 40, 50)).astype(np.int16)
    found = network.probability(scan, (5.0, 2.0, 2.0))
    assert found.shape == (3, 102, 128)
    assert 0 < found.min() < found.max() < 1


def test_feed_gives_a_slice_between_two_of_its_scan():
    scan = np.arange(6, dtype=np.int16)[:, None, None] * np.ones((1, 4, 4), np.int16)
    scans = slices.Scans([scan - 1000], [np.ones_like(scan)])
    batch = next(slices.slice_feed(scans, batch_size=6, seed=0).start())
    assert batch[IMAGE].shape == batch[LUNGS].shape == (6, 4, 4, 3)
    values = np.rint(batch[IMAGE][:, 0, 0] * 1300)
    assert sorted(values[:, 1]) == list(range(6))
    for below, middle, above in values:
        assert middle - below in (0, 1, 2, 3)
        assert above - middle in (0, 1, 2, 3)
