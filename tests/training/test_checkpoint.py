"""What tells a checkpoint's numbers from others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from covseg_jax.errors import InputError
from covseg_jax.training import sharding
from covseg_jax.training.checkpoint import Checkpoints, _checksum, restore_for_inference
from covseg_jax.training.flat import flatten


def tree():
    rng = np.random.default_rng(0)
    return {
        'weights': jnp.asarray(rng.standard_normal((32, 16)), jnp.float32),
        'half': jnp.asarray(rng.standard_normal((5,)), jnp.bfloat16),
        'step': jnp.int32(3),
    }


def test_checksum_sees_each_bit_and_the_order():
    before = int(_checksum(tree()))
    words = np.asarray(tree()['weights']).view(np.uint32)
    for bit in range(32):
        flipped = words.copy()
        flipped[7, 3] ^= np.uint32(1 << bit)
        changed = tree() | {'weights': jnp.asarray(flipped.view(np.float32))}
        assert int(_checksum(changed)) != before
    swapped = tree() | {'weights': tree()['weights'][:, [1, 0, *range(2, 16)]]}
    assert int(_checksum(swapped)) != before


def test_checksum_does_not_depend_on_the_devices():
    mesh = sharding.make_mesh()
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
    spread = tree() | {'weights': jax.device_put(tree()['weights'], split)}
    assert int(_checksum(spread)) == int(_checksum(tree()))


@pytest.mark.parametrize(('before', 'after'), [(8, 1), (8, 2), (1, 4)])
def test_a_checkpoint_goes_from_some_devices_to_others(tmp_path, before, after):
    def on(number):
        mesh = sharding.make_mesh(jax.devices()[:number])
        return sharding.place_state(tree, mesh)

    checkpoints = Checkpoints(tmp_path / 'checkpoints')
    checkpoints.save(3, on(before)[0](), {'values': {'a': 0.1}})
    checkpoints.wait()
    found = checkpoints.restore(on(after)[1])
    checkpoints.close()
    assert (found.step, found.progress) == (3, {'values': {'a': 0.1}})
    assert found.state['weights'].sharding.num_devices == after
    for key, value in tree().items():
        np.testing.assert_array_equal(found.state[key], value)


def test_a_checkpoint_of_other_sizes_is_refused_and_stays(tmp_path):
    checkpoints = Checkpoints(tmp_path / 'checkpoints')
    checkpoints.save(3, tree(), {})
    checkpoints.close()
    for shape in ((4, 4), (16, 32)):  # the latter has as many numbers
        other = jax.eval_shape(lambda shape=shape: tree() | {'weights': jnp.zeros(shape)})
        with pytest.raises(InputError, match='does not fit the config'):
            restore_for_inference(tmp_path / 'checkpoints', other)
    assert (tmp_path / 'checkpoints' / '3').is_dir()


def test_a_state_of_trees_is_read_as_one_of_vectors_and_back(tmp_path):
    def trees():
        return {'params': {'a': jnp.arange(6.0).reshape(2, 3), 'b': jnp.ones(2)}, 'step': 3}

    def vectors():
        return trees() | {'params': flatten(trees()['params'])}

    mesh = sharding.make_mesh(jax.devices()[:2])
    for number, (saved, read) in enumerate([(trees, vectors), (vectors, trees)]):
        folder = tmp_path / str(number)
        checkpoints = Checkpoints(folder)
        checkpoints.save(3, sharding.place_state(saved, mesh)[0](), {})
        checkpoints.close()
        make, abstract = sharding.place_state(read, mesh)
        found, _ = restore_for_inference(folder, abstract)
        assert jax.tree.structure(found) == jax.tree.structure(make())
        jax.tree.map(np.testing.assert_array_equal, found, make())
