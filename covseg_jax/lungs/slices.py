"""Slices of phantoms with their lungs, each between two neighbours, as a Grain feed."""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence

import grain
import numpy as np

from covseg_jax import atomic
from covseg_jax.data.feeds import CASE, IMAGE, LUNGS, Feed, repeat_shuffled, share_batches
from covseg_jax.imaging.workers import map_in_processes
from covseg_jax.phantom.lesions import CATEGORIES
from covseg_jax.phantom.studies import make_phantom
from covseg_jax.prepare.lung_network import WINDOW_HU, with_neighbours

SIZE = 176  # pixels of a side: more than the network's 128, because slices are zoomed and turned
PIXEL_MM = (1.9, 2.2, 2.5)  # fields of view of 334 to 440 mm
_SLICE_MM, _NUM_SLICES = 5.5, 62
_MOST_APART = 3  # slices between neighbours: 16 mm


@dataclasses.dataclass(frozen=True)
class Scans:
    """Every slice of some scans between two others: a random-access source for `_Neighbours`."""

    images: Sequence[np.ndarray]  # (Z, SIZE, SIZE) int16 HU each
    lungs: Sequence[np.ndarray]  # the same shape, 0 or 1

    def __len__(self) -> int:
        return sum(len(image) for image in self.images)

    @functools.cached_property
    def _index(self) -> np.ndarray:
        pairs = [(i, z) for i, image in enumerate(self.images) for z in range(len(image))]
        return np.array(pairs)

    def __getitem__(self, item: int) -> dict[str, int]:
        scan, z = self._index[item]
        return {'scan': int(scan), 'z': int(z)}

    def take(self, scan: int, z: int, distance: int) -> dict[str, np.ndarray]:
        """IMAGE in [0, 1] and LUNGS, (SIZE, SIZE, 3) float32: a slice between its neighbours; one
        beyond the first or last slice is the slice itself."""
        image, lungs = (
            with_neighbours(each[scan], np.array([z]), distance)[0].astype(np.float32)
            for each in (self.images, self.lungs)
        )
        low, high = WINDOW_HU
        return {
            IMAGE: np.clip((image - low) / (high - low), 0, 1),
            LUNGS: lungs,
            CASE: np.int32(scan),
        }


@dataclasses.dataclass(frozen=True)
class _Neighbours(grain.transforms.RandomMap):
    scans: Scans

    def random_map(self, element: dict, rng: np.random.Generator) -> dict:
        return self.scans.take(element['scan'], element['z'], int(rng.integers(1, _MOST_APART + 1)))


def slice_feed(
    scans: Scans, *, batch_size: int, seed: int, host: int = 0, num_hosts: int = 1
) -> Feed:
    """Endless shuffled batches of IMAGE, LUNGS (batch_size / num_hosts, SIZE, SIZE, 3) and CASE."""
    elements = repeat_shuffled(scans, seed, 'slices').random_map(_Neighbours(scans))
    names = tuple(f'phantom_{number:03d}' for number in range(len(scans.images)))
    return Feed(share_batches(elements, batch_size, host, num_hosts), {CASE: names})


def make_scans(folder: pathlib.Path, count: int, seed: int, num_workers: int) -> Scans:
    """Phantoms of every category, made where `folder` does not hold them yet."""
    make = functools.partial(_make_scan, folder=folder, seed=seed)
    for _ in map_in_processes(make, range(count), num_workers, 'lungs'):
        pass
    arrays = [np.load(_path(folder, seed, n), mmap_mode='r') for n in range(count)]
    return Scans([each[0] for each in arrays], [each[1] for each in arrays])


def _path(folder: pathlib.Path, seed: int, number: int) -> pathlib.Path:
    return folder / f'phantom_{seed}_{number:03d}.npy'


def _make_scan(number: int, folder: pathlib.Path, seed: int) -> None:
    path = _path(folder, seed, number)
    if path.exists():
        return
    pixel_mm = PIXEL_MM[number % len(PIXEL_MM)]
    made = make_phantom(
        (seed, number),
        CATEGORIES[number % len(CATEGORIES)],
        (SIZE, SIZE, _NUM_SLICES),
        (pixel_mm, pixel_mm, _SLICE_MM),
    )
    folder.mkdir(parents=True, exist_ok=True)
    with atomic.new_file(path) as temporary, temporary.open('wb') as file:
        np.save(file, np.stack([made.image, made.lungs.astype(np.int16)]))
