"""Orbax checkpoints: a run's state with what its log needs, the two newest kept.

A state is saved as one vector of each type, so that a checkpoint made on a TPU, whose states hold
trees, is read on a CPU, whose states hold vectors, and has few files.
"""

import contextlib
import functools
import pathlib
import shutil
import sys
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax import lax
from orbax.checkpoint import checkpoint_managers

from covseg_jax import hosts, mirror
from covseg_jax.errors import InputError
from covseg_jax.training.flat import from_vectors, layout, to_vectors
from covseg_jax.training.sharding import make_local_mesh, replicated

_CHECKSUM, _LAYOUT = 'checksum', 'layout'  # beside a run's progress


class Restored(NamedTuple):
    """A checkpoint that was read."""

    step: int
    state: Any
    progress: dict[str, Any]  # what was saved beside the state


class Checkpoints:
    """The checkpoints of one run, in one folder, the two newest of them.

    Saving is asynchronous: call `wait` before the process ends. A save that was cut off leaves a
    temporary folder that is never taken for a checkpoint and goes when the folder is opened again.
    All hosts call the same methods. `save`, `wait` and `close` raise an InputError where the disk
    is full or cannot be written.

    Where the work directory is in a bucket, each save goes there when it is whole. Of several
    hosts, which then have a disk each, host 0 alone saves.
    """

    def __init__(self, folder: pathlib.Path):
        """Opens or makes `folder`."""
        mirror.share()  # the checkpoints that host 0 has
        self._folder = folder.resolve()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.LatestN(2),
                cleanup_tmp_directories=True,
                **_on_own_disk(),
            ),
        )
        self._saved = self._manager.latest_step()

    def latest_step(self) -> int | None:
        """The newest checkpoint's step, or None."""
        return self._saved

    def check_space(self, state: Any) -> None:
        """Raises an InputError where the disk cannot hold the checkpoints that a run keeps at a
        time: two, and one that is being written."""
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        missing = max(3 - len(self._manager.all_steps()), 1) * size
        free = shutil.disk_usage(self._folder).free
        if free < missing:
            raise InputError(
                f'{self._folder}: {free:,} bytes are free and its checkpoints need {missing:,}; '
                'free as much, or use another --workdir'
            )

    def save(self, step: int, state: Any, progress: dict[str, Any]) -> None:
        """Starts to save the state after `step` steps, with `progress` (as JSON has it) beside
        it."""
        if self.latest_step() == step:
            return
        vectors = jax.jit(to_vectors, out_shardings=_sharding_of(state))(state)
        signs = {_CHECKSUM: int(_checksum(vectors)), _LAYOUT: _digest_layout(state)}
        if mirror.is_apart():  # arrays of all hosts would be saved by all of them
            vectors = jax.device_get(vectors)
        items = {
            'state': ocp.args.StandardSave(vectors),
            'progress': ocp.args.JsonSave(progress | signs),
        }
        self._saved = step
        with self._explained():  # an error may be of the save before this one
            mirror.join()
            if hosts.is_first() or not mirror.is_apart():
                self._manager.save(step, args=ocp.args.Composite(**items))
                mirror.push_after(self._manager.wait_until_finished)

    def restore(self, abstract_state: Any) -> Restored | None:
        """The newest checkpoint that is whole, laid out as `abstract_state` says (shapes and
        shardings); None where there is none at all. Newer ones that are damaged are set aside, in
        `damaged_checkpoints` beside the folder, with a line that says so.

        Raises:
          InputError: none of those that are there can be read, or hosts with a disk each read
            other ones.
        """
        found, damaged = hosts.on_each(
            lambda: _restore_newest(self._manager, self._folder, abstract_state)
        )
        steps = hosts.gather([found and found.step], hosts.count())
        if len(set(steps)) > 1:  # each read its own disk
            raise InputError(
                f'{self._folder}: of hosts 0 to {len(steps) - 1} the newest checkpoints that can '
                f'be read are of the steps {steps}; remove this folder where it is not the newest, '
                'and run the same command again: it comes from the bucket'
            )
        for step in damaged:
            aside = self._folder.parent / 'damaged_checkpoints' / str(step)
            if hosts.is_first() or mirror.is_apart():
                shutil.rmtree(aside, ignore_errors=True)
                aside.parent.mkdir(exist_ok=True)
                (self._folder / str(step)).rename(aside)
        if damaged:
            hosts.wait_for_all('damaged checkpoints are set aside')
            self._manager.reload()
        self._saved = self._manager.latest_step()
        return found

    def wait(self) -> None:
        """Returns once everything is on disk, and in the bucket."""
        with self._explained():
            mirror.join()
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and lets go of the folder."""
        with self._explained():
            mirror.join()
            self._manager.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """An error of Orbax becomes an InputError where the disk is at fault."""
        try:
            yield
        except Exception as error:
            signs = ('Error writing', 'No space left', 'PERMISSION_DENIED')
            if not isinstance(error, OSError) and not any(sign in str(error) for sign in signs):
                raise
            whole = max(self._manager.all_steps(), default=None)
            remains = (
                'there is none before it' if whole is None else f'that of step {whole} is whole'
            )
            raise InputError(
                f'{self._folder}: a checkpoint could not be written ({_first_line(error)}), '
                f'{remains}; free space there or make it writable, and run the same command again'
            ) from error


def restore_for_inference(folder: pathlib.Path, abstract_state: Any) -> tuple[Any, int]:
    """The newest state of a finished or unfinished run, and its step.

    Raises:
      InputError: there is no checkpoint, or none that fits the config.
    """
    found = None
    mirror.share()
    if folder.is_dir():
        options = ocp.CheckpointManagerOptions(read_only=True, **_on_own_disk())
        with contextlib.closing(
            ocp.CheckpointManager(folder.resolve(), options=options)
        ) as manager:
            found, _ = _restore_newest(manager, folder, abstract_state)
    if found is None:
        raise InputError(
            f'{folder}: no checkpoint; train first, or, if a training that is done lost its '
            'checkpoints, delete its file in manifests/ and train again'
        )
    return found.state, found.step


def _restore_newest(
    manager: ocp.CheckpointManager, folder: pathlib.Path, abstract_state: Any
) -> tuple[Restored | None, list[int]]:
    """The newest checkpoint that can be read, and the steps of newer ones that cannot."""
    faults: dict[int, str] = {}
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            found = _read(manager, step, abstract_state)
        except Exception as error:  # each of Orbax's parts raises its own
            faults[step] = _first_line(error)
            continue
        for bad, fault in faults.items():
            print(
                f'{folder}/{bad}: the checkpoint is damaged ({fault}); going on from the one '
                f'before, of step {step}',
                file=sys.stderr,
            )
        return found, list(faults)
    if faults:
        newest, fault = next(iter(faults.items()))
        raise InputError(
            f'{folder}/{newest}: the checkpoint does not fit the config or is damaged ({fault}), '
            'and there is no other; use the config that it was trained with'
        )
    return None, []


def _read(manager: ocp.CheckpointManager, step: int, abstract_state: Any) -> Restored:
    place = _sharding_of(abstract_state)
    local = make_local_mesh() if mirror.is_apart() else None
    vectors = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=replicated(local) if local else place
        ),
        jax.eval_shape(to_vectors, abstract_state),
    )
    items = {'state': ocp.args.StandardRestore(vectors), 'progress': ocp.args.JsonRestore()}
    found = manager.restore(step, args=ocp.args.Composite(**items))
    progress = dict(found['progress'])
    if progress.pop(_LAYOUT) != _digest_layout(abstract_state):
        raise ValueError('its arrays have other shapes')
    if progress.pop(_CHECKSUM) != int(_checksum(found['state'])):
        raise ValueError('its numbers are not those that were saved')
    restore = functools.partial(from_vectors, like=abstract_state)
    state = jax.device_get(found['state']) if local else found['state']
    return Restored(step, jax.jit(restore, out_shardings=place)(state), progress)


def _on_own_disk() -> dict[str, Any]:
    """Orbax's options where hosts have a disk each: each reads what it has, and waits for none."""
    if not mirror.is_apart():
        return {}
    host = hosts.index()
    own = ocp.options.MultiprocessingOptions(
        primary_host=host, active_processes={host}, barrier_sync_key_prefix=f'host_{host}'
    )
    return {'multiprocessing_options': own, 'create': False}


def _sharding_of(state: Any) -> jax.sharding.Sharding | None:
    """Where a state lies, all of it in one way; None: wherever JAX puts it."""
    return jax.tree.leaves(state)[0].sharding


def _digest_layout(state: Any) -> int:
    """A number of the shapes and types of a state's arrays: other networks may have as many
    weights."""
    return zlib.crc32(repr(layout(state)).encode())


@jax.jit
def _checksum(tree: Any) -> jax.Array:
    """A number that differs where a bit of a tree differs, or two neighbours are swapped: Orbax
    finds a damaged file by its structure, and gives changed weights without a word. The same
    however the tree is laid out over devices."""
    total = jnp.uint32(0)
    for leaf in jax.tree.leaves(tree):
        words = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
        bits = lax.bitcast_convert_type(jnp.atleast_1d(leaf), words).astype(jnp.uint32)
        odd = 2 * lax.broadcasted_iota(jnp.uint32, bits.shape, bits.ndim - 1) + 1
        total = 31 * total + (bits * odd).sum(dtype=jnp.uint32)
    return total


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
