"""One mesh axis, 'data': batches are split over it, states are copied."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from covseg_jax.errors import InputError


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """All devices of all hosts, or those given, along the axis 'data'."""
    # Under the default Explicit axes linen's Dropout fails.
    count = jax.device_count() if devices is None else len(devices)
    return jax.make_mesh((count,), ('data',), axis_types=(AxisType.Auto,), devices=devices)


def make_local_mesh() -> Mesh:
    """One device of this host: for what each host does by itself."""
    return make_mesh(jax.local_devices()[:1])


def copy_to_one_device(tree: Any) -> Any:
    """A replicated tree on one device of this host."""
    return jax.device_put(jax.device_get(tree), jax.local_devices()[0])


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of states: a copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh) -> NamedSharding:
    """The sharding of batches: split along their first axis."""
    return NamedSharding(mesh, PartitionSpec('data'))


def place_state(init: Callable[[], Any], mesh: Mesh) -> tuple[Callable[[], Any], Any]:
    """Turns a function that makes a state into one that makes it on the mesh, and gives the
    state's shapes, types and shardings without making it."""
    # Made inside jit, so that no leaf shares memory with another and all may be donated.
    make = jax.jit(init, out_shardings=replicated(mesh))
    return make, abstract(jax.eval_shape(init), replicated(mesh))


def check_batch_size(batch_size: int, mesh: Mesh, field: str) -> None:
    """Raises an InputError when the batch cannot be split evenly over the devices."""
    if batch_size % mesh.size:
        raise InputError(
            f'{field}={batch_size} cannot be split over {mesh.size} devices; '
            f'make it a multiple of {mesh.size}'
        )


def abstract(tree: Any, sharding: NamedSharding) -> Any:
    """The shapes of a tree that is laid out so: what a step is compiled for."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This host's rows of a batch -> global arrays split along their first axis."""
    return {
        key: jax.make_array_from_process_local_data(split(mesh), array)
        for key, array in batch.items()
    }
