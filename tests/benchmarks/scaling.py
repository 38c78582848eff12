"""What one device's share of the training step is on 1, 2, 4 and 8 simulated devices.

    python tests/benchmarks/scaling.py [--variant=phantom_gan] [--batch_size=4]

Compiles the config's combined TransUNet step with --batch_size slices a device on simulated CPU
devices, and prints one JSON line for each number of them: the gradient's share of the all-reduces,
their count and MB, the bytes that a device reads and writes, and its peak memory.
"""

import argparse
import json
import os
import pathlib
import sys

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))
os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=8'
os.environ['JAX_PLATFORMS'] = 'cpu'

import jax  # noqa: E402

from configs import transunet  # noqa: E402
from covseg_jax.segmentation.train import (  # noqa: E402
    build_segmentation,
    choose_segmentation_step,
    segmentation_batch_shapes,
)
from covseg_jax.stages.compile_check import count_collectives  # noqa: E402
from covseg_jax.training import sharding  # noqa: E402


def main() -> None:
    """Compiles and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--variant', default='phantom_gan', help='of configs/transunet.py')
    parser.add_argument('--batch_size', type=int, default=4, help='slices a device')
    arguments = parser.parse_args()
    config = transunet.get_config(arguments.variant).unlock()
    config.train.mode = 'combined'
    for count in (1, 2, 4, 8):
        mesh = sharding.make_mesh(jax.devices()[:count])
        parts = build_segmentation(config, mesh)
        step = choose_segmentation_step(config, parts)(0)
        shapes = segmentation_batch_shapes(config, arguments.batch_size * count)
        batch = sharding.abstract(shapes, sharding.split(mesh))
        compiled = step.lower(parts.abstract_state, batch).compile()
        collectives = count_collectives(compiled.as_text())
        gradient_bytes = sum(4 * leaf.size for leaf in jax.tree.leaves(parts.abstract_state.params))
        print(
            json.dumps(
                {
                    'devices': count,
                    'gradient_mb': round(gradient_bytes / 1e6, 2),
                    'collectives': {
                        kind: {'count': each['count'], 'mb': round(each['bytes'] / 1e6, 2)}
                        for kind, each in collectives.items()
                    },
                    'gbytes_a_device': round(
                        compiled.cost_analysis().get('bytes accessed', 0) / 1e9, 3
                    ),
                    'peak_mb_a_device': round(
                        compiled.memory_analysis().peak_memory_in_bytes / 1e6, 1
                    ),
                }
            ),
            flush=True,
        )


if __name__ == '__main__':
    main()
