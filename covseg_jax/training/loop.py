"""The only training loop: evaluate -> save -> next batch -> step -> log.

What a run writes depends on its steps alone and not on where it was cut: the state, the values that
are not logged yet and the last evaluation's are saved together, the batch of a step is its feed's.
"""

import contextlib
import dataclasses
import json
import math
import pathlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from covseg_jax import atomic, hosts
from covseg_jax.data.feeds import Feed
from covseg_jax.errors import GO_ON, InputError, Stopped
from covseg_jax.training.checkpoint import Checkpoints
from covseg_jax.training.finite import SKIPPED
from covseg_jax.training.logging import open_log
from covseg_jax.training.progress import draw_progress

Metrics = dict[str, tuple[Any, Any]]  # name -> (sum, count)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How long, and how often what, in steps. 0 means never, but for the end of the run.

    `profile` is () or (first, last): the steps that XLA's profiler looks at. `max_skipped` steps in
    a row may be skipped because their loss or gradient is not finite.
    """

    num_steps: int
    log_every: int
    evaluate_every: int
    save_every: int
    profile: tuple[int, int] | tuple[()] = ()
    max_skipped: int = 10


def distinct_steps(step_at: Callable[[int], Callable], num_steps: int) -> list[Callable]:
    """The compiled steps that a run of `num_steps` takes, in the order of their first use."""
    return list({id(step): step for step in map(step_at, range(num_steps))}.values())


def mean_metrics(collected: Sequence[Metrics]) -> dict[str, float]:
    """Merges (sum, count) pairs of many steps into means; nothing counted gives NaN."""
    sums: dict[str, list[float]] = {}
    for metrics in jax.device_get(collected):
        for name, (total, count) in metrics.items():
            pair = sums.setdefault(name, [0.0, 0.0])
            pair[0] += float(total)
            pair[1] += float(count)
    return {name: total / count if count else math.nan for name, (total, count) in sums.items()}


@contextlib.contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Within the block, Ctrl-C and SIGTERM only ask: the function it yields tells whether."""
    asked = False

    def ask(signum: int, frame: Any) -> None:
        nonlocal asked
        asked = True

    before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


class _Profiler:
    """A trace of the steps from the first to the last of a pair; of none where it is ()."""

    def __init__(self, folder: pathlib.Path, steps: tuple[int, int] | tuple[()]):
        self._folder, self._steps, self._is_running = folder, steps, False

    def before(self, step: int) -> None:
        if self._steps and step == self._steps[0]:
            jax.profiler.start_trace(str(self._folder))
            self._is_running = True

    def after(self, step: int, state: Any) -> None:
        if self._is_running and step >= self._steps[1]:
            jax.block_until_ready(state)  # steps are only queued until then
            self.close()

    def close(self) -> None:
        if self._is_running:
            jax.profiler.stop_trace()
            self._is_running = False


class _ProgressPicture:
    """progress.png of a work directory, which the first host draws."""

    _EVERY_SECONDS = 60

    def __init__(self, workdir: pathlib.Path):
        self._workdir, self._due = workdir, -math.inf

    def draw(self, *, always: bool) -> None:
        """Draws it; unless `always`, only where the last one is a minute old."""
        if not hosts.is_first() or not (always or time.monotonic() >= self._due):
            return
        with contextlib.suppress(OSError):  # a full disk is the log's and the checkpoints' to tell
            draw_progress(self._workdir)
        self._due = time.monotonic() + self._EVERY_SECONDS


class _Unlogged:
    """The metrics of the steps since the last logged line, and which steps in a row, up to the
    newest, were skipped."""

    def __init__(self, saved: dict[str, Any]):
        """From what `to_json` gave."""
        self._metrics: list[Metrics] = saved.get('metrics', [])
        self._skipped: list[tuple[int, list[str]]] = saved.get('skipped', [])
        self._studies: list[tuple[int, list[str]]] = []  # of the steps not looked at yet

    def add(self, step: int, metrics: Metrics, studies: list[str]) -> None:
        self._metrics.append(metrics)
        self._studies.append((step, studies))

    def _look(self) -> None:
        """Brings the steps from the device, and counts those that were skipped."""
        self._metrics = [
            {name: (float(total), float(count)) for name, (total, count) in metrics.items()}
            for metrics in jax.device_get(self._metrics)
        ]
        new = self._metrics[len(self._metrics) - len(self._studies) :]
        for metrics, named in zip(new, self._studies, strict=True):
            self._skipped = [*self._skipped, named] if metrics.get(SKIPPED, (0,))[0] else []
        self._studies = []

    def to_json(self) -> dict[str, Any]:
        self._look()
        # a copy: what is saved is written while steps go on
        return {'metrics': list(self._metrics), 'skipped': self._skipped}

    def skipped(self) -> list[tuple[int, list[str]]]:
        """(step, study ids) of the newest steps, all in a row, that were skipped."""
        self._look()
        return self._skipped

    def take_means(self) -> dict[str, float]:
        """Their means; they count as logged then."""
        means = mean_metrics(self._metrics)
        self._metrics = []
        return means


def run(
    *,
    name: str,
    folder: pathlib.Path,
    state: Any,
    abstract_state: Any,
    feed: Feed,
    step_at: Callable[[int], Callable[[Any, Any], tuple[Any, Metrics]]],
    shard: Callable[[dict[str, np.ndarray]], dict[str, jax.Array]],
    evaluate: Callable[[Any], tuple[Any, dict[str, float], dict[str, np.ndarray]]],
    schedule: Schedule,
    first_step: int = 0,
) -> Any:
    """Trains, from the newest checkpoint in `folder` or from `state`.

    Args:
      name: what the progress bar says.
      folder: gets checkpoints/, tensorboard/, metrics.jsonl and, with a profile, profile/, which
        TensorBoard's profile plugin and Perfetto show. The folder around it, the work directory,
        gets progress.png.
      state: a fresh state with a `step` field; donated.
      abstract_state: its shapes and shardings.
      feed: the batches.
      step_at: step number -> the compiled step to run there.
      shard: host batch -> device batch.
      evaluate: state -> (state, values, pictures); may change the state (plateau).
      schedule: how long and how often.
      first_step: the step of the feed's first batch.

    Returns:
      The state after the last step, saved.

    Raises:
      Stopped: Ctrl-C or SIGTERM came; everything is saved.
      InputError: too many steps in a row are not finite, or the disk cannot be written.
    """
    checkpoints = Checkpoints(folder / 'checkpoints')
    checkpoints.check_space(abstract_state)
    restored = checkpoints.restore(abstract_state)
    progress: dict[str, Any] = {}
    if restored is not None:
        state, progress = restored.state, restored.progress
    start = int(state.step)
    unlogged = _Unlogged(progress.get('unlogged', {}))
    batches = feed.start(max(start - first_step, 0))
    timer, progress_picture = _Timer(), _ProgressPicture(folder.parent)
    with (
        _stop_signals() as stop_asked,  # before the log: who sees it may ask
        contextlib.closing(checkpoints),
        contextlib.closing(open_log(folder, start_step=start)) as log,
        contextlib.closing(_Profiler(folder / 'profile', schedule.profile)) as profiler,
        tqdm(total=schedule.num_steps, initial=start, desc=name, unit='step', disable=None) as bar,
    ):
        for step in range(start, schedule.num_steps + 1):
            at_end = step == schedule.num_steps
            with timer.pause():  # the speed that is logged is the steps' own
                evaluates = step > start and (at_end or _is_due(step, schedule.evaluate_every))
                if evaluates:
                    state, values, pictures = evaluate(state)
                    log.write(step, values)
                    for title, picture in pictures.items():
                        log.write_image(step, title, picture)
                # Hosts have to agree on it, and agreeing waits for the device.
                asks = hosts.count() == 1 or _is_due(step, schedule.log_every)
                stop = asks and hosts.is_any(stop_asked())
                if step > start and (at_end or stop or _is_due(step, schedule.save_every)):
                    log.sync()  # the lines up to this step are on disk before it
                    checkpoints.save(step, state, {'unlogged': unlogged.to_json()})
                if evaluates or stop:
                    progress_picture.draw(always=at_end or stop)
                if at_end:
                    break
                if stop:
                    checkpoints.wait()
                    raise Stopped(f'{name}: stopped and saved at step {step}; {GO_ON}')
            with timer.wait():
                batch = next(batches)
            profiler.before(step)
            state, metrics = step_at(step)(state, shard(feed.inputs(batch)))
            profiler.after(step, state)
            unlogged.add(step + 1, metrics, feed.studies(batch))
            bar.update()
            if _is_due(step + 1, schedule.log_every) or step + 1 == schedule.num_steps:
                _check_skipped(unlogged.skipped(), schedule.max_skipped, name, folder)
                means = unlogged.take_means()
                log.write(step + 1, means | timer.take())
                bar.set_postfix(loss=f'{means["loss/total"]:.4f}')
    return state


class _Timer:
    """How fast steps were since the last line, and which share of the time they waited for data."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._since, self._waited, self._paused, self._steps = time.monotonic(), 0.0, 0.0, 0

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._paused += time.monotonic() - began

    @contextlib.contextmanager
    def wait(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._waited += time.monotonic() - began
        self._steps += 1

    def take(self) -> dict[str, float]:
        """The two, and begins anew."""
        seconds = time.monotonic() - self._since - self._paused
        found = {
            'speed/steps_per_s': self._steps / seconds,
            'speed/input_wait_share': self._waited / seconds,
        }
        self._begin()
        return found


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _check_skipped(
    skipped: list[tuple[int, list[str]]], most: int, name: str, folder: pathlib.Path
) -> None:
    if len(skipped) <= most:
        return
    path = folder / ('not_finite.json' if hosts.is_first() else f'not_finite_{hosts.index()}.json')
    steps = [{'step': step, 'studies': studies} for step, studies in skipped]
    atomic.write_text(path, json.dumps(steps, indent=2))
    first, last = skipped[0][0], skipped[-1][0]
    raise InputError(
        f'{name}: loss or gradient is not finite in steps {first} to {last}, all skipped; look at '
        f'the studies in {path}, or go on with a smaller learning rate in another --workdir; the '
        f'checkpoints in {folder / "checkpoints"} are whole'
    )
