"""The only training loop: evaluate -> save -> next batch -> step -> log.

What a run writes depends on its steps alone and not on where it was cut: the state and the values
that are not logged yet are saved together, and the batch of a step is its feed's.
"""

import contextlib
import dataclasses
import json
import math
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from covseg_jax import atomic, hosts
from covseg_jax.data.feeds import Feed
from covseg_jax.errors import GO_ON, InputError, Stopped
from covseg_jax.training.checkpoint import Checkpoints, Restored
from covseg_jax.training.logging import open_log
from covseg_jax.training.progress import draw_progress
from covseg_jax.training.sharding import shard_batch
from covseg_jax.training.step import SKIPPED

Metrics = dict[str, tuple[Any, Any]]  # name -> (sum, count)
# state -> (state, values, pictures); may change the state (plateau)
Evaluate = Callable[[Any], tuple[Any, dict[str, float], dict[str, np.ndarray]]]
_SHOW_EVERY = 60  # seconds, of progress.png, whose drawing takes one, and of a line where no bar is


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How long, and how often what, in steps. 0 means never, but for the end of the run.

    `profile_steps` is () or (first, last): the steps that XLA's profiler looks at. A training ends
    where, at a line of its log, more than `max_skipped_steps` in a row were skipped because their
    loss or gradient is not finite.
    """

    num_steps: int
    log_every: int
    evaluate_every: int
    save_every: int
    profile_steps: tuple[int, int] | tuple[()]
    max_skipped_steps: int

    @classmethod
    def of(cls, group: Mapping[str, Any], **changes: Any) -> 'Schedule':
        """A config group's own, but for the changes."""
        return cls(**{each.name: group[each.name] for each in dataclasses.fields(cls)} | changes)


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
    """Within the block, Ctrl-C and SIGTERM only ask: the function it yields tells whether. On
    several hosts they ask all of them, see `hosts.reached_stop`, and it never does."""
    asked = False

    def ask(signum: int, frame: Any) -> None:
        nonlocal asked
        if hosts.count() > 1:
            hosts.ask_all_to_stop()
        else:
            asked = True

    # On several hosts SIGTERM is JAX's: a handler of Python's would take its place.
    chosen = (signal.SIGINT, signal.SIGTERM) if hosts.count() == 1 else (signal.SIGINT,)
    before = {s: signal.signal(s, ask) for s in chosen}
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


class _Timer:
    """How fast steps were since the last line, and which share of the time they waited for data.

    What compiling took is in neither: on a GPU it is minutes, and the first line would say that
    hours are left.
    """

    def __init__(self) -> None:
        self._since, self._seconds = time.monotonic(), {'pause': [], 'wait': []}
        self._compiled = set()

    @contextlib.contextmanager
    def measure(self, what: str) -> Iterator[None]:
        """The block is a 'pause', which belongs to no step, or a step's 'wait' for its batch."""
        began = time.monotonic()
        yield
        self._seconds[what].append(time.monotonic() - began)

    def call(self, program: Callable) -> contextlib.AbstractContextManager[None]:
        """The block calls a jitted program, whose first call compiles, and is a pause. The device
        computes the step after the call."""
        if program in self._compiled:
            return contextlib.nullcontext()
        self._compiled.add(program)
        return self.measure('pause')

    def take(self) -> dict[str, float]:
        """The two, and begins anew."""
        now, waits = time.monotonic(), self._seconds['wait']
        seconds = now - self._since - sum(self._seconds['pause'])
        self._since, self._seconds = now, {'pause': [], 'wait': []}
        return {
            'speed/steps_per_s': len(waits) / seconds,
            'speed/input_wait_share': sum(waits) / seconds,
        }


class _Records:
    """What a run writes as it goes: checkpoints, log lines, and progress.png of the work directory.

    It keeps the metrics of the steps since the last line, and which steps in a row, up to the
    newest, were skipped.
    """

    def __init__(
        self, name: str, folder: pathlib.Path, checkpoints: Checkpoints, schedule: Schedule,
        found: Restored,
    ):  # fmt: skip
        self._name, self._folder, self._checkpoints = name, folder, checkpoints
        self._schedule, self._start = schedule, int(found.state.step)
        self._log = open_log(folder, start_step=self._start)
        unlogged = found.progress.get('unlogged', {})
        self._metrics: list[Metrics] = unlogged.get('metrics', [])
        self._skipped: list[tuple[int, list[str]]] = unlogged.get('skipped', [])
        self._studies: list[tuple[int, list[str]]] = []  # of the steps not looked at yet
        self._picture_due = self._line_due = time.monotonic() + _SHOW_EVERY

    def close(self) -> None:
        self._log.close()

    def add_step(self, step: int, metrics: Metrics, studies: list[str]) -> None:
        self._metrics.append(metrics)
        self._studies.append((step, studies))

    def keep(
        self, step: int, state: Any, evaluate: Evaluate, stop_asked: Callable[[], bool]
    ) -> tuple[Any, bool]:
        """Evaluates and saves where that is due before `step`. Returns the state, and whether to
        stop there."""
        schedule, at_end = self._schedule, step == self._schedule.num_steps
        is_new = step > self._start
        evaluates = is_new and (at_end or _is_due(step, schedule.evaluate_every))
        if evaluates:
            state, values, pictures = evaluate(state)
            self._log.write(step, {f'validation/{name}': value for name, value in values.items()})
            for name, picture in pictures.items():
                self._log.write_image(step, f'pictures/{name}', picture)
        stop = stop_asked() or hosts.reached_stop(step)
        if is_new and (at_end or stop or _is_due(step, schedule.save_every)):
            self._save(step, state)
        if evaluates or stop:
            self._draw_progress(always=at_end or stop)
        return state, stop

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

    def _save(self, step: int, state: Any) -> None:
        self._log.sync()  # the lines up to this step are on disk before it
        self._look()
        # a copy: what is saved is written while steps go on
        unlogged = {'metrics': list(self._metrics), 'skipped': self._skipped}
        self._checkpoints.save(step, state, {'unlogged': unlogged})

    def write_line(self, step: int, timer: _Timer) -> float:
        """Logs the means of the metrics and the timer's speeds, and returns the loss's mean. Where
        no bar is drawn, since the output is a file, a line a minute says where the run stands.

        Raises:
          InputError: too many steps in a row were skipped; their studies are in not_finite.json.
        """
        self._look()
        if len(self._skipped) > self._schedule.max_skipped_steps:
            name = 'not_finite.json' if hosts.is_first() else f'not_finite_{hosts.index()}.json'
            steps = [{'step': step, 'studies': studies} for step, studies in self._skipped]
            atomic.write_text(self._folder / name, json.dumps(steps, indent=2))
            raise InputError(
                f'{self._name}: loss or gradient is not finite in steps {steps[0]["step"]} to '
                f'{step}, all skipped; look at the studies in {self._folder / name}, or go on with '
                'a smaller learning rate in another --workdir; the checkpoints in '
                f'{self._folder / "checkpoints"} are whole'
            )
        means, self._metrics = mean_metrics(self._metrics), []
        # Steps are only queued until `_look`: what it waited for the device is their time.
        speeds = timer.take()
        self._log.write(step, means | speeds)
        if not sys.stderr.isatty() and time.monotonic() >= self._line_due:
            minutes = (self._schedule.num_steps - step) / speeds['speed/steps_per_s'] / 60
            print(
                f'{self._name}: step {step} of {self._schedule.num_steps}, loss '
                f'{means["loss/total"]:.4f}, about {minutes:.0f} min left',
                flush=True,
            )
            self._line_due = time.monotonic() + _SHOW_EVERY
        return means['loss/total']

    def _draw_progress(self, *, always: bool) -> None:
        """Draws the picture, on host 0; unless `always`, at most once a minute."""
        if hosts.is_first() and (always or time.monotonic() >= self._picture_due):
            with contextlib.suppress(OSError):  # log and checkpoints tell of a full disk
                draw_progress(self._folder.parent)
            self._picture_due = time.monotonic() + _SHOW_EVERY


def run(
    *,
    name: str,
    folder: pathlib.Path,
    state: Any,
    abstract_state: Any,
    feed: Feed,
    step_at: Callable[[int], Callable[[Any, Any], tuple[Any, Metrics]]],
    evaluate: Evaluate,
    schedule: Schedule,
    first_step: int = 0,
) -> Any:
    """Trains from the newest checkpoint in `folder`, or from `state`, to the schedule's end, and
    returns the last state, saved.

    Args:
      name: what the progress bar says.
      folder: gets checkpoints/, tensorboard/, metrics.jsonl and, with a profile, profile/, for
        TensorBoard's profile plugin and Perfetto. The work directory around it gets progress.png.
      state: a fresh state with a `step` field; donated.
      abstract_state: its shapes and shardings.
      feed: the batches; its first one is of `first_step`.
      step_at: step number -> the compiled step to run there.

    Raises:
      Stopped: Ctrl-C or SIGTERM came; everything is saved.
      InputError: too many steps in a row are not finite, or the disk cannot be written.
    """
    checkpoints = Checkpoints(folder / 'checkpoints')
    # Each has a disk, maybe of its own.
    hosts.on_each(lambda: checkpoints.check_space(abstract_state))
    found = checkpoints.restore(abstract_state) or Restored(0, state, {})
    state, start, end = found.state, int(found.state.step), schedule.num_steps
    batches = feed.start(max(start - first_step, 0))
    timer, mesh = _Timer(), abstract_state.step.sharding.mesh
    with (
        _stop_signals() as stop_asked,  # before the log: who sees it may ask
        contextlib.closing(checkpoints),
        contextlib.closing(_Records(name, folder, checkpoints, schedule, found)) as records,
        contextlib.closing(_Profiler(folder / 'profile', schedule.profile_steps)) as profiler,
        _progress_bar(name, start, end) as bar,
    ):
        hosts.wait_for_all(f'{name} begins')
        for step in range(start, end + 1):
            with timer.measure('pause'):
                state, stop = records.keep(step, state, evaluate, stop_asked)
            if stop:
                checkpoints.wait()
                raise Stopped(f'{name}: stopped and saved at step {step}; {GO_ON}')
            if step == end:
                break
            with timer.measure('wait'):
                batch = next(batches)
            profiler.before(step)
            program, inputs = step_at(step), shard_batch(feed.inputs(batch), mesh)
            with timer.call(program):
                state, metrics = program(state, inputs)
            profiler.after(step, state)
            records.add_step(step + 1, metrics, feed.studies(batch))
            bar.update()
            if step + 1 == end or _is_due(step + 1, schedule.log_every):
                bar.set_postfix(loss=f'{records.write_line(step + 1, timer):.4f}')
    return state


def _progress_bar(name: str, start: int, end: int) -> tqdm:
    """Drawn on a terminal alone. The first step is compiled before it comes, on a GPU for
    minutes."""
    return tqdm(total=end, initial=start, desc=name, unit='step', postfix='compiling', disable=None)


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
