"""Trees of weights, stored as one vector each."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Flat:
    """A tree of float32 arrays as one vector, in the order of `jax.tree.leaves`.

    Adam, averaging and the choice to skip a step are then one loop over memory, not one for each of
    some hundred leaves: XLA has a third of the kernels to compile, and a checkpoint few files.
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
