"""Compiled steps on tiny networks: they learn, and devices do not change the result."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from configs import transunet
from covseg_jax.data import feeds
from covseg_jax.models.transunet import Segmentation
from covseg_jax.segmentation import schedule, steps
from covseg_jax.segmentation.network import make_predict
from covseg_jax.segmentation.train import build_segmentation, choose_segmentation_step
from covseg_jax.training import losses, sharding
from covseg_jax.training.flat import Flat, unflatten
from covseg_jax.training.parts import Parts
from tests.settings import segmentation_losses


@pytest.fixture(scope='module')
def config():
    config = transunet.get_config('tiny').unlock()
    config.train.augment.enabled = False
    config.network.dropout_rate = 0.0
    config.train.warmup_steps = 0
    config.train.schedule = 'constant'
    config.train.learning_rate = 1e-2
    config.network.name = 'unet'  # compiles in a third of the TransUNet's time
    return config.lock()


def slice_batch(size=8):
    rng = np.random.default_rng(0)
    target = np.zeros((size, 32, 32, 1), np.float32)
    target[:, 8:20, 8:20] = rng.integers(0, 2, (size, 1, 1, 1))
    image = 0.1 + 0.3 * target + rng.normal(0, 0.02, target.shape)
    return {
        feeds.IMAGE: image.astype(np.float32),
        feeds.TARGET: target,
        feeds.LUNGS: np.ones_like(target),
        feeds.LABEL: target.max((1, 2, 3)).astype(np.int32),
    }


def mesh_of(num_devices):
    return Mesh(jax.devices()[:num_devices], ('data',), axis_types=(AxisType.Auto,))


def train(config, terms, num_steps, mesh_size=1, repeat=1, micro_batches=1, unroll=False):
    parts = build_segmentation(config)
    step = steps.make_segmentation_step(
        parts,
        segmentation_losses(contrastive=1.0, binary_targets=False, doubtful=()),
        None,
        terms=terms,
        ema_decay=0.9,
        micro_batches=micro_batches,
        unroll=unroll,
    )
    mesh = mesh_of(mesh_size)
    state = jax.device_put(parts.make_state(), sharding.replicated(mesh))
    batch = {
        key: np.repeat(rows.reshape(-1, 2, *rows.shape[1:]), repeat, axis=0).reshape(
            -1, *rows.shape[1:]
        )
        for key, rows in slice_batch().items()
    }
    batch = sharding.shard_batch(batch, mesh)
    history = []
    for _ in range(num_steps):
        state, metrics = step(state, batch)
        history.append({name: float(total) for name, (total, _) in metrics.items()})
        if len(history) == 1:
            history[0]['batch_stats'] = jax.device_get(state.batch_stats)
    return state, history


def test_segmentation_step_learns_bright_squares(config):
    _, history = train(config, schedule.SEGMENTATION, 80)
    assert history[-1]['loss/total'] < 0.3 * history[0]['loss/total']


def test_combined_step_reports_all_three_losses(config):
    state, history = train(config, schedule.COMBINED, 2)
    names = {'loss/contrastive', 'loss/mse', 'loss/sensitivity'}
    assert names < set(history[0])
    assert sum(history[0][name] for name in names) == pytest.approx(history[0]['loss/total'])
    assert int(state.step) == 2


@pytest.mark.parametrize(('mesh_size', 'unroll'), [(1, True), (2, False)])
def test_a_step_over_equal_micro_batches_is_the_step_over_one_of_them(config, mesh_size, unroll):
    # each pair of rows three times: every third pair is the batch itself
    one, expected = train(config, schedule.COMBINED, 1)
    three, found = train(
        config, schedule.COMBINED, 1, mesh_size, repeat=3, micro_batches=3, unroll=unroll
    )
    for name in ('loss/total', 'loss/contrastive', 'optimizer/gradient_norm'):
        assert found[0][name] == pytest.approx(expected[0][name], rel=1e-5)
    # Adam's first step is the gradient's sign: compare what it is made of
    moments = [jax.device_get(state.opt_state) for state in (one, three)]
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(moments[0]))
    for a, b in zip(*map(jax.tree.leaves, moments), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=5e-6 * largest)


def test_a_state_of_trees_is_stepped_as_one_of_vectors(config, monkeypatch):
    vectors, expected = train(config, schedule.SEGMENTATION, 2)
    monkeypatch.setattr(Parts, 'to_hold', lambda self, tree: tree)
    trees, found = train(config, schedule.SEGMENTATION, 2)
    assert isinstance(vectors.batch_stats, Flat)
    assert isinstance(trees.batch_stats, dict)
    assert found[1]['loss/total'] == pytest.approx(expected[1]['loss/total'], rel=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        unflatten(vectors.ema),
        trees.ema,
    )


def test_sharpen_targets_gives_doubtful_pixels_no_weight():
    target = np.array([0.0, 0.2, 0.3, 0.49, 0.5, 1.0], np.float32).reshape(1, 1, 6, 1)
    batch = {feeds.TARGET: target}
    plain = {'binary_targets': False, 'doubtful': ()}

    def sharpened(**settings):
        out = steps.sharpen_targets(batch, segmentation_losses(**plain | settings))
        return out[feeds.TARGET].ravel().tolist(), out[feeds.WEIGHT].ravel().tolist()

    assert sharpened(binary_targets=True, doubtful=(0.2, 0.5)) == (
        [0, 0, 0, 0, 1, 1],
        [1, 1, 0, 0, 1, 1],
    )
    assert sharpened() == (target.ravel().tolist(), [1] * 6)


class Pixelwise(nn.Module):
    """Logits from each pixel alone: compiles at once."""

    @nn.compact
    def __call__(self, image, *, train=False):
        normal = nn.BatchNorm(use_running_average=not train)(image)
        return Segmentation(nn.Dense(1)(nn.relu(nn.Dense(4)(normal))), normal.mean((1, 2)))


def published_step(config, monkeypatch, **losses):
    """The first step of the published training, and the state before and after it."""
    monkeypatch.setattr('covseg_jax.segmentation.train.make_network', lambda config: Pixelwise())
    config = config.copy_and_resolve_references().unlock()
    config.train.update(transunet.get_config('published').train.to_dict())
    config.train.losses.update(losses)
    parts = build_segmentation(config)
    step = choose_segmentation_step(config, parts)(0)
    state = parts.make_state()
    before = jax.device_get(state)
    state, metrics = step(state, slice_batch())
    return parts, before, jax.device_get(state), float(metrics['loss/contrastive'][0])


def test_published_contrastive_step_is_of_flattened_logits_with_self_pairs(config, monkeypatch):
    parts, before, after, found = published_step(
        config, monkeypatch, contrastive_labels='infection'
    )
    batch = slice_batch()
    variables = unflatten({'params': before.params['network'], 'batch_stats': before.batch_stats})

    @jax.jit
    def loss(image, labels):
        output, _ = parts.network.apply(variables, image, train=True, mutable=['batch_stats'])
        return losses.contrastive_loss(
            output.logits.reshape(8, -1),
            labels,
            temperature=1.0,
            sensitivity_weight=1.5,
            include_self=True,
        )

    expected = loss(batch[feeds.IMAGE], batch[feeds.LABEL])
    assert found == pytest.approx(float(expected), rel=1e-5)
    assert 0.05 < found < 1  # log(1 + N / 1.5 P)
    # no average: what evaluation uses is the weights themselves
    jax.tree.map(np.testing.assert_array_equal, after.ema['params'], after.params['network'])
    jax.tree.map(np.testing.assert_array_equal, after.ema['batch_stats'], after.batch_stats)


def test_published_contrastive_labels_are_all_one_and_teach_nothing(config, monkeypatch):
    _, before, after, found = published_step(config, monkeypatch)
    assert found == 0
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)


class Echo(nn.Module):
    """A network whose logits are its image."""

    @nn.compact
    def __call__(self, image):
        return Segmentation(image, image.mean((1, 2)))


def test_evaluation_step_cuts_raw_output_and_difference_at_a_share_of_their_maximum():
    def row(*values):
        return np.array(values, np.float32).reshape(1, 1, -1, 1)

    batch = {
        feeds.IMAGE: row(-1.0, 0.05, 0.12, 0.5, 9.0),  # above 0.1 inside the lungs: two
        feeds.TARGET: row(-0.3, 0.03, 0.01, 0.1, 0.9),  # above 0.02: two, one of them the same
        feeds.LUNGS: row(1, 1, 1, 1, 0),
        feeds.VALID: np.ones(1, np.float32),
    }
    output = make_predict(Echo(), 'linear')({}, batch[feeds.IMAGE])
    evaluate = steps.make_evaluation_step(share_of_max=0.2, target_share_of_max=0.2)
    found = evaluate(output, batch)
    assert [float(value) for value in found['dice']] == [2, 4]
    squared = 0.7**2 + 0.02**2 + 0.11**2 + 0.4**2
    assert [float(value) for value in found['mse']] == pytest.approx([squared, 4])


def test_contrastive_step_leaves_the_decoder_without_gradient(config):
    parts = build_segmentation(config)
    before = jax.device_get(unflatten(parts.make_state().params))
    state, _ = train(config, schedule.CONTRASTIVE, 1)
    after = jax.device_get(unflatten(state.params))
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, after)
    flat = {
        jax.tree_util.keystr(path): value
        for path, value in jax.tree_util.tree_flatten_with_path(changed)[0]
    }
    assert any(value for name, value in flat.items() if 'projection' in name)
    assert not any(value for name, value in flat.items() if 'decoder' in name)
    assert any('decoder' in name for name in flat)


def test_segmentation_step_on_eight_devices_equals_one(config):
    # Adam's first steps are as long as the rate, whatever the gradient's size: at a large rate the
    # rounding of gradients near 0 would show in the next loss.
    config = config.copy_and_resolve_references().unlock()
    config.network.name = 'transunet'
    config.train.learning_rate = 1e-4
    _, history_one = train(config, schedule.COMBINED, 3, mesh_size=1)
    _, history_eight = train(config, schedule.COMBINED, 3, mesh_size=8)
    for a, b in zip(history_one, history_eight, strict=True):
        assert a['loss/total'] == pytest.approx(b['loss/total'], rel=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        history_one[0]['batch_stats'],
        history_eight[0]['batch_stats'],
    )


@pytest.mark.slow
def test_fifty_steps_on_eight_devices_equal_those_on_one():
    """With augmentation, and with statistics of the whole batch, of which a device has a row."""
    config = transunet.get_config('tiny').unlock()
    config.train.num_steps = 50
    config.network.name = 'unet'
    batch = slice_batch() | {feeds.HEALTHY: np.zeros(8, np.float32)}

    def losses_on(num_devices):
        mesh = mesh_of(num_devices)
        parts = build_segmentation(config, mesh)
        step_at, state = choose_segmentation_step(config, parts), parts.make_state()
        rows = sharding.shard_batch(batch, mesh)
        for number in range(50):
            state, metrics = step_at(number)(state, rows)
            yield float(metrics['loss/total'][0])

    one, eight = list(losses_on(1)), list(losses_on(8))
    assert np.mean(one[-10:]) < 0.9 * np.mean(one[:10])  # painted at random, so each varies
    np.testing.assert_allclose(eight, one, rtol=1e-4)
