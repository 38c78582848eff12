"""The only training loop: evaluate -> save -> next batch -> step -> log."""

import contextlib
import dataclasses
import math
import pathlib
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
import numpy as np
from tqdm import tqdm

from covseg_jax.errors import InputError, Stopped
from covseg_jax.training.checkpoint import Checkpoints
from covseg_jax.training.logging import MetricsLog

Metrics = dict[str, tuple[Any, Any]]  # name -> (sum, count)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How long, and how often what, in steps. 0 means never, but for the end of the run.

    `profile` is () or (first, last): the steps that XLA's profiler looks at.
    """

    num_steps: int
    log_every: int
    evaluate_every: int
    save_every: int
    profile: tuple[int, int] | tuple[()] = ()


def mean_metrics(collected: list[Metrics]) -> dict[str, float]:
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


def run(
    *,
    name: str,
    folder: pathlib.Path,
    state: Any,
    abstract_state: Any,
    data: grain.DatasetIterator,
    step_at: Callable[[int], Callable[[Any, Any], tuple[Any, Metrics]]],
    shard: Callable[[dict[str, np.ndarray]], dict[str, jax.Array]],
    evaluate: Callable[[Any], tuple[Any, dict[str, float], dict[str, np.ndarray]]],
    schedule: Schedule,
    best: str,
    first_step: int = 0,
) -> Any:
    """Trains, from the newest checkpoint in `folder` or from `state`.

    Args:
      name: what the progress bar says.
      folder: gets checkpoints/, tensorboard/, metrics.jsonl and, with a profile, profile/, which
        TensorBoard's profile plugin and Perfetto show.
      state: a fresh state with a `step` field; donated.
      abstract_state: its shapes and shardings.
      data: the feed; its position is saved with the state.
      step_at: step number -> the compiled step to run there.
      shard: host batch -> device batch.
      evaluate: state -> (state, values, pictures); may change the state (plateau).
      schedule: how long and how often.
      best: the name of the value of `evaluate` whose largest marks the best checkpoint.
      first_step: at which `data` begins. A checkpoint of that step was made at the end of another
        feed: the state is taken from it, the position is not.

    Returns:
      The state after the last step, saved.

    Raises:
      Stopped: Ctrl-C or SIGTERM came; everything is saved.
      InputError: a loss is no longer finite.
    """
    checkpoints = Checkpoints(folder / 'checkpoints', best=best)
    restored = checkpoints.restore(abstract_state, data, first_step=first_step)
    if restored is not None:
        state = restored
    start = int(state.step)
    log = MetricsLog(folder, start_step=start)
    values: dict[str, float] = {best: -math.inf}
    collected: list[Metrics] = []
    waited, since = 0.0, time.monotonic()
    profiler = _Profiler(folder / 'profile', schedule.profile)
    try:
        with (
            _stop_signals() as stop_asked,
            tqdm(
                total=schedule.num_steps, initial=start, desc=name, unit='step', disable=None
            ) as bar,
        ):
            for step in range(start, schedule.num_steps + 1):
                at_end = step == schedule.num_steps
                before = time.monotonic()
                if step > start and (at_end or _is_due(step, schedule.evaluate_every)):
                    state, values, pictures = evaluate(state)
                    log.write(step, values)
                    for title, picture in pictures.items():
                        log.write_image(step, title, picture)
                if step > start and (at_end or stop_asked() or _is_due(step, schedule.save_every)):
                    checkpoints.save(step, state, data, values)
                if at_end:
                    break
                if stop_asked():
                    raise Stopped(f'{name}: stopped and saved at step {step}')
                since += time.monotonic() - before  # the speed that is logged is the steps' own
                before = time.monotonic()
                batch = next(data)
                waited += time.monotonic() - before
                profiler.before(step)
                state, metrics = step_at(step)(state, shard(batch))
                profiler.after(step, state)
                collected.append(metrics)
                bar.update()
                if _is_due(step + 1, schedule.log_every) or step + 1 == schedule.num_steps:
                    means = mean_metrics(collected)
                    _check_finite(means, name, step + 2 - len(collected), step + 1, folder)
                    seconds = time.monotonic() - since
                    means['speed/steps_per_s'] = len(collected) / seconds
                    means['speed/input_wait_share'] = waited / seconds
                    log.write(step + 1, means)
                    bar.set_postfix(loss=f'{means["loss/total"]:.4f}')
                    collected, waited, since = [], 0.0, time.monotonic()
    finally:
        profiler.close()
        checkpoints.close()
        log.close()
    return state


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _check_finite(
    means: dict[str, float], name: str, first: int, last: int, folder: pathlib.Path
) -> None:
    if not math.isfinite(means['loss/total']):
        raise InputError(
            f'{name}: the loss is not finite in steps {first} to {last}; the last checkpoint in '
            f'{folder / "checkpoints"} is whole: go on from it with a smaller learning rate'
        )
