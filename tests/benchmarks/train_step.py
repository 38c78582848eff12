"""Times the networks on this machine, alone or in turns with the same networks in PyTorch.

    python tests/benchmarks/train_step.py --model=transunet|gan3d --mode=train|forward
        [--variant=mosmed] [--batch_size=4] [--dtype=float32] [--repeats=5] [--peer=torch]

transunet is the config's network at its image size, in training the real combined step (MSE +
sensitivity-enhanced BCE, in most variants + contrastive, clipped Adam, averaged weights). gan3d is
the config's generator, in training its adversarial step, or with --mode=reconstruct the step
without discriminator; of --variant=published a whole published iteration (reconstruction,
discriminator, adversarial). Opacities and corrupting noise are made in our step, the peer gets
them ready-made. Prints one JSON line: `compile_s` is what making ours took, tracing and compiling
included, the first call of each side is not counted, and `flops` are the compiler's count of ours.
On a GPU both sides run there, in float32 with TF32 products, as JAX does of itself. PyTorch is no
requirement: `pip install torch`.
"""

import argparse
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from covseg_jax import cpu  # noqa: E402

if __name__ == '__main__':
    cpu.tune_process()  # as `covseg_jax.main` does

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from configs import gan3d, transunet  # noqa: E402
from covseg_jax.data.feeds import COVID, COVID_LUNGS, IMAGE, LABEL, LUNGS, TARGET  # noqa: E402
from covseg_jax.gan.steps import make_heal  # noqa: E402
from covseg_jax.gan.train import build_gan, choose_gan_step  # noqa: E402
from covseg_jax.segmentation.network import make_predict  # noqa: E402
from covseg_jax.segmentation.train import (  # noqa: E402
    build_segmentation,
    choose_segmentation_step,
)
from tests.benchmarks.turns import take_turns  # noqa: E402

Work = tuple[Callable[[], None], float]  # one call, and its FLOPs


def _flops(compiled: jax.stages.Compiled) -> float:
    return float((compiled.cost_analysis() or {}).get('flops', float('nan')))


def _transunet_config(arguments: argparse.Namespace):
    config = transunet.get_config(arguments.variant)
    with config.unlocked():
        config.train.compute_dtype = arguments.dtype
        config.train.mode = 'combined'
        config.train.batch_size = arguments.batch_size
        config.train.synthetic_share, config.train.augment.enabled = 0.0, False  # the network alone
    return config


def transunet_work(arguments: argparse.Namespace) -> Work:
    config = _transunet_config(arguments)
    parts = build_segmentation(config)
    rng = np.random.default_rng(0)
    shape = (arguments.batch_size, *config.prepare.grid[1:], 1)
    image = jnp.asarray(rng.random(shape, np.float32))
    state = parts.make_state()
    if arguments.mode == 'forward':
        variables = jax.device_put(state.ema)
        predict = make_predict(parts.network).lower(variables, image).compile()
        return lambda: jax.block_until_ready(predict(variables, image)), _flops(predict)
    batch = {
        IMAGE: image,
        TARGET: jnp.asarray(rng.random(shape) > 0.9, jnp.float32),
        LUNGS: jnp.ones(shape),
        LABEL: jnp.arange(arguments.batch_size, dtype=jnp.int32) % 2,
    }
    return _stateful(choose_segmentation_step(config, parts)(0), state, batch)


def _gan_config(arguments: argparse.Namespace):
    config = gan3d.get_config(arguments.variant)
    with config.unlocked():
        config.gan.batch_size = arguments.batch_size
        config.gan.compute_dtype = arguments.dtype
    return config


def gan_work(arguments: argparse.Namespace) -> Work:
    config = _gan_config(arguments)
    parts = build_gan(config)
    rng = np.random.default_rng(0)
    shape = (arguments.batch_size, *parts.volume_size, 1)
    volume = jnp.asarray(rng.random(shape, np.float32))
    state = parts.make_state()
    if arguments.mode == 'forward':
        key = jax.random.key(0)
        forward = make_heal(parts.generator).lower(state.ema, volume, key).compile()
        return lambda: jax.block_until_ready(forward(state.ema, volume, key)), _flops(forward)
    lungs = jnp.ones(shape)
    batch = {IMAGE: volume, COVID: volume[:, ::-1], LUNGS: lungs, COVID_LUNGS: lungs}
    if config.gan.recipe == 'published':
        batch = {name: batch[name] for name in (IMAGE, COVID)}
    number = 0 if arguments.mode == 'train' else 1  # of a step with and without discriminator
    with config.unlocked():
        config.gan.adversarial_every = 2
    return _stateful(choose_gan_step(config, parts)(number), state, batch)


def _stateful(step: Callable, state, batch: dict) -> Work:
    compiled = step.lower(state, batch).compile()

    def run() -> None:
        nonlocal state
        state, _ = compiled(state, batch)
        jax.block_until_ready(state)

    return run, _flops(compiled)


def torch_work(arguments: argparse.Namespace) -> Callable[[], None]:
    import torch

    from tests.benchmarks import torch_peers

    torch.set_num_threads(cpu.count_cores())
    on_gpu = jax.default_backend() == 'gpu'
    if on_gpu:
        torch.set_default_device('cuda')
        torch.set_float32_matmul_precision('high')
        torch.backends.cudnn.benchmark = True
    make = _torch_gan if arguments.model == 'gan3d' else _torch_transunet
    run = make(torch_peers, arguments)
    dtype = getattr(torch, arguments.dtype)
    lower = dtype != torch.float32

    def timed() -> None:
        with torch.autocast('cuda' if on_gpu else 'cpu', dtype if lower else None, lower):
            run()
        if on_gpu:
            torch.cuda.synchronize()

    return timed


def _torch_gan(peers, arguments: argparse.Namespace) -> Callable[[], None]:
    config = _gan_config(arguments)
    batch_size, shape = arguments.batch_size, (config.gan.depth, *config.prepare.grid[1:])
    of = config.gan.generator
    fields = {
        'filters': tuple(of.filters),
        'bottleneck': of.bottleneck_filters,
        'patch': of.patch,
        'norm': of.use_norm,
        'head': of.head,
    }
    if arguments.mode == 'forward':
        return peers.gan_forward(batch_size, shape, fields)
    if config.gan.recipe == 'published':
        return peers.gan_iteration(batch_size, shape)
    filters, adversarial = tuple(config.gan.discriminator.filters), arguments.mode == 'train'
    return peers.default_gan_step(batch_size, shape, fields, filters, adversarial)


def _torch_transunet(peers, arguments: argparse.Namespace) -> Callable[[], None]:
    config = _transunet_config(arguments)
    network = config.network
    fields = {
        'width': network.width,
        'final_width': network.final_width,
        'num_heads': network.num_heads,
        'mlp_dim': network.mlp_dim,
        'num_blocks': network.num_blocks,
        'dropout': network.dropout_rate,
    }
    size = config.prepare.grid[-1]
    if arguments.mode == 'forward':
        return peers.transunet_forward(arguments.batch_size, fields, size)
    return peers.transunet_step(
        arguments.batch_size,
        fields,
        size,
        config.train.projection_dim,
        config.train.losses.contrastive,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--model', choices=('transunet', 'gan3d'), default='transunet')
    parser.add_argument('--mode', choices=('train', 'reconstruct', 'forward'), default='train')
    parser.add_argument('--batch_size', type=int, default=4)
    parser.add_argument('--variant', default='mosmed', help='of the configs')
    parser.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32')
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--peer', choices=('torch',))
    arguments = parser.parse_args()
    started = time.monotonic()
    work, flops = (gan_work if arguments.model == 'gan3d' else transunet_work)(arguments)
    compile_s = time.monotonic() - started
    sides = {'ours': work} | ({'peer': torch_work(arguments)} if arguments.peer else {})
    seconds = list(take_turns(sides, arguments.repeats, rest_s=0.2).values())
    medians = [statistics.median(each) for each in seconds]
    found = {
        'device': jax.devices()[0].device_kind,
        'median_s': round(medians[0], 4),
        'runs': arguments.repeats,
        'batch_size': arguments.batch_size,
        'compile_s': round(compile_s, 1),
        'flops': flops,
        'gflops_per_s': round(flops / medians[0] / 1e9, 1),
    }
    if arguments.peer:
        found |= {
            'peer_median_s': round(medians[1], 4),
            'ratio': round(medians[0] / medians[1], 3),
            'ratios': [round(a / b, 3) for a, b in zip(*seconds, strict=True)],
        }
    print(json.dumps(found))


if __name__ == '__main__':
    main()
