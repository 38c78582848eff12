"""How many slices a second a host reads for the network's training.

    python -m tests.benchmarks.feed [--size=128] [--batch_size=32] [--threads=1,2,4] [--workers=0,2]
        [--seconds=5] [--parts]

Writes prepared cases of noise into a temporary folder, and reads them as the stage `train` does, to
batches that are ready for the device, with each number of threads, and of processes (0: threads of
this one). Prints a JSON line for each: slices a second, and a second of a core, which other work on
the machine does not change. --parts says instead what a slice costs where.
"""

import argparse
import json
import os
import pathlib
import tempfile
import time
from collections.abc import Callable

from covseg_jax import cpu

if __name__ == '__main__':
    cpu.tune_process()  # as `covseg_jax.main` does

import grain
import numpy as np

from covseg_jax.data import feeds
from covseg_jax.prepare.cases import find_cases
from tests.conftest import write_case

NUM_CASES = 48


def cpu_seconds() -> float:
    """Of this process, all its threads, and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def make_slices(folder: pathlib.Path, size: int) -> feeds.Slices:
    """Half of the cases healthy, half with a soft target on disk."""
    for number in range(NUM_CASES):
        category = ('CT-0', 'CT-2')[number % 2]
        write_case(folder / 'prepared', f'study_{number:04d}', category, shape=(32, size, size))
    cases = find_cases(folder / 'prepared')
    targets = []
    for case in cases:
        path = folder / f'{case.study_id}.npy'
        np.save(path, np.asarray(case.image()))
        targets.append(None if case.is_healthy else np.load(path, mmap_mode='r'))
    return feeds.spread_healthy(feeds.rank_slices(feeds.all_slices(cases, targets)))


def read(batches: feeds.Feed, threads: int, workers: int, seconds: float) -> dict[str, float]:
    """How many slices came in about so many seconds, once the first batches were there."""
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    data = batches.batches.to_iter_dataset(options)
    if workers:
        data = data.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    coming = iter(data)
    for _ in range(10):
        next(coming)
    began, cpu, count = time.perf_counter(), cpu_seconds(), 0
    while time.perf_counter() - began < seconds:
        count += len(next(coming)[feeds.LABEL])
    wall = time.perf_counter() - began
    found = {'slices_per_s': round(count / wall)}
    if not workers:  # children's seconds are known only once they end
        found['slices_per_core_s'] = round(count / (cpu_seconds() - cpu))
    return found


def cost_us(work: Callable[[], object], repeats: int = 300) -> float:
    """Microseconds of a core that one call takes."""
    for _ in range(20):
        work()
    began = time.process_time()
    for _ in range(repeats):
        work()
    return round(1e6 * (time.process_time() - began) / repeats, 1)


def cost_of_parts(slices: feeds.Slices, feed: feeds.Feed, batch_size: int) -> dict[str, float]:
    """Microseconds of a core for a slice: read alone, as a source's element, and in a batch."""
    rng = np.random.default_rng(0)
    case = slices.cases[1]
    return {
        'mapped_image': cost_us(lambda: np.array(case.image()[5])),
        'image': cost_us(lambda: case.read_slice('image', 5)),
        'element': cost_us(lambda: slices[int(rng.integers(len(slices)))]),
        'in_a_batch': round(
            cost_us(lambda: feed.batches[int(rng.integers(1000))], 30) / batch_size, 1
        ),
    }


def main() -> None:
    """Writes the cases, reads them, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--size', type=int, default=128, help='of a slice, pixels')
    parser.add_argument('--batch_size', type=int, default=32)
    parser.add_argument('--threads', default='1,2,4')
    parser.add_argument('--workers', default='0')
    parser.add_argument('--seconds', type=float, default=5)
    parser.add_argument('--parts', action='store_true')
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        slices = make_slices(pathlib.Path(folder), given.size)
        feed = feeds.balanced_feed(slices, batch_size=given.batch_size, seed=0)
        if given.parts:
            print(json.dumps(cost_of_parts(slices, feed, given.batch_size)), flush=True)
            return
        for workers in map(int, given.workers.split(',')):
            for threads in map(int, given.threads.split(',')):
                found = read(feed, threads, workers, given.seconds)
                print(json.dumps({'threads': threads, 'workers': workers, **found}), flush=True)


if __name__ == '__main__':
    main()
