"""Batch statistics of scans as they are: worked out by hand, and what the network then sees."""

import grain
import jax
import numpy as np
import pytest

from configs import transunet
from covseg_jax.data import feeds
from covseg_jax.data.feeds import Feed
from covseg_jax.models.layers import BatchNorm
from covseg_jax.prepare.cases import Case, Splits
from covseg_jax.segmentation import adaptation, train
from covseg_jax.segmentation.adaptation import as_predicted, evaluate_adapted, make_adapt
from covseg_jax.segmentation.volumes import (
    VolumeSettings,
    predict_volumes,
    resample_slices,
    with_pixels,
)
from covseg_jax.training.flat import Flat, flatten, unflatten
from covseg_jax.training.parts import Parts
from covseg_jax.training.sharding import make_local_mesh
from tests.conftest import write_case


def make_batch(seed, brightness=1.0, num=8, size=32):
    lungs = np.zeros((num, size, size, 1), np.uint8)
    lungs[:, 6:-6, 4:-4] = 1
    noise = np.random.default_rng(seed).random(lungs.shape)
    return {feeds.IMAGE: (brightness * noise * lungs).astype(np.float16), feeds.LUNGS: lungs}


@pytest.fixture(scope='module')
def config():
    config = transunet.get_config('tiny').unlock()
    config.network.name = 'unet'  # compiles in a third of the TransUNet's time
    config.predict.smoothing_pixels = 0.5
    return config.lock()


@pytest.fixture
def adapt_to(config, monkeypatch):
    """(batches, what a state holds of a tree) -> states before and after, and the parts."""

    def adapt(batches, hold=flatten, change=lambda stats: stats):
        monkeypatch.setattr(adaptation, '_NUM_BATCHES', len(batches))
        monkeypatch.setattr(Parts, 'to_hold', lambda self, tree: hold(tree))
        parts = train.build_segmentation(config, make_local_mesh())
        before = parts.make_state()
        stats = hold(jax.tree.map(change, unflatten(before.ema['batch_stats'])))
        before = before.replace(ema=before.ema | {'batch_stats': stats})
        feed = Feed(grain.MapDataset.source(batches), {})
        return before, make_adapt(parts, 0.5, (32, 32))(before, feed), parts

    return adapt


def first_features(parts, state, image):
    """What the first normalisation gives of images, (B, H, W, C)."""
    _, seen = parts.network.apply(
        unflatten(state.ema),
        image,
        capture_intermediates=lambda module, _: isinstance(module, BatchNorm),
    )
    return np.asarray(seen['intermediates']['encoder_1_first_norm']['__call__'][0])


def test_features_of_the_scans_have_zero_mean_and_unit_variance(adapt_to):
    batch = make_batch(0)
    before, after, parts = adapt_to([batch])
    image = as_predicted(batch, 0.5, (32, 32))
    assert abs(first_features(parts, before, image).std() - 1) > 0.1
    features = first_features(parts, after, image)
    np.testing.assert_allclose(features.mean((0, 1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(features.std((0, 1, 2)), 1, atol=2e-2)


@pytest.mark.parametrize('hold', [flatten, lambda tree: tree])
def test_statistics_are_the_means_of_the_batches_own_and_nothing_else_changes(adapt_to, hold):
    batches = [make_batch(0), make_batch(1, brightness=0.3)]
    before, after, _ = adapt_to(batches, hold)
    assert isinstance(after.ema['batch_stats'], Flat) == (hold is flatten)
    found = unflatten(after.ema['batch_stats'])['encoder_1_first_norm']
    kernel = unflatten(before.ema['params'])['encoder_1_first_conv']['kernel']
    features = [
        np.asarray(jax.lax.conv_general_dilated(
            as_predicted(batch, 0.5, (32, 32)), kernel, (1, 1), 'SAME',
            dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        )).reshape(-1, kernel.shape[-1])
        for batch in batches
    ]  # fmt: skip
    np.testing.assert_allclose(
        found['mean'], np.mean([each.mean(0) for each in features], 0), rtol=1e-3, atol=1e-5
    )
    np.testing.assert_allclose(
        found['var'], np.mean([each.var(0, ddof=1) for each in features], 0), rtol=1e-3, atol=1e-6
    )
    same = after.replace(ema=before.ema)
    jax.tree.map(np.testing.assert_array_equal, same, before)
    assert after.ema['params'] is before.ema['params']


def test_what_the_statistics_were_before_makes_no_difference(adapt_to):
    batches = [make_batch(0), make_batch(1)]
    states = [adapt_to(batches, change=change)[1] for change in (lambda x: x, lambda x: 3 * x + 1)]
    one, other = (unflatten(state.ema['batch_stats']) for state in states)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), one, other)


def test_images_are_what_the_network_sees_in_a_prediction(config):
    batch, seen = make_batch(0), []

    def predict(image):
        seen.append(image)
        return np.zeros_like(image)

    settings = VolumeSettings(**{**config.predict, 'flip': False, 'batch_size': 8})
    predict_volumes(predict, settings)(batch[feeds.IMAGE][..., 0], batch[feeds.LUNGS][..., 0])
    np.testing.assert_array_equal(as_predicted(batch, 0.5, (32, 32)), seen[0])


def test_an_evaluation_is_of_the_adapted_state_and_hands_it_on():
    evaluate = evaluate_adapted(
        lambda state, feed: state + feed, 10, lambda state: (state, {'dice': state}, {})
    )
    assert evaluate(1) == (11, {'dice': 11}, {})


def test_each_teacher_has_statistics_of_its_own(config, monkeypatch):
    batch = make_batch(0)
    scans = Feed(grain.MapDataset.source([batch]), {})
    monkeypatch.setattr(adaptation, '_NUM_BATCHES', 1)
    monkeypatch.setattr(train, '_scans_to_adapt_to', lambda *_: scans)
    parts = train.build_segmentation(config, make_local_mesh())
    first = jax.tree.map(np.asarray, unflatten(parts.make_state().ema))
    second = first | {'params': jax.tree.map(lambda leaf: 1.5 * leaf, first['params'])}
    volume = batch[feeds.IMAGE][..., 0].astype(np.float32), batch[feeds.LUNGS][..., 0]

    def predict(*initials, pixels=((32, 32), (32, 32))):
        pixels = pixels[: len(initials)]
        return [each(*volume) for each in train.adapt_to_scans(config, None, initials, pixels)]

    together = predict(first, second)
    assert np.abs(together[0] - together[1]).max() > 0.01
    np.testing.assert_array_equal(together, [*predict(first), *predict(second)])
    # One of another grid has those of slices of its own pixels, and predicts on the others'.
    coarse, fine = predict(second, first, pixels=((16, 16), (32, 32)))
    np.testing.assert_array_equal(fine, together[0])
    assert coarse.shape == fine.shape
    smaller = [each[..., None] for each in resample_slices(*volume, (16, 16))]
    own = config.copy_and_resolve_references().unlock()
    own.prepare.grid = (16, 16, 16)
    scans = Feed(grain.MapDataset.source([dict(zip(batch, smaller, strict=True))]), {})
    (expected,) = train.adapt_to_scans(own, None, [second], [(16, 16)])
    np.testing.assert_array_equal(coarse, with_pixels(expected, (16, 16))(*volume))


@pytest.mark.parametrize(
    ('fields', 'seen'),
    [
        ({}, {'c1', 'c2', 'h1'}),
        ({'targets': 'human'}, {'c2', 'h1'}),
        ({'rounds': ('synthetic',)}, {'h1'}),
    ],
)
def test_what_is_adapted_to_is_what_records_say_was_learned_from(config, tmp_path, fields, seen):
    def prepare(name, masked=False):
        write_case(tmp_path, name, 'CT-1', masked=masked)
        return Case(name, name, tmp_path / name, 'CT-1', masked, {})

    splits = Splits(
        train=(prepare('c1'), prepare('c2', masked=True)), validation=(prepare('c3'),),
        healthy_train=(prepare('h1'),), healthy_calibration=(prepare('h2'),), evaluation=(),
    )  # fmt: skip
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.train.update({'rounds': ('targets',)} | fields)
    feed = train._scans_to_adapt_to(config, splits)
    studies = {each for number in range(8) for each in feed.studies(feed.batches[number])}
    assert studies == seen
