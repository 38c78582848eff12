"""Grain feeds: prepared cases and pseudo-masks to batches of NumPy arrays.

Every feed has one global order that depends on its seed alone, and its n-th batch can be had
without those before it. Of each batch a host takes its block of rows, so that what all hosts see
together in a step, row by row, does not depend on how many there are.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from covseg_jax import cpu
from covseg_jax.data.streams import stream_seed
from covseg_jax.errors import InputError
from covseg_jax.prepare.cases import Case, SliceFile

# The keys of a batch. Images, targets and lungs come in the types in which they are stored, which
# are less to send than float32; training steps make that of them on the device.
IMAGE = 'image'  # (B, H, W, 1) or (B, D, H, W, 1) float16 in [0, 1]
TARGET = 'target'  # (B, H, W, 1) float16: soft lesion in [0, 1], or as published a difference
LABEL = 'label'  # (B,) int32: 1 high, 0 low infection
LUNGS = 'lungs'  # as IMAGE, uint8: 1 inside the lungs
HEALTHY = 'healthy'  # (B,) float32: 1 for slices of scans that are known to be without lesions
WEIGHT = 'weight'  # as TARGET, float32, made by the step: how much a pixel counts in the losses
VALID = 'valid'  # (B,) float32: 0 for rows that only fill up a batch
COVID = 'covid'  # as IMAGE: a COVID scan beside the healthy one (GAN)
COVID_LUNGS = 'covid_lungs'  # as LUNGS
CASE = 'case'  # (B,) int32: which of the feed's cases a row is of; not for the device
COVID_CASE = 'covid_case'  # of the COVID scan beside it

Volume = tuple[np.ndarray, np.ndarray, np.ndarray]  # image, target, lungs, each (D, H, W)

# More would wait for each other: a slice is opened in Python.
_MOST_THREADS = 8


def _stack_inputs(arrays: Sequence[np.ndarray], dtype: type[np.generic]) -> np.ndarray:
    plain = [np.asarray(array) for array in arrays]  # of mapped files, too
    return np.stack(plain, dtype=dtype, casting='same_kind')[..., None]


def in_float32(array: Any) -> Any:
    """An array of a batch, NumPy's or JAX's, as float32 where it came in float16 or uint8."""
    return array.astype(np.float32) if array.dtype in (np.float16, np.uint8) else array


@dataclasses.dataclass(frozen=True)
class Slices:
    """Axial slices of some cases with their targets: a random-access source."""

    cases: tuple[Case, ...]
    targets: tuple[np.ndarray | SliceFile | None, ...]  # (D, H, W) each; None: without lesions
    index: np.ndarray  # (N, 2): case number and slice number
    labels: np.ndarray  # (N,) int32

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, item: int) -> dict[str, np.ndarray]:
        return {key: rows[0] for key, rows in self.read([item]).items()}

    def read(self, items: Sequence[int]) -> dict[str, np.ndarray]:
        """A batch of the slices with these numbers, in their order."""
        index = self.index[items]
        rows = [(self.cases[number], self.targets[number], z) for number, z in index.tolist()]
        images = [case.read_slice('image', z) for case, _, z in rows]
        empty = np.zeros_like(images[0])
        targets = [empty if each is None else each[z] for _, each, z in rows]
        lungs = [case.read_slice('lungs', z) for case, _, z in rows]
        return {
            IMAGE: _stack_inputs(images, np.float16),
            # All that there are, soft or human masks, are whole in float16.
            TARGET: _stack_inputs(targets, np.float16),
            LUNGS: _stack_inputs(lungs, np.uint8),
            LABEL: self.labels[items],
            HEALTHY: np.array([target is None for _, target, _ in rows], np.float32),
            CASE: index[:, 0].astype(np.int32),
        }

    def are_healthy(self) -> np.ndarray:
        """(N,) bool: which slices are of healthy cases, those without a target."""
        return np.array([self.targets[number] is None for number, _ in self.index])


def all_slices(cases: Sequence[Case], targets: Sequence[np.ndarray | None]) -> Slices:
    """Every slice that shows lung, in order, with label 0; `rank_slices` gives others. Targets that
    are mapped from files are read by slices."""
    opened = tuple(SliceFile(each) if isinstance(each, np.memmap) else each for each in targets)
    index = [
        (number, z)
        for number, case in enumerate(cases)
        for z in np.flatnonzero(np.asarray(case.lungs()).any(axis=(1, 2)))
    ]
    index = np.array(index, np.int64).reshape(-1, 2)
    return Slices(tuple(cases), opened, index, np.zeros(len(index), np.int32))


def rank_slices(
    slices: Slices, *, by: str = 'quartiles', cut: float | None = None, high_percent: float = 1.0
) -> Slices:
    """Labels slices 1 (high infection) and 0 (low); slices of cases without lesions are 0.

    Args:
      slices: with targets.
      by: 'quartiles', as the original does (method.md section 2): of the sums of the targets, above
        the third quartile is high, between the first and the third low, and those below the first
        are left out. 'infection': high where the lesion fills more than `high_percent` of the
        slice's lungs; none is left out.
      cut: count pixels whose target is at least this, instead of summing targets.

    Raises:
      InputError: another rule, or the targets are empty.
    """
    if by not in ('quartiles', 'infection'):
        raise InputError(f"train.labels={by!r} is not one of 'quartiles', 'infection'")
    healthy = slices.are_healthy()
    sums, lungs = np.zeros(len(slices)), np.ones(len(slices))
    for row, (number, z) in enumerate(slices.index):
        if not healthy[row]:
            target = np.asarray(slices.targets[number][z], np.float32)
            sums[row] = (target if cut is None else target >= cut).sum()
            if by == 'infection':
                lungs[row] = max(np.asarray(slices.cases[number].lungs()[z]).sum(), 1)
    if not sums[~healthy].any():
        raise InputError(
            'training slices: no pixel of any COVID scan is lesion in the targets, so the network '
            'would learn to mark nothing; look at the pseudo-masks (synthesize.percentile, '
            'synthesize.min_component_ml), or train the GAN longer'
        )
    if by == 'infection':
        labels = (100 * sums / lungs > high_percent).astype(np.int32)
    else:
        first, third = np.quantile(sums[~healthy], [0.25, 0.75])
        labels = np.where(sums > third, 1, np.where(sums >= first, 0, -1)).astype(np.int32)
        labels[healthy] = 0
    kept = labels >= 0
    return dataclasses.replace(slices, index=slices.index[kept], labels=labels[kept])


def spread_healthy(slices: Slices) -> Slices:
    """Labels the slices of healthy cases 1 and 0 in turn, so that both groups hold half of them."""
    healthy = slices.are_healthy()
    labels = slices.labels.copy()
    labels[healthy] = np.arange(healthy.sum()) % 2
    return dataclasses.replace(slices, labels=labels)


@dataclasses.dataclass(frozen=True)
class Feed:
    """Endless batches of one host. Its place needs no saving: step n has `batches[n]`."""

    batches: grain.MapDataset
    # For CASE, and COVID_CASE where batches have it: the study ids that the numbers stand for.
    study_ids: dict[str, tuple[str, ...]]

    def start(self, number: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """Batches from the given one on; threads read ahead."""
        threads = min(cpu.count_cores(), _MOST_THREADS)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1)
        return iter(self.batches.slice(slice(number, None)).to_iter_dataset(options))

    def inputs(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What of a batch is for the device."""
        return {key: array for key, array in batch.items() if key not in self.study_ids}

    def studies(self, batch: dict[str, np.ndarray]) -> list[str]:
        """The ids of the studies in a batch, in order, each once."""
        return sorted({ids[n] for key, ids in self.study_ids.items() for n in batch[key]})


def repeat_shuffled(source, seed: int, name: str) -> grain.MapDataset:
    """The source's elements for ever, in another order each time."""
    return grain.MapDataset.source(source).seed(stream_seed(seed, name)).shuffle().repeat()


def share_batches(
    dataset: grain.MapDataset, size: int, host: int, num_hosts: int
) -> grain.MapDataset:
    """Batches of `size` elements, of each a host's block of them."""
    if size % num_hosts:
        raise InputError(
            f'a batch of {size} volumes or pairs of slices cannot be shared by {num_hosts} hosts; '
            f'make it a multiple of {num_hosts}'
        )
    return dataset.batch(size // num_hosts, drop_remainder=True).slice(slice(host, None, num_hosts))


def balanced_feed(
    slices: Slices, *, batch_size: int, seed: int, host: int = 0, num_hosts: int = 1
) -> Feed:
    """Endless shuffled batches of high- and low-infection slices in turn.

    Gives dicts IMAGE, TARGET, LUNGS (batch_size / num_hosts, H, W, 1), LABEL, HEALTHY and CASE.

    Raises:
      InputError: one of the two groups is empty, or the batch size is odd or not shareable.
    """
    groups = [np.flatnonzero(slices.labels == label) for label in (1, 0)]
    if batch_size % 2 or not all(len(group) for group in groups):
        raise InputError(
            f'training slices: {len(groups[0])} high- and {len(groups[1])} low-infection, batch '
            f'size {batch_size}; both groups must be there and the batch size even '
            '(is the pseudo-mask threshold right?)'
        )
    # Of numbers of slices: only a whole batch is read.
    shuffled = [
        repeat_shuffled(group, seed, name)
        for name, group in zip(('high', 'low'), groups, strict=True)
    ]
    # Pairs of both groups go to a host together: each host's share is balanced too.
    pairs = grain.experimental.ZipMapDataset(shuffled)
    numbers = share_batches(pairs, batch_size // 2, host, num_hosts)
    batches = numbers.map(lambda pair: slices.read(np.stack(pair, 1).ravel()))
    return Feed(batches, {CASE: _study_ids(slices.cases)})


def _study_ids(cases: Sequence[Case]) -> tuple[str, ...]:
    return tuple(case.study_id for case in cases)


@dataclasses.dataclass(frozen=True)
class Volumes:
    """Whole prepared scans: a random-access source."""

    cases: tuple[Case, ...]

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, item: int) -> dict[str, np.ndarray]:
        case = self.cases[item]
        return {
            IMAGE: case.image()[..., None],
            LUNGS: case.lungs()[..., None],
            CASE: np.int32(item),
        }


@dataclasses.dataclass(frozen=True)
class _CropDepth(grain.transforms.RandomMap):
    """`depth` neighbouring slices of a scan, at a random place."""

    depth: int

    def random_map(self, element: dict, rng: np.random.Generator) -> dict:
        start = rng.integers(element[IMAGE].shape[0] - self.depth + 1)
        crop = slice(start, start + self.depth)
        return {key: array if key == CASE else array[crop] for key, array in element.items()}


def paired_volume_feed(
    healthy: Sequence[Case],
    covid: Sequence[Case],
    *,
    batch_size: int,
    depth: int,
    seed: int,
    host: int = 0,
    num_hosts: int = 1,
) -> Feed:
    """Endless batches of healthy scans, each beside a COVID scan, cropped to `depth` slices.

    Gives dicts of IMAGE, LUNGS (healthy), COVID and COVID_LUNGS, each (batch_size / num_hosts,
    depth, H, W, 1), CASE and COVID_CASE.
    """
    sides = [
        repeat_shuffled(Volumes(tuple(cases)), seed, name).random_map(_CropDepth(depth))
        for name, cases in (('healthy', healthy), ('covid', covid))
    ]
    pairs = grain.experimental.ZipMapDataset(sides).map(_beside)
    batches = share_batches(pairs, batch_size, host, num_hosts)
    return Feed(batches, {CASE: _study_ids(healthy), COVID_CASE: _study_ids(covid)})


def _beside(pair: tuple[dict, dict]) -> dict[str, np.ndarray]:
    healthy, covid = pair
    of_covid = {COVID: covid[IMAGE], COVID_LUNGS: covid[LUNGS], COVID_CASE: covid[CASE]}
    return healthy | of_covid


def evaluation_batches(
    volumes: Iterable[Volume], *, batch_size: int
) -> Iterator[dict[str, np.ndarray]]:
    """All slices that show lung of volumes, once, in order, with IMAGE, TARGET and LUNGS in
    float32; the last batch is filled up with rows whose VALID is 0."""
    rows = (
        [volume[z] for volume in arrays]
        for arrays in volumes
        for z in np.flatnonzero(np.asarray(arrays[-1]).any(axis=(1, 2)))
    )
    while chunk := list(itertools.islice(rows, batch_size)):
        filled = chunk + chunk[-1:] * (batch_size - len(chunk))
        batch = zip((IMAGE, TARGET, LUNGS), zip(*filled, strict=True), strict=True)
        valid = np.arange(batch_size) < len(chunk)
        yield {
            VALID: valid.astype(np.float32),
            **{key: np.stack(slices).astype(np.float32)[..., None] for key, slices in batch},
        }
