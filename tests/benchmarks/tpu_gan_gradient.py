"""What a TPU's compiler says of the published generator's gradient through its discriminator.

    python tests/benchmarks/tpu_gan_gradient.py [--batch_size=5]

For one v5e chip in bfloat16, which need not be there; needs libtpu, see requirements.txt. Prints
one JSON line, `compile_check.describe`. Takes minutes.
"""

import argparse
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp

from covseg_jax.models.convolution import tracing_for
from covseg_jax.models.gan3d import Discriminator, Generator
from covseg_jax.stages import compile_check
from covseg_jax.training import sharding


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--batch_size', type=int, default=5)
    arguments = parser.parse_args()
    one_chip = compile_check.find_devices('v5e:1x1')
    placed = sharding.replicated(sharding.make_mesh(one_chip))

    def place(tree):
        return sharding.abstract(tree, placed)

    generator, discriminator = Generator(dtype=jnp.bfloat16), Discriminator(dtype=jnp.bfloat16)
    volume = place(jax.ShapeDtypeStruct((arguments.batch_size, 32, 128, 128, 1), jnp.float32))
    noise = place(jax.ShapeDtypeStruct(generator.noise_shape(volume.shape), jnp.float32))
    key = jax.random.key(0)
    params = place(jax.eval_shape(generator.init, key, volume, noise))
    d_params = place(jax.eval_shape(discriminator.init, key, volume))

    def loss(params, d_params, volume, noise):
        judged = discriminator.apply(d_params, generator.apply(params, volume, noise))
        return jnp.square(judged[:, 1] - 1).mean()

    compiled = jax.jit(jax.grad(loss)).lower(params, d_params, volume, noise).compile()
    print(json.dumps(compile_check.describe(compiled, compile_check.CHIPS['v5e'], 1)))


if __name__ == '__main__':
    with tracing_for('tpu'):
        main()
