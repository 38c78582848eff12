"""Work in processes that leave with their parent."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import context, resource_tracker
from typing import TypeVar

from covseg_jax.errors import InputError

Item = TypeVar('Item')
Result = TypeVar('Result')
_THREAD_VARIABLES = ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS')


def map_in_processes(
    function: Callable[[Item], Result], items: Sequence[Item], num_workers: int, what: str
) -> Iterator[Result]:
    """Yields results as they come, in no order. On Ctrl-C what runs is finished, what waits is
    dropped, and no process stays behind.

    Args:
        function: can be pickled, as functools.partial of a module's function can.
        items: can be pickled.
        num_workers: processes; 0 or 1 works in this one.
        what: the work's name, for messages.

    Raises:
        InputError: a process was killed.
    """
    if num_workers <= 1 or len(items) <= 1:
        yield from map(function, items)
        return
    with process_pool(min(num_workers, len(items)), what) as pool:
        jobs = [pool.submit(function, item) for item in items]
        for job in futures.as_completed(jobs):
            yield job.result()


@contextlib.contextmanager
def process_pool(num_workers: int, what: str) -> Iterator[futures.Executor]:
    """Within the block, processes to submit work to; with num_workers < 1, this one. At its end
    what waits is dropped, what runs is finished, and no process stays behind.

    Raises:
        InputError: a process was killed.
    """
    if num_workers < 1:
        yield _Here()
        return
    with _single_threaded_children():
        pool = futures.ProcessPoolExecutor(num_workers, _Context(), initializer=_follow_parent)
        try:
            yield pool
        except BrokenProcessPool as error:
            raise InputError(
                f'{what}: a worker process was killed, most likely for memory; '
                'set fewer (data.num_workers, or --num_workers of predict) and run again'
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


class _Here(futures.Executor):
    """Does what is submitted at once, in this process."""

    def submit(self, function, /, *args, **kwargs):
        job = futures.Future()
        try:
            job.set_result(function(*args, **kwargs))
        except Exception as error:
            job.set_exception(error)
        return job


@contextlib.contextmanager
def _single_threaded_children() -> Iterator[None]:
    # BLAS reads these when a process starts: N workers with N threads each would stand in each
    # other's way.
    before = {name: os.environ.get(name) for name in _THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(_THREAD_VARIABLES, '1'))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class _Process(context.SpawnProcess):
    """Starts deaf to Ctrl-C. It imports for seconds before `_follow_parent` runs in it, and one
    that dies in them breaks the pool, which then kills the others in the middle of their work."""

    def start(self):
        resource_tracker.ensure_running()  # where it has to start, it clears this mask
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            super().start()  # a process inherits the mask
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Context(context.SpawnContext):
    Process = _Process


def _follow_parent() -> None:
    # Ctrl-C reaches every process of the terminal; the parent decides what happens.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A parent that was killed can tell nobody: wait for its end beside the work.
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
