"""Orbax checkpoints: state and data position together, the newest and the best kept."""

import pathlib
from typing import Any

import grain
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from covseg_jax.errors import InputError


class Checkpoints:
    """The checkpoints of one run, in one folder.

    Saving is asynchronous: call `wait` before the process ends. A save that was cut off leaves a
    temporary folder that is never taken for a checkpoint.
    """

    def __init__(self, folder: pathlib.Path, *, best: str | None = None):
        """Opens or makes `folder`. `best` names a metric of `save` whose largest value marks the
        checkpoint that is kept beside the newest."""
        policies = [checkpoint_managers.LatestN(1)]
        if best is not None:
            policies.append(
                checkpoint_managers.BestN(
                    get_metric_fn=lambda metrics: metrics[best], n=1, reverse=False
                )
            )
        self._folder = folder.resolve()
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
                cleanup_tmp_directories=True,
            ),
        )

    def latest_step(self) -> int | None:
        """The newest whole checkpoint's step, or None."""
        return self._manager.latest_step()

    def save(
        self,
        step: int,
        state: Any,
        data: grain.DatasetIterator | None,
        metrics: dict[str, float],
    ) -> None:
        """Starts to save the state after `step` steps and, if given, the position of its feed."""
        if self._manager.latest_step() == step:
            return
        items = {'state': ocp.args.StandardSave(state)}
        if data is not None:
            items['data'] = grain.checkpoint.CheckpointSave(data)
        self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)

    def restore(
        self, abstract_state: Any, data: grain.DatasetIterator, *, first_step: int = 0
    ) -> Any | None:
        """The newest state, laid out as `abstract_state` says (shapes and shardings), with `data`
        moved to its position, if one was saved after `first_step`, where this feed begins; None
        where there is no checkpoint."""
        step = self._manager.latest_step()
        if step is None:
            return None
        items = {'state': ocp.args.StandardRestore(abstract_state)}
        # Imported weights have no feed yet.
        if step > first_step and (self._folder / str(step) / 'data').exists():
            items['data'] = grain.checkpoint.CheckpointRestore(data)
        return self._manager.restore(step, args=ocp.args.Composite(**items))['state']

    def wait(self) -> None:
        """Returns once everything is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and lets go of the folder."""
        self._manager.close()


def restore_for_inference(folder: pathlib.Path, abstract_state: Any) -> tuple[Any, int]:
    """The newest state of a finished or unfinished run, and its step.

    Raises:
      InputError: there is no checkpoint, or it does not fit the network that the config describes.
    """
    if not folder.is_dir():
        raise InputError(f'{folder}: no checkpoint; train first')
    manager = ocp.CheckpointManager(
        folder.resolve(), options=ocp.CheckpointManagerOptions(read_only=True)
    )
    step = manager.latest_step()
    if step is None:
        raise InputError(f'{folder}: no checkpoint; train first')
    try:
        restored = manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
        )
    except ValueError as error:
        raise InputError(
            f'{folder}/{step}: the checkpoint does not fit the config ({_first_line(error)}); '
            'use the config that it was trained with'
        ) from error
    finally:
        manager.close()
    return restored['state'], step


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
