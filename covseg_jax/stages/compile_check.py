"""Compiles a config's training steps for a TPU that is not there, and says what they would cost.

libtpu compiles ahead of time for a topology by name. What its compiler reports is trusted where
trials found it true: that the program fits or not, its peak memory, FLOPs, the program's text and
the `estimated_cycles` in it. It runs in a process of its own (`run_check`), because libtpu may take
the process with it when it fails.
"""

import collections
import dataclasses
import functools
import math
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Mapping
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import ml_collections

from covseg_jax.errors import InputError

_GIB = 1024**3


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip, which is one device, from Google Cloud's pages on its version."""

    memory_gib: float
    flops_per_s: float  # in bfloat16
    bytes_per_s: float
    cycles_per_s: float  # of the clock that the compiler's cycles are of
    link_bytes_per_s: float  # that it sends to others, over all its links


CHIPS = {
    'v4': Chip(32, 275e12, 1228e9, 1.05e9, 300e9),
    'v5e': Chip(16, 197e12, 819e9, 1.5e9, 200e9),
    'v5p': Chip(95, 459e12, 2765e9, 1.75e9, 600e9),
}
_COLLECTIVES = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute')
_BYTES = {'pred': 1, 's8': 1, 'u8': 1, 'bf16': 2, 'f16': 2, 's32': 4, 'u32': 4, 'f32': 4, 's64': 8}


def run_check(config: ml_collections.ConfigDict, topology: str) -> dict[str, dict[str, dict]]:
    """Compiles for a topology, such as 'v5e:2x4' or 'v4:2x2x1', every training step that the
    config's stages 'gan' and 'train' take, and what their trained networks are applied with. Batch
    sizes are global ones, as in training, or with compile_check.batch_per_device each device's.

    Returns:
      For each of the two stages that the config runs, and each of its programs by name (training
      steps by the losses that they minimise, then 'heal' or 'predict'), what `describe` gives, with
      'fits', the batch size and 'steps', how many of the training's steps it is; where it does not
      fit, 'largest_batch_size' that does (0: none).

    Raises:
      InputError: no such chip or topology, no libtpu, or the compiler ended the process.
    """
    chip = topology.split(':')[0]
    if chip not in CHIPS or ':' not in topology:
        raise InputError(
            f'compile_check.topology={topology!r}: name one as CHIP:SHAPE, such as v5e:2x4 or '
            f'v4:2x2x1; chips are {", ".join(CHIPS)}'
        )
    stages = ['train'] if config.gan.recipe == 'none' else ['gan', 'train']
    wanted = [stage for stage in stages if stage in config.stages.split(',')]
    if not wanted:
        raise InputError(
            f'compile_check: config.stages={config.stages!r} trains nothing; name gan or train'
        )
    found = {}
    for stage in wanted:
        with futures.ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:
            try:
                found[stage] = pool.submit(_check_stage, config, topology, stage).result()
            except BrokenProcessPool as error:
                raise InputError(
                    f'compile_check: the compiler for {topology} ended its process; try another '
                    'topology'
                ) from error
    return found


def find_devices(topology: str) -> list:
    """The devices of a TPU topology that need not be there, in a process that has not started JAX.

    Raises:
      InputError: no libtpu, or no such topology.
    """
    os.environ |= {
        'JAX_PLATFORMS': 'cpu',  # beside the compiler no accelerator is looked for
        'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
        'TPU_SKIP_MDS_QUERY': '1',
        'TF_CPP_MIN_LOG_LEVEL': '3',
        # libtpu complains where these are not set, whatever they say
        'TPU_ACCELERATOR_TYPE': 'v5litepod-1',
        'TPU_WORKER_HOSTNAMES': 'localhost',
    }
    # What is compiled for a machine that is not there cannot be loaded again.
    os.environ.pop('JAX_COMPILATION_CACHE_DIR', None)
    from jax.experimental import topologies

    sizes = topology.split(':')[1].split('x')
    options: dict[str, Any] = {}
    if topology.startswith('v4:'):
        # A chip's two cores as one device, as on Google's machines: libtpu makes two of them.
        options['chip_config_name'] = 'megacore'
    if len(sizes) <= 3 and all(size.isdigit() for size in sizes):
        shape = tuple(map(int, [*sizes, 1, 1][:3]))
        if math.prod(shape) < 4:  # less than a host's usual share of chips
            options['chips_per_host_bounds'] = shape
    try:
        return topologies.get_topology_desc(
            platform='tpu', topology_name=topology, **options
        ).devices
    except Exception as error:  # whatever libtpu and its loader have to say
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f'compile_check: {topology}: {text}; is libtpu installed (pip install '
            "'libtpu==0.0.42.*') and the topology one that exists?"
        ) from None


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function, and how to get the shapes of its arguments for a batch size."""

    function: Callable
    # Batch size -> shapes with shardings; an InputError for a size that cannot be split.
    arguments: Callable[[int], tuple]
    batch_size: int  # the config's
    least: int  # the size that others are multiples of
    steps: int = 0  # of the training


def _check_stage(config: ml_collections.ConfigDict, topology: str, stage: str) -> dict[str, dict]:
    """One stage's part of `run_check`, in a process of its own."""
    devices = find_devices(topology)
    from covseg_jax.models.convolution import tracing_for

    found = {}
    with tracing_for('tpu'):  # not for the machine that compiles
        for name, program in list_programs(config, devices, stage).items():
            print(f'compile_check: {stage}: compiling {name}', file=sys.stderr, flush=True)
            found[name] = {
                'topology': topology,
                'devices': len(devices),
                'batch_size': program.batch_size,
                'steps': program.steps,
                'compute_dtype': (config.gan if stage == 'gan' else config.train).compute_dtype,
                **_check_program(program, CHIPS[topology.split(':')[0]], len(devices)),
            }
    return found


def _check_program(program: Program, chip: Chip, devices: int) -> dict:
    compiled = _compile(program, program.batch_size)
    if compiled is not None:
        return {'fits': True, **describe(compiled, chip, devices)}
    largest = _largest_that(
        lambda size: _compile(program, size) is not None, program.batch_size, program.least
    )
    return {'fits': False, 'largest_batch_size': largest}


def list_programs(
    config: ml_collections.ConfigDict, devices: list, stage: str
) -> dict[str, Program]:
    """What the stage 'gan' or 'train' compiles: its training steps by their losses, and what the
    trained network is applied with. Nothing is computed."""
    import jax
    import jax.numpy as jnp

    from covseg_jax.gan.steps import make_heal
    from covseg_jax.gan.train import build_gan, check_gan_batch, choose_gan_step, gan_batch_shapes
    from covseg_jax.segmentation.network import make_predict
    from covseg_jax.segmentation.train import (
        build_segmentation,
        check_train_batch,
        choose_segmentation_step,
        segmentation_batch_shapes,
    )
    from covseg_jax.training import sharding

    mesh, one = sharding.make_mesh(devices), sharding.make_mesh(devices[:1])
    grid = config.prepare.grid
    if stage == 'gan':
        group, least, parts = config.gan, len(devices), build_gan(config, mesh)
        step_at = choose_gan_step(config, parts)
        check_batch, batch_shapes = check_gan_batch, gan_batch_shapes
        name, apply, apply_size = 'heal', make_heal(parts.generator), 1
        apply_shape, apply_key = grid, [jax.eval_shape(jax.random.key, 0)]
    else:
        group, parts = config.train, build_segmentation(config, mesh)
        least = max(2, len(devices)) * group.micro_batches
        step_at = choose_segmentation_step(config, parts)
        check_batch, batch_shapes = check_train_batch, segmentation_batch_shapes
        name, apply = 'predict', make_predict(parts.network, config.predict.output)
        apply_size, apply_shape, apply_key = config.predict.batch_size, grid[1:], []

    def of_step(batch_size: int) -> tuple:
        check_batch(config, batch_size, mesh)
        batch = sharding.abstract(batch_shapes(config, batch_size), sharding.split(mesh))
        return parts.abstract_state, batch

    def of_apply(batch_size: int) -> tuple:
        image = jax.ShapeDtypeStruct((batch_size, *apply_shape, 1), jnp.float32)
        arguments = (parts.abstract_state.ema, image, *apply_key)
        return sharding.abstract(arguments, sharding.replicated(one))

    size = group.batch_size * (len(devices) if config.compile_check.batch_per_device else 1)
    steps = collections.Counter(map(step_at, range(group.num_steps)))
    programs = {
        name_step(step, *of_step(size)): Program(step, of_step, size, least, count)
        for step, count in steps.items()
    }
    return programs | {name: Program(apply, of_apply, apply_size, 1)}


def name_step(step: Callable, state: Any, batch: Any) -> str:
    """A training step by the losses that it minimises, such as 'mse + sensitivity'."""
    import jax

    _, metrics = jax.eval_shape(step, state, batch)
    losses = [name.removeprefix('loss/') for name in metrics if name.startswith('loss/')]
    return ' + '.join(name for name in losses if name != 'total')


def _compile(program: Program, batch_size: int) -> Any:
    """The compiled program, None where it does not fit."""
    import jax

    try:
        return program.function.lower(*program.arguments(batch_size)).compile()
    except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' in str(error):
            return None
        raise


def _largest_that(fits: Callable[[int], bool], too_large: int, step: int) -> int:
    """The largest multiple of `step` below `too_large` that fits, by bisection; 0: none."""
    low, high = 0, -(-too_large // step)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * step) else (low, middle)
    return low * step


def describe(compiled: Any, chip: Chip, devices: int) -> dict:
    """What the compiler says of one chip's share of a program.

    Returns:
      peak_gib and memory_gib of the chip; gflops; gbytes that it reads and writes; estimated
      mcycles and ms; the floors arithmetic_ms, bytes_ms and links_ms (what the chip's units and
      links need at least for the FLOPs, the bytes and the collectives), and ratio, the estimate
      over the larger of the first two; ms, what a step is taken to last: the estimate, in which
      collectives have no cycles, and links_ms, as if nothing were computed meanwhile; collectives:
      kind -> {count, bytes}.
    """
    costs = compiled.cost_analysis() or {}
    text = compiled.as_text()
    flops, moved = float(costs.get('flops', 0)), float(costs.get('bytes accessed', 0))
    cycles = sum_estimated_cycles(text)
    arithmetic_ms, bytes_ms = 1e3 * flops / chip.flops_per_s, 1e3 * moved / chip.bytes_per_s
    ms = 1e3 * cycles / chip.cycles_per_s
    collectives = count_collectives(text)
    links_ms = 1e3 * sum_link_bytes(collectives, devices) / chip.link_bytes_per_s
    return {
        'peak_gib': round(compiled.memory_analysis().peak_memory_in_bytes / _GIB, 3),
        'memory_gib': chip.memory_gib,
        'gflops': round(flops / 1e9, 2),
        'gbytes': round(moved / 1e9, 3),
        'estimated_mcycles': round(cycles / 1e6, 3),
        'estimated_ms': round(ms, 2),
        'arithmetic_ms': round(arithmetic_ms, 2),
        'bytes_ms': round(bytes_ms, 2),
        'ratio': round(ms / max(arithmetic_ms, bytes_ms, 1e-9), 2),
        'links_ms': round(links_ms, 3),
        'ms': round(ms + links_ms, 3),
        'collectives': collectives,
    }


def sum_link_bytes(collectives: Mapping[str, Mapping[str, int]], devices: int) -> float:
    """The bytes that a device has to send for collectives of n: 2 (n - 1) / n of an all-reduce's
    (Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms for clusters of workstations,
    2009), and half of that of another's result."""
    share = (devices - 1) / devices
    return sum(
        each['bytes'] * share * (2 if kind == 'all-reduce' else 1)
        for kind, each in collectives.items()
    )


_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) [^\n]*\{\n(.*?)^\}', re.MULTILINE | re.DOTALL)


def sum_estimated_cycles(text: str) -> int:
    """The compiler's cycles of a whole program: loops count as often as they turn, and of the
    branches of a condition the dearest does."""
    computations, entries = {}, []
    for entry, name, lines in _COMPUTATION.findall(text):
        computations[name] = lines.splitlines()
        if entry:
            entries.append(name)

    @functools.cache
    def cycles_of(name: str) -> int:
        return sum(map(cycles_of_line, computations.get(name, [])))

    def cycles_of_line(line: str) -> int:
        own = re.search(r'"estimated_cycles":"(\d+)"', line)
        if own:
            return int(own.group(1))
        loop = re.search(r' while\(.*body=%?([\w.\-]+)', line)
        if loop:
            turns = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
            return cycles_of(loop.group(1)) * (int(turns.group(1)) if turns else 1)
        if ' conditional(' in line:
            branches = re.search(r'branch_computations=\{([^}]*)\}', line)
            names = branches.group(1) if branches else ''
            names += ','.join(re.findall(r'(?:true|false)_computation=(%?[\w.\-]+)', line))
            called = [each.strip().lstrip('%') for each in names.split(',') if each.strip()]
            return max(map(cycles_of, called), default=0)
        called = re.search(r' call\(.*to_apply=%?([\w.\-]+)', line)
        return cycles_of(called.group(1)) if called else 0

    return sum(map(cycles_of, entries))


def count_collectives(text: str) -> dict[str, dict[str, int]]:
    """Kind -> how many, and the bytes that their results hold, in a compiled program's text."""
    found: dict[str, dict[str, int]] = {}
    instruction = re.compile(r'^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([\w\-]+)\(', re.MULTILINE)
    for results, operation in instruction.findall(text):
        kind = operation.removesuffix('-start')
        if kind in _COLLECTIVES:
            entry = found.setdefault(kind, {'count': 0, 'bytes': 0})
            entry['count'] += 1
            entry['bytes'] += sum(
                math.prod(int(size) for size in sizes.split(',') if size) * _BYTES.get(dtype, 4)
                for dtype, sizes in re.findall(r'(\w+)\[([\d,]*)\]', results)
            )
    return found
