"""The lung network's run: phantoms made, trained on, and its weights as one file."""

import pathlib

import jax
import ml_collections
import numpy as np

from covseg_jax import atomic, hosts
from covseg_jax.data.feeds import IMAGE, LUNGS
from covseg_jax.data.opacities import OpacityModel
from covseg_jax.data.streams import stream_key, stream_seed
from covseg_jax.lungs.slices import Scans, make_scans, slice_feed
from covseg_jax.lungs.steps import LungParts, LungState, make_lung_evaluation, make_lung_step
from covseg_jax.models.unet import UNet
from covseg_jax.prepare.lung_network import FILE, PATCH, WINDOW_HU, LungNetwork, save_network
from covseg_jax.training import loop, sharding
from covseg_jax.training.flat import unflatten
from covseg_jax.training.logging import image_strip
from covseg_jax.training.optim import make_adam
from covseg_jax.training.parts import make_learning_rate

_BATCH_NORM_EPSILON = 1e-5  # models/layers.py: BatchNorm
_VALIDATION_BATCHES = 4


def build_lungs(
    config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh | None = None
) -> LungParts:
    """Network and optimizer, on all devices or the given mesh; nothing is computed yet.

    Raises:
      InputError: the schedule is not one that exists.
    """
    lungs = config.lungs
    learning_rate = make_learning_rate('lungs', lungs, [lungs.num_steps])
    return LungParts(
        seed=config.seed,
        mesh=mesh or sharding.make_mesh(),
        learning_rate=learning_rate,
        network=UNet(widths=tuple(lungs.widths), num_classes=PATCH**2),
        optimizer=make_adam(learning_rate, clip_norm=lungs.clip_norm),
        opacities=OpacityModel(window_hu=WINDOW_HU, **{**config.opacities, **lungs.opacities}),
        lobes=OpacityModel(window_hu=WINDOW_HU, **{**config.opacities, **lungs.lobes}),
        lobe_share=lungs.lobe_share,
    )


def train_lungs(
    config: ml_collections.ConfigDict, folder: pathlib.Path, num_workers: int
) -> pathlib.Path:
    """Trains the network, from the newest checkpoint in `folder` where there is one, and writes
    `folder`/lung_network.safetensors, which it returns.

    Raises:
      InputError: batch size and devices do not fit, or the loss is not finite.
      Stopped: asked to stop; saved.
    """
    lungs = config.lungs
    parts = build_lungs(config)
    sharding.check_batch_size(lungs.batch_size, parts.mesh, 'lungs.batch_size')
    phantoms = folder / 'phantoms'
    make = {'num_workers': num_workers}
    seed = stream_seed(config.seed, 'lungs')
    scans = make_scans(phantoms, lungs.num_phantoms, seed, **make)
    held_out = make_scans(phantoms, lungs.num_validation, stream_seed(seed, 'validation'), **make)
    step = make_lung_step(parts, ema_decay=lungs.ema_decay)
    state = loop.run(
        name='lungs',
        folder=folder,
        state=parts.make_state(),
        abstract_state=parts.abstract_state,
        feed=slice_feed(
            scans,
            batch_size=lungs.batch_size,
            seed=seed,
            host=hosts.index(),
            num_hosts=hosts.count(),
        ),
        step_at=lambda number: step,
        evaluate=_make_evaluation(parts, held_out, lungs.batch_size),
        schedule=loop.Schedule.of(lungs),
    )
    path = folder / FILE
    averaged = unflatten(jax.device_get(state.ema))
    network = fold_batch_norm(averaged['params'], averaged['batch_stats'])
    if hosts.is_first():
        with atomic.new_file(path) as temporary:
            temporary.write_bytes(save_network(network))
    return path


def fold_batch_norm(params: dict, batch_stats: dict) -> LungNetwork:
    """A trained UNet's variables as the convolutions that give what it gives."""
    num_levels = sum(name.endswith('first_conv') for name in params) // 2
    levels = range(1, num_levels + 1)
    names = [f'encoder_{level}' for level in levels]
    names += ['bottleneck', *(f'decoder_{level}' for level in reversed(levels))]
    convolutions = []
    for name in (f'{name}_{part}' for name in names for part in ('first', 'second')):
        norm, found = params[f'{name}_norm'], batch_stats[f'{name}_norm']
        factor = np.asarray(norm['scale'] / np.sqrt(found['var'] + _BATCH_NORM_EPSILON))
        kernel = np.asarray(params[f'{name}_conv']['kernel']) * factor
        convolutions.append((kernel, np.asarray(norm['bias'] - found['mean'] * factor)))
    head = params['head']
    convolutions.append((np.asarray(head['kernel']), np.asarray(head['bias'])))
    return LungNetwork(tuple(convolutions))


def _make_evaluation(parts: LungParts, held_out: Scans, batch_size: int) -> loop.Evaluate:
    """Validation on phantoms that are not trained on, changed in the same way each time."""
    evaluate_step = make_lung_evaluation(parts)
    count = _VALIDATION_BATCHES * batch_size
    chosen = [held_out[i] for i in np.linspace(0, len(held_out) - 1, count).astype(int)]
    rows = [held_out.take(each['scan'], each['z'], 2) for each in chosen]

    def evaluate(state: LungState):
        collected, pictures = [], []
        for number in range(_VALIDATION_BATCHES):
            some = rows[number::_VALIDATION_BATCHES]  # of every scan
            batch = {name: np.stack([row[name] for row in some]) for name in (IMAGE, LUNGS)}
            key = stream_key(parts.seed, 'lungs', 'validation', number)
            metrics, seen = evaluate_step(state.ema, batch, key)
            collected.append(metrics)
            pictures.append([np.asarray(each)[len(some) // 2] for each in seen])
        return state, loop.mean_metrics(collected), {'slice_lungs_found': image_strip(pictures)}

    return evaluate
