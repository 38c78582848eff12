"""Trees of weights as one vector each: how a CPU trains them, and how checkpoints hold them."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Flat:
    """A tree of float32 arrays as one vector, in the order of `jax.tree.leaves`.

    Adam, averaging and the choice to skip a step are then one loop over memory, not one for each of
    some hundred leaves, and XLA for CPUs has a third of the kernels to compile. On a TPU, whose
    memory is laid out in tiles, cutting kernels out of a vector costs more than it saves: there
    states hold trees, see `Parts.to_hold`.
    """

    vector: jax.Array  # (size,) float32
    structure: Any = struct.field(pytree_node=False)  # jax.tree.structure of the tree
    shapes: tuple[tuple[int, ...], ...] = struct.field(pytree_node=False)  # of its leaves


def flatten(tree: Any) -> Flat:
    """The tree as one vector.

    Raises:
      TypeError: a leaf is not float32.
    """
    leaves, structure = jax.tree.flatten(tree)
    wrong = {str(leaf.dtype) for leaf in leaves} - {'float32'}
    if wrong:
        raise TypeError(f'leaves of a Flat are float32, not {", ".join(sorted(wrong))}')
    parts = [jnp.zeros(0), *(leaf.ravel() for leaf in leaves)]  # a tree may have no leaf
    return Flat(jnp.concatenate(parts), structure, tuple(leaf.shape for leaf in leaves))


def flatten_as(tree: Any, like: Any) -> Any:
    """The tree, flattened if `like` is a Flat."""
    return flatten(tree) if isinstance(like, Flat) else tree


def unflatten(tree: Any) -> Any:
    """The tree with each Flat in it as the tree that it was made of; of NumPy vectors, views."""

    def restore(part: Any) -> Any:
        if not isinstance(part, Flat):
            return part
        leaves, start = [], 0
        for shape in part.shapes:
            end = start + math.prod(shape)
            leaves.append(part.vector[start:end].reshape(shape))
            start = end
        return jax.tree.unflatten(part.structure, leaves)

    return jax.tree.map(restore, tree, is_leaf=lambda part: isinstance(part, Flat))


def layout(tree: Any) -> list[tuple[str, tuple[int, ...]]]:
    """Type and shape of each leaf, in order; the same whether parts of the tree are Flats."""
    found = []
    for part in jax.tree.leaves(tree, is_leaf=lambda part: isinstance(part, Flat)):
        is_flat = isinstance(part, Flat)
        dtype, shapes = (part.vector.dtype, part.shapes) if is_flat else (part.dtype, [part.shape])
        found += [(str(dtype), tuple(shape)) for shape in shapes]
    return found


def to_vectors(tree: Any) -> dict[str, jax.Array]:
    """The leaves of each type, one after another; the same whether parts of the tree are Flats."""
    parts: dict[str, list] = {}
    for leaf in jax.tree.leaves(tree):
        parts.setdefault(str(leaf.dtype), []).append(leaf.ravel())
    return {dtype: jnp.concatenate(leaves) for dtype, leaves in parts.items()}


def from_vectors(vectors: dict[str, jax.Array], like: Any) -> Any:
    """The way back of `to_vectors`, for a tree of the shapes and types of `like`."""
    leaves, structure = jax.tree.flatten(like)
    starts, found = dict.fromkeys(vectors, 0), []
    for leaf in leaves:
        dtype = str(leaf.dtype)
        start = starts[dtype]
        starts[dtype] = end = start + leaf.size
        found.append(vectors[dtype][start:end].reshape(leaf.shape))
    return jax.tree.unflatten(structure, found)
