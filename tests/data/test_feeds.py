"""Feeds: balanced, in one global order, and resumable."""

import dataclasses
import os
import pathlib

import numpy as np
import pytest

from covseg_jax.data import feeds
from covseg_jax.errors import InputError
from covseg_jax.prepare.cases import find_cases

STORED = {feeds.IMAGE: np.float16, feeds.TARGET: np.float16, feeds.LUNGS: np.uint8}


@pytest.fixture
def slices(prepared):
    cases = [case for case in find_cases(prepared) if case.category == 'CT-2']
    healthy = [case for case in find_cases(prepared) if case.is_healthy]
    rng = np.random.default_rng(0)
    targets = [rng.uniform(0, 1, (16, 1, 1)) * np.ones((16, 32, 32)) for _ in cases]
    return feeds.rank_slices(feeds.all_slices(cases + healthy, targets + [None] * len(healthy)))


def test_all_slices_leaves_out_slices_without_lung(prepared):
    cases = find_cases(prepared)[:2]
    found = feeds.all_slices(cases, [None, None])
    # The box of lungs spans slices 2 to 13 of each of two cases.
    assert found.index.tolist() == [[c, z] for c in range(2) for z in range(2, 14)]


def test_rank_slices_labels_by_quartiles(slices):
    # Eight COVID cases with 12 slices each: a quarter above the third quartile, a quarter below
    # the first is left out, the half between is low; and 72 healthy slices, low.
    assert (slices.labels == 1).sum() == 24
    assert (slices.labels == 0).sum() == 48 + 72
    sums = np.array([slices[i][feeds.TARGET].sum() for i in range(len(slices))])
    low_covid = (slices.labels == 0) & (sums > 0)
    assert sums[slices.labels == 1].min() > sums[low_covid].max()


def test_spread_healthy_halves_the_healthy_slices_and_no_others(slices):
    # 72 healthy slices, all low before.
    spread = feeds.spread_healthy(slices)
    assert (spread.labels == 1).sum() == 24 + 36
    assert (spread.labels == 0).sum() == 48 + 36
    covid = np.array([slices.targets[number] is not None for number, _ in slices.index])
    np.testing.assert_array_equal(spread.labels[covid], slices.labels[covid])


def test_rank_slices_labels_by_infection(prepared):
    case = next(case for case in find_cases(prepared) if case.category == 'CT-2')
    lungs = np.asarray(case.lungs()) > 0
    target = np.zeros(lungs.shape)
    for z in np.flatnonzero(lungs.any((1, 2))):  # slice z is infected by z % or a little more
        rows, columns = np.nonzero(lungs[z])
        count = int(np.ceil(z * len(rows) / 100))
        target[z, rows[:count], columns[:count]] = 0.6
    slices = feeds.all_slices([case], [target])
    ranked = feeds.rank_slices(slices, by='infection', cut=0.5, high_percent=8.5)
    assert ranked.labels.tolist() == [int(z >= 8.5) for _, z in slices.index]
    with pytest.raises(InputError, match='labels'):
        feeds.rank_slices(slices, by='thirds')


@pytest.mark.parametrize('by', ['quartiles', 'infection'])
def test_rank_slices_refuses_targets_without_lesion(slices, by):
    empty = [np.full((16, 32, 32), 0.4)] * len(slices.cases)
    found = feeds.all_slices(slices.cases, empty)
    with pytest.raises(InputError, match='would learn to mark nothing'):
        feeds.rank_slices(found, by=by, cut=0.5)


def test_targets_in_files_are_read_by_slices_and_hold_none_open(slices, tmp_path):
    cases = slices.cases[:8]
    whole = np.random.default_rng(0).uniform(size=(16, 32, 32)).astype(np.float16)
    for case in cases:
        np.save(tmp_path / f'{case.study_id}.npy', whole)
    before = open_files()
    found = feeds.all_slices(
        cases, [np.load(tmp_path / f'{case.study_id}.npy', mmap_mode='r') for case in cases]
    )
    assert open_files() == before
    for row in (0, len(found) - 1):
        z = found.index[row, 1]
        np.testing.assert_array_equal(found[row][feeds.TARGET][..., 0], whole[z])


def open_files():
    return sum('tmp' in os.path.realpath(link) for link in pathlib.Path('/proc/self/fd').iterdir())


def test_balanced_feed_is_half_high_half_low(slices):
    feed = feeds.balanced_feed(slices, batch_size=8, seed=0)
    batches = feed.start()
    for _ in range(5):
        batch = next(batches)
        assert batch[feeds.LABEL].tolist() == [1, 0] * 4
        assert batch[feeds.IMAGE].shape == (8, 32, 32, 1)
        assert {name: batch[name].dtype for name in STORED} == STORED


def test_balanced_feed_reads_what_its_cases_hold(slices):
    batches = feeds.balanced_feed(slices, batch_size=8, seed=0).start()
    for _, batch in zip(range(3), batches, strict=False):
        for row, number in enumerate(batch[feeds.CASE]):
            folder, target = slices.cases[number].folder, slices.targets[number]
            held = {
                feeds.IMAGE: np.load(folder / 'image.npy'),
                feeds.LUNGS: np.load(folder / 'lungs.npy'),
                feeds.TARGET: np.zeros((16, 32, 32)) if target is None else target,
            }
            (z,) = np.flatnonzero(
                (held[feeds.IMAGE] == batch[feeds.IMAGE][row, ..., 0]).all((1, 2))
            )
            for key, array in held.items():
                expected = array[z].astype(STORED[key])
                np.testing.assert_array_equal(batch[key][row, ..., 0], expected)
            assert batch[feeds.HEALTHY][row] == (target is None)


def test_slices_stored_column_by_column_are_read_as_those_in_rows(slices):
    case = slices.cases[0]
    whole = np.load(case.folder / 'image.npy')
    np.save(case.folder / 'lungs.npy', np.asfortranarray(whole))
    for z in (0, 7, -1):
        for name in ('image', 'lungs'):
            np.testing.assert_array_equal(case.read_slice(name, z), whole[z])
    with pytest.raises(IndexError):
        case.read_slice('image', 16)


def test_balanced_feed_gives_two_hosts_the_rows_of_one_in_their_order(slices):
    one, *two = (
        feeds.balanced_feed(slices, batch_size=8, seed=3, host=host, num_hosts=num_hosts).start()
        for host, num_hosts in ((0, 1), (0, 2), (1, 2))
    )
    for _ in range(4):
        halves = [next(batches) for batches in two]
        for key, rows in next(one).items():
            np.testing.assert_array_equal(np.concatenate([half[key] for half in halves]), rows)


def test_balanced_feed_begins_at_any_batch(slices):
    feed = feeds.balanced_feed(slices, batch_size=8, seed=0)
    batches, later = feed.start(), feed.start(70)  # beyond the group's first round
    for _ in range(70):
        next(batches)
    for _ in range(3):
        np.testing.assert_array_equal(next(batches)[feeds.IMAGE], next(later)[feeds.IMAGE])


def test_balanced_feed_names_the_studies_of_a_batch(slices):
    feed = feeds.balanced_feed(slices, batch_size=8, seed=0)
    batch = next(feed.start())
    assert feed.studies(batch) == sorted({slices.cases[n].study_id for n in batch[feeds.CASE]})
    assert feeds.CASE not in feed.inputs(batch)


def test_balanced_feed_refuses_an_empty_group(prepared):
    healthy = [case for case in find_cases(prepared) if case.is_healthy]
    only_low = feeds.all_slices(healthy, [None] * len(healthy))
    with pytest.raises(InputError, match='0 high'):
        feeds.balanced_feed(only_low, batch_size=8, seed=0)


def test_paired_volume_feed_crops_both_sides(prepared):
    cases = find_cases(prepared)
    healthy = [case for case in cases if case.is_healthy]
    covid = [case for case in cases if case.category == 'CT-2']
    feed = feeds.paired_volume_feed(healthy, covid, batch_size=2, depth=8, seed=0)
    batch = next(feed.start())
    for key in (feeds.IMAGE, feeds.LUNGS, feeds.COVID, feeds.COVID_LUNGS):
        assert batch[key].shape == (2, 8, 32, 32, 1)
    # Image and lungs of one row are cropped at the same place: the image is 0 where no lungs are.
    assert np.all(batch[feeds.IMAGE][batch[feeds.LUNGS] == 0] == 0)


def test_feeds_of_two_seeds_and_of_both_sides_share_no_order(prepared):
    cases = find_cases(prepared)

    def orders(seed):
        """The order of the cases on either side, of three passes."""
        feed = feeds.paired_volume_feed(cases, cases, batch_size=1, depth=8, seed=seed)
        batches = [feed.batches[step] for step in range(3 * len(cases))]
        for key in (feeds.CASE, feeds.COVID_CASE):
            numbers = np.array([batch[key][0] for batch in batches])
            yield from (tuple(each) for each in np.split(numbers, 3))

    def slice_orders(seed):
        half = dataclasses.replace(both, labels=np.arange(len(both)) % 2)
        feed = feeds.balanced_feed(half, batch_size=2, seed=seed)
        rows = [feed.batches[step][feeds.CASE] for step in range(len(both))]
        for numbers in np.array(rows).T:  # high, low
            yield from (tuple(each) for each in np.split(numbers, 2))

    # Both groups hold the same slices, so that a stream in common would show.
    both = feeds.all_slices(cases[:3], [None] * 3)
    both = dataclasses.replace(both, index=np.repeat(both.index, 2, axis=0))
    for found in (orders, slice_orders):
        everything = [order for seed in range(4) for order in found(seed)]
        assert len(set(everything)) == len(everything) > 10


def test_evaluation_batches_hold_each_slice_with_lung_once_and_mark_what_fills_up():
    def volume(number):
        image = np.full((5, 4, 4), number / 4, np.float16) + np.arange(5)[:, None, None] / 64
        lungs = np.zeros((5, 4, 4), np.uint8)
        lungs[1:4, 1:3, 1:3] = 1
        target = np.zeros((5, 4, 4), bool)
        target[:, 1, 1] = True
        return image.astype(np.float16), target, lungs

    batches = list(feeds.evaluation_batches(map(volume, (1, 2, 3)), batch_size=4))
    valid = np.concatenate([batch[feeds.VALID] for batch in batches])
    assert valid.tolist() == [1] * 9 + [0] * 3
    images = np.concatenate([batch[feeds.IMAGE] for batch in batches])
    expected = [number / 4 + z / 64 for number in (1, 2, 3) for z in (1, 2, 3)]
    assert images[valid > 0, 0, 0, 0].tolist() == expected
    for batch in batches:
        assert batch[feeds.IMAGE].shape == (4, 4, 4, 1)
        assert batch[feeds.TARGET].sum((1, 2, 3)).tolist() == [1] * 4
        assert batch[feeds.LUNGS].sum((1, 2, 3)).tolist() == [4] * 4
        assert all(array.dtype == np.float32 for array in batch.values())
