"""Grain feeds: prepared cases and pseudo-masks to batches of NumPy arrays.

Every feed has one global order that depends on its seed alone. A host takes every n-th element of
it, so that the union of what all hosts see in a step does not depend on how many there are.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from covseg_jax.data.cases import Case
from covseg_jax.errors import InputError

# The keys of a batch.
IMAGE = 'image'  # (B, H, W, 1) or (B, D, H, W, 1) float32 in [0, 1]
TARGET = 'target'  # (B, H, W, 1) float32 in [0, 1]: soft lesion
LABEL = 'label'  # (B,) int32: 1 high, 0 low infection
LUNGS = 'lungs'  # as IMAGE: 1 inside the lungs
HEALTHY = 'healthy'  # (B,) float32: 1 for slices of scans that are known to be without lesions
WEIGHT = 'weight'  # as TARGET: how much a pixel counts in the losses
VALID = 'valid'  # (B,) float32: 0 for rows that only fill up a batch
COVID = 'covid'  # as IMAGE: a COVID scan beside the healthy one (GAN)
COVID_LUNGS = 'covid_lungs'

_UNRANKED = -1


@dataclasses.dataclass(frozen=True)
class Slices:
    """Axial slices of some cases with their targets: a random-access source.

    `targets` holds one (D, H, W) array in [0, 1] for each case, or None for cases without lesions.
    `index` is (N, 2): case number and slice number. `labels` is (N,) int32.
    """

    cases: tuple[Case, ...]
    targets: tuple[np.ndarray | None, ...]
    index: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, item: int) -> dict[str, np.ndarray]:
        case_number, z = self.index[item]
        case, target = self.cases[case_number], self.targets[case_number]
        image = np.asarray(case.image()[z], np.float32)[..., None]
        lungs = np.asarray(case.lungs()[z], np.float32)[..., None]
        if target is None:
            target = np.zeros_like(image)
        else:
            target = np.asarray(target[z], np.float32)[..., None]
        return {
            IMAGE: image,
            TARGET: target,
            LUNGS: lungs,
            LABEL: self.labels[item],
            HEALTHY: np.float32(self.targets[case_number] is None),
        }

    def are_healthy(self) -> np.ndarray:
        """(N,) bool: which slices are of healthy cases, those without a target."""
        return np.array([self.targets[number] is None for number, _ in self.index])

    def select(self, label: int) -> 'Slices':
        """The slices with one label."""
        chosen = self.labels == label
        return dataclasses.replace(self, index=self.index[chosen], labels=self.labels[chosen])


def all_slices(cases: Sequence[Case], targets: Sequence[np.ndarray | None]) -> Slices:
    """Every slice that shows lung, in order, with label 0; for evaluation."""
    index = [
        (number, z)
        for number, case in enumerate(cases)
        for z in np.flatnonzero(np.asarray(case.lungs()).any(axis=(1, 2)))
    ]
    return Slices(
        tuple(cases),
        tuple(targets),
        np.array(index, np.int64).reshape(-1, 2),
        np.zeros(len(index), np.int32),
    )


def rank_slices(
    slices: Slices, *, by: str = 'quartiles', cut: float | None = None, high_percent: float = 1.0
) -> Slices:
    """Labels slices 1 (high infection) and 0 (low); slices of cases without lesions are 0.

    Args:
      slices: with targets.
      by: 'quartiles', as the original does (METHOD.md section 2): of the sums of the targets, above
        the third quartile is high, between the first and the third low, and those below the first
        are left out. 'infection': high where the lesion fills more than `high_percent` of the
        slice's lungs; none is left out.
      cut: count pixels whose target is at least this, instead of summing targets.
      high_percent: of the lungs.

    Raises:
      InputError: another rule.
    """
    if by not in ('quartiles', 'infection'):
        raise InputError(f"train.labels={by!r} is not one of 'quartiles', 'infection'")
    healthy = slices.are_healthy()
    sums = np.zeros(len(slices))
    lungs = np.ones(len(slices))
    for row, (number, z) in enumerate(slices.index):
        if not healthy[row]:
            target = np.asarray(slices.targets[number][z], np.float32)
            sums[row] = (target if cut is None else target >= cut).sum()
            if by == 'infection':
                lungs[row] = max(np.asarray(slices.cases[number].lungs()[z]).sum(), 1)
    if by == 'infection':
        labels = (100 * sums / lungs > high_percent).astype(np.int32)
    else:
        first, third = np.quantile(sums[~healthy], [0.25, 0.75])
        labels = np.where(sums > third, 1, np.where(sums >= first, 0, _UNRANKED)).astype(np.int32)
        labels[healthy] = 0
    kept = labels != _UNRANKED
    return dataclasses.replace(slices, index=slices.index[kept], labels=labels[kept])


def spread_healthy(slices: Slices) -> Slices:
    """Labels the slices of healthy cases 1 and 0 in turn, so that both groups hold half of them."""
    healthy = slices.are_healthy()
    labels = slices.labels.copy()
    labels[healthy] = np.arange(healthy.sum()) % 2
    return dataclasses.replace(slices, labels=labels)


def _check_batch_size(batch_size: int, num_hosts: int) -> int:
    if batch_size % num_hosts:
        raise InputError(
            f'batch size {batch_size} cannot be shared by {num_hosts} hosts; '
            f'make it a multiple of {num_hosts}'
        )
    return batch_size // num_hosts


def _feed(dataset: grain.MapDataset, *, batch_size: int, host: int, num_hosts: int):
    per_host = _check_batch_size(batch_size, num_hosts)
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2 * per_host)
    dataset = dataset.slice(slice(host, None, num_hosts)).to_iter_dataset(options)
    return iter(dataset.batch(per_host, drop_remainder=True))


def balanced_feed(
    slices: Slices, *, batch_size: int, seed: int, host: int = 0, num_hosts: int = 1
) -> grain.DatasetIterator:
    """Endless shuffled batches, half of them high- and half low-infection slices.

    Yields dicts IMAGE, TARGET, LUNGS (batch_size / num_hosts, H, W, 1), LABEL and HEALTHY.

    Raises:
      InputError: one of the two groups is empty, or the batch size is odd or not shareable.
    """
    groups = [slices.select(1), slices.select(0)]
    if batch_size % 2 or not all(len(group) for group in groups):
        raise InputError(
            f'training slices: {len(groups[0])} high- and {len(groups[1])} low-infection, batch '
            f'size {batch_size}; both groups must be there and the batch size even '
            '(is the pseudo-mask threshold right?)'
        )
    shuffled = [
        grain.MapDataset.source(group).seed(seed + number).shuffle().repeat()
        for number, group in enumerate(groups)
    ]
    # Taken in turn from both groups, so that every batch is balanced exactly. Pairs go to a host
    # together: each host's share is balanced too.
    pairs = grain.experimental.ZipMapDataset(shuffled)
    per_host = _check_batch_size(batch_size // 2, num_hosts)
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2 * per_host)
    feed = pairs.slice(slice(host, None, num_hosts)).to_iter_dataset(options)
    return iter(feed.batch(per_host, drop_remainder=True).map(_join_pairs))


def _join_pairs(pair: tuple[dict, dict]) -> dict[str, np.ndarray]:
    high, low = pair
    return {key: np.concatenate([high[key], low[key]]) for key in high}


@dataclasses.dataclass(frozen=True)
class Volumes:
    """Whole prepared scans: a random-access source."""

    cases: tuple[Case, ...]

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, item: int) -> dict[str, np.ndarray]:
        case = self.cases[item]
        return {
            IMAGE: np.asarray(case.image(), np.float32)[..., None],
            LUNGS: np.asarray(case.lungs(), np.float32)[..., None],
        }


@dataclasses.dataclass(frozen=True)
class _CropDepth(grain.transforms.RandomMap):
    """`depth` neighbouring slices of a scan, at a random place."""

    depth: int

    def random_map(self, element: dict, rng: np.random.Generator) -> dict:
        start = rng.integers(element[IMAGE].shape[0] - self.depth + 1)
        return {key: array[start : start + self.depth] for key, array in element.items()}


def paired_volume_feed(
    healthy: Sequence[Case],
    covid: Sequence[Case],
    *,
    batch_size: int,
    depth: int,
    seed: int,
    host: int = 0,
    num_hosts: int = 1,
) -> grain.DatasetIterator:
    """Endless batches of healthy scans, each beside a COVID scan, cropped to `depth` slices.

    Yields dicts IMAGE, LUNGS (healthy) and COVID, COVID_LUNGS, (batch_size / num_hosts, depth, H,
    W, 1) float32.
    """
    sides = [
        grain.MapDataset.source(Volumes(tuple(cases)))
        .seed(seed + number)
        .shuffle()
        .repeat()
        .random_map(_CropDepth(depth))
        for number, cases in enumerate((healthy, covid))
    ]
    pairs = grain.experimental.ZipMapDataset(sides).map(
        lambda pair: {
            IMAGE: pair[0][IMAGE],
            LUNGS: pair[0][LUNGS],
            COVID: pair[1][IMAGE],
            COVID_LUNGS: pair[1][LUNGS],
        }
    )
    return _feed(pairs, batch_size=batch_size, host=host, num_hosts=num_hosts)


def evaluation_batches(slices: Slices, *, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """All slices once, in order; the last batch is filled up with rows whose VALID is 0."""
    for start in range(0, len(slices), batch_size):
        rows = [slices[i] for i in range(start, min(start + batch_size, len(slices)))]
        valid = np.zeros(batch_size, np.float32)
        valid[: len(rows)] = 1
        rows += [rows[-1]] * (batch_size - len(rows))
        yield {key: np.stack([row[key] for row in rows]) for key in rows[0]} | {VALID: valid}
