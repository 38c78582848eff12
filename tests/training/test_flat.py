"""Trees of weights as vectors."""

import jax
import numpy as np
import pytest

from covseg_jax.training.flat import flatten, unflatten

TREE = {
    'b': {'bias': np.float32(3.0), 'kernel': np.arange(6, dtype=np.float32).reshape(2, 3)},
    'a': [np.full((1, 2), 7, np.float32)],
}


def test_a_tree_comes_back_from_its_vector():
    flat = flatten(TREE)
    np.testing.assert_array_equal(flat.vector, [7, 7, 3, 0, 1, 2, 3, 4, 5])
    for back in (unflatten(flat), jax.jit(unflatten)(flat), unflatten(jax.device_get(flat))):
        jax.tree.map(np.testing.assert_array_equal, back, TREE)


def test_what_is_no_flat_stays_and_a_tree_without_leaves_has_an_empty_vector():
    found = unflatten({'step': 4, 'params': flatten(TREE), 'stats': flatten({})})
    assert found['step'] == 4
    assert found['stats'] == {}
    np.testing.assert_array_equal(found['params']['a'][0], TREE['a'][0])


def test_a_leaf_of_another_type_is_refused():
    with pytest.raises(TypeError, match='int32'):
        flatten({'count': np.zeros(2, np.int32)})
