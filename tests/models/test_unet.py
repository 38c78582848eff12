"""The baseline: shapes, refusal of other sizes, and one batch on eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from covseg_jax.models.unet import UNet
from covseg_jax.training import losses


def test_unet_gives_logits_and_bottleneck_features():
    model = UNet(widths=(2, 4, 8))
    image = jax.random.uniform(jax.random.key(0), (2, 8, 12, 1))
    variables = jax.jit(model.init)(jax.random.key(1), image)
    output = jax.jit(model.apply)(variables, image)
    assert output.logits.shape == (2, 8, 12, 1)
    assert output.features.shape == (2, 8)
    # 3×3 kernels 1→2→2→4→4→8→8, 12→4→4, 6→2→2, two numbers a BatchNorm channel, head 2 + 1
    kernels = 9 * (2 + 4 + 8 + 16 + 32 + 64 + 48 + 16 + 12 + 4)
    scales = 2 * (2 + 2 + 4 + 4 + 8 + 8 + 4 + 4 + 2 + 2)
    count = sum(leaf.size for leaf in jax.tree.leaves(variables['params']))
    assert count == kernels + scales + 3
    with pytest.raises(ValueError, match='multiples of 4'):
        jax.eval_shape(model.apply, variables, jnp.ones((1, 10, 12, 1)))


def test_batch_over_eight_devices_equals_one_device():
    model = UNet(widths=(2, 4))
    generator = np.random.default_rng(0)
    image = generator.uniform(size=(8, 8, 8, 1)).astype(np.float32)
    target = (generator.uniform(size=image.shape) > 0.7).astype(np.float32)
    labels = np.arange(8) % 2
    variables = jax.jit(model.init)(jax.random.key(0), image)

    @jax.jit
    def step(variables, image, target, labels):
        def total(params):
            output, updated = model.apply(
                {**variables, 'params': params}, image, train=True, mutable=['batch_stats']
            )
            loss = losses.contrastive_loss(output.features, labels, temperature=0.1)
            loss += losses.sensitivity_loss(output.logits, target, beta=2.0)
            return loss + losses.mse_loss(output.logits, target), updated

        return jax.value_and_grad(total, has_aux=True)(variables['params'])

    mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
    sharded = [jax.device_put(array, rows) for array in (image, target, labels)]
    expected = jax.tree.leaves(step(variables, image, target, labels))
    for actual, one in zip(jax.tree.leaves(step(variables, *sharded)), expected, strict=True):
        np.testing.assert_allclose(actual, one, atol=1e-5)
