"""The lung network's compiled steps: consolidation is painted into lungs, whole slices are changed,
and the network learns to give the lungs back."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from covseg_jax.data.feeds import IMAGE, LUNGS
from covseg_jax.data.opacities import OpacityModel, add_opacities
from covseg_jax.data.streams import stream_key
from covseg_jax.models.unet import UNet
from covseg_jax.prepare.lung_network import PATCH, SIZE, WINDOW_HU, to_channels, to_pixels
from covseg_jax.training.flat import Flat, flatten_as, unflatten
from covseg_jax.training.optim import minimise, update_ema
from covseg_jax.training.parts import Parts
from covseg_jax.training.step import compile_step

NUM_SLICES = 3  # the slice and its neighbours
_DICE_WEIGHT = 0.3  # beside binary cross-entropy: few pixels of a slice at the apex are lung


@struct.dataclass
class LungState:
    """State of the training; `ema` averages 'params' and 'batch_stats'."""

    step: jax.Array
    params: Flat | Any
    batch_stats: Flat | Any
    opt_state: Any
    ema: dict[str, Flat | Any]
    key: jax.Array


@dataclasses.dataclass(frozen=True)
class LungParts(Parts):
    """What a config's `lungs` group describes."""

    network: UNet  # maps patches of pixels as channels to logits of the same patches
    optimizer: optax.GradientTransformation
    # Of the window of the lung network: what is painted into most samples, and into `lobe_share`.
    opacities: OpacityModel
    lobes: OpacityModel
    lobe_share: float

    def init_state(self) -> LungState:
        network_key, steps_key = jax.random.split(stream_key(self.seed, 'lungs'))
        side = SIZE // PATCH
        image = jnp.zeros((1, side, side, PATCH**2 * NUM_SLICES))
        variables = self.network.init(network_key, image)
        averaged = {name: self.to_hold(variables[name]) for name in ('params', 'batch_stats')}
        return LungState(
            step=jnp.zeros((), jnp.int32),
            params=averaged['params'],
            batch_stats=averaged['batch_stats'],
            opt_state=self.optimizer.init(averaged['params']),
            ema=averaged,
            key=jax.random.key_data(steps_key),
        )


def make_lung_step(
    parts: LungParts, *, ema_decay: float
) -> Callable[[LungState, dict], tuple[LungState, dict]]:
    """A jitted (state, batch) -> (state, metrics); the state is donated. The batch has IMAGE and
    LUNGS (B, S, S, 3), S at least SIZE."""

    def loss(params: Any, batch_stats: Any, image: jax.Array, lungs: jax.Array):
        logits, updated = _apply(parts.network, params, batch_stats, image)
        cross_entropy = optax.sigmoid_binary_cross_entropy(logits, lungs).mean()
        overlap = 1 - _dice(jax.nn.sigmoid(logits), lungs)
        values = {'cross_entropy': cross_entropy, 'overlap': overlap}
        return cross_entropy + _DICE_WEIGHT * overlap, (values, updated['batch_stats'])

    def step(state: LungState, batch: dict, key: jax.Array) -> tuple[LungState, dict]:
        paint_key, tissue_key, change_key = jax.random.split(key, 3)
        image = vary_tissue(tissue_key, batch[IMAGE], batch[LUNGS])
        image = paint_consolidation(paint_key, image, batch[LUNGS], parts)
        image, lungs = change_slices(change_key, image, batch[LUNGS][..., NUM_SLICES // 2])
        arguments = (unflatten(state.batch_stats), image, lungs)
        found, params, opt_state, norm = minimise(
            loss, parts.optimizer, state.params, state.opt_state, *arguments
        )
        total, (values, batch_stats) = found
        batch_stats = flatten_as(batch_stats, state.batch_stats)
        averaged = {'params': params, 'batch_stats': batch_stats}
        state = state.replace(
            params=params,
            batch_stats=batch_stats,
            opt_state=opt_state,
            ema=update_ema(state.ema, averaged, state.step, ema_decay),
        )
        return state, {f'loss/{name}': value for name, value in values.items()} | {
            'loss/total': total,
            'optimizer/gradient_norm': norm,
            'optimizer/learning_rate': parts.learning_rate(state.step),
        }

    return compile_step(step)


def make_lung_evaluation(parts: LungParts) -> Callable[[Any, dict, jax.Array], tuple[dict, Any]]:
    """A jitted (ema, batch, key) -> (sum, count) pairs, and (image, lungs, probability), each
    (B, SIZE, SIZE): slices changed as in training.

    'dice' is of the lungs; 'missed' the share of their pixels that is not found, 'added' what is
    found outside of them, as a share of them."""

    @jax.jit
    def evaluate(ema: Any, batch: dict, key: jax.Array):
        paint_key, change_key = jax.random.split(key)
        image = paint_consolidation(paint_key, batch[IMAGE], batch[LUNGS], parts)
        image, lungs = change_slices(change_key, image, batch[LUNGS][..., NUM_SLICES // 2])
        averaged = unflatten(ema)
        logits, _ = _apply(
            parts.network, averaged['params'], averaged['batch_stats'], image, train=False
        )
        found = (logits > 0).astype(jnp.float32)
        area = lungs.sum()
        return {
            'dice': (_dice(found, lungs), 1.0),
            'missed': (((1 - found) * lungs).sum(), area),
            'added': ((found * (1 - lungs)).sum(), area),
        }, (image[..., NUM_SLICES // 2], lungs, jax.nn.sigmoid(logits))

    return evaluate


def _apply(network: UNet, params: Any, batch_stats: Any, image: jax.Array, train: bool = True):
    """(B, SIZE, SIZE, 3) → logits (B, SIZE, SIZE), and what changed in training."""
    variables = {'params': params, 'batch_stats': batch_stats}
    output, updated = network.apply(
        variables, to_channels(image), train=train, mutable=['batch_stats']
    )
    return to_pixels(output.logits), updated


def _dice(found: jax.Array, truth: jax.Array) -> jax.Array:
    return (2 * (found * truth).sum() + 1) / (found.sum() + truth.sum() + 1)


def paint_consolidation(
    key: jax.Array, image: jax.Array, lungs: jax.Array, parts: LungParts
) -> jax.Array:
    """Opacities in the lungs of neighbouring slices, (B, S, S, 3) each, as one volume: patches in
    most samples, in the last `lobe_share` of them whole lobes, whose airways stay open."""
    volume, inside = (jnp.moveaxis(each, -1, 1)[..., None] for each in (image, lungs))
    patches_key, lobes_key = jax.random.split(key)
    first = image.shape[0] - round(parts.lobe_share * image.shape[0])
    patches, _ = add_opacities(patches_key, volume[:first], inside[:first], parts.opacities)
    lobes, _ = add_opacities(lobes_key, volume[first:], inside[first:], parts.lobes)
    lobes = jnp.where(volume[first:] < _AIRWAY, volume[first:], lobes)
    return jnp.moveaxis(jnp.concatenate([patches, lobes])[..., 0], 1, -1)


# --- what any slice may go through on its way to the network. Scans come in fields of view of all
# sizes, cropped, turned a little, in circles, and padded with whatever their maker chose

_SAME_SLICES = 0.25  # of the samples: their neighbours are the slice itself, as in a scan of one
_CLOSE = 0.3  # cropped to the lungs and up to 40 % more
_ZOOM = (-0.3, 0.35)  # logarithm of the others' field of view, over that of the source
_TURN = 0.1  # radians, standard deviation
_STRETCH, _SHIFT = 0.06, 0.05  # standard deviations; of the source's side
_CIRCLE = 0.25  # are seen in a circle alone
_BEND = 5.0  # pixels of the source, standard deviation at most, of a smooth field
_BEND_NODES = 7  # of that field, a side
_CROP, _CROP_MARGIN = 0.2, (-0.02, 0.15)  # are cut to the lungs' box, and these shares of it around
_GAIN, _BIAS, _NOISE = 0.06, 0.03, 0.07  # image values; the last at most
_CLIP, _CLIP_AT = 0.25, (0.76, 1.0)  # come from pictures whose window ends at soft tissue
_TISSUE, _TISSUE_NODES = (0.05, 0.08), 12  # image values at most of `vary_tissue`'s two fields
_AERATED = (-320 - WINDOW_HU[0]) / (WINDOW_HU[1] - WINDOW_HU[0])
_AIRWAY = (-950 - WINDOW_HU[0]) / (WINDOW_HU[1] - WINDOW_HU[0])
_SOFT_TISSUE = (40 - WINDOW_HU[0]) / (WINDOW_HU[1] - WINDOW_HU[0])
_FILLS = (0.0, _SOFT_TISSUE, 1.0)  # beyond the field of view
_FILL_SHARES = (0.65, 0.28, 0.07)


def change_slices(
    key: jax.Array, image: jax.Array, lungs: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Crops, zooms, turns, mirrors, pads, and changes brightness, contrast and noise.

    Args:
      key: PRNG key.
      image: (B, S, S, 3) in [0, 1].
      lungs: (B, S, S), 1 inside.

    Returns:
      image (B, SIZE, SIZE, 3) in [0, 1] and lungs (B, SIZE, SIZE), 0 or 1, none beyond the field of
      view.
    """
    num = image.shape[0]
    keys = iter(jax.random.split(key, 26))

    def uniform(low: float = 0.0, high: float = 1.0) -> jax.Array:
        return jax.random.uniform(next(keys), (num,), minval=low, maxval=high)

    def normal(deviation: float) -> jax.Array:
        return deviation * jax.random.normal(next(keys), (num,))

    def each(values: jax.Array) -> jax.Array:
        return values[:, None, None, None]

    same = jnp.repeat(image[..., 1:2], NUM_SLICES, axis=-1)
    image = jnp.where(each(uniform() < _SAME_SLICES), same, image)
    middle, extent = _frame(lungs)
    close = uniform() < _CLOSE
    side = image.shape[1]
    extent = jnp.where(close, extent * uniform(1.02, 1.4), side * jnp.exp(uniform(*_ZOOM)))
    jitter = jnp.stack([normal(_SHIFT * side), normal(_SHIFT * side)], axis=1)
    middle = jnp.where(close[:, None], middle, (side - 1) / 2 + jitter)
    turn, stretch = normal(_TURN), jnp.exp(normal(_STRETCH))
    mirror = jnp.where(uniform() < 0.5, -1.0, 1.0)
    rows, columns = _source_pixels(middle, extent, turn, stretch, mirror)
    bend = each(uniform(0, _BEND)) * _smooth_fields(next(keys), num, _BEND_NODES)
    rows, columns = rows + bend[..., 0], columns + bend[..., 1]
    layers = jnp.concatenate([image, lungs[..., None]], axis=-1)
    moved = jax.vmap(_sample)(layers, rows, columns)
    image, lungs = moved[..., :NUM_SLICES], moved[..., NUM_SLICES]

    beyond = (rows < 0) | (rows > side - 1) | (columns < 0) | (columns > side - 1)
    at = jnp.arange(SIZE) - (SIZE - 1) / 2
    radius = jnp.where(uniform() < _CIRCLE, uniform(0.44, 0.5), 1.0) * SIZE
    beyond |= jnp.hypot(at[:, None], at) > radius[:, None, None]
    margins = jax.random.uniform(
        next(keys), (num, 4), minval=_CROP_MARGIN[0], maxval=_CROP_MARGIN[1]
    )
    beyond |= (uniform() < _CROP)[:, None, None] & _outside_box(lungs, margins)
    top = jnp.where(uniform() < _CLIP, uniform(*_CLIP_AT), 1.0)
    image = jnp.minimum(image, each(top))
    noise = jax.random.normal(next(keys), (image.size,)).reshape(image.shape)
    image = image * each(1 + normal(_GAIN)) + each(normal(_BIAS)) + noise * each(uniform(0, _NOISE))
    fill = jax.random.choice(next(keys), jnp.array(_FILLS), (num,), p=jnp.array(_FILL_SHARES))
    image = jnp.where(beyond[..., None], each(fill), jnp.clip(image, 0, 1))
    return image, jnp.where(beyond, 0.0, (lungs > 0.5).astype(jnp.float32))


def vary_tissue(key: jax.Array, image: jax.Array, lungs: jax.Array) -> jax.Array:
    """Soft tissue beside the lungs, (B, S, S, 3) each, with smooth differences of density: real
    muscle, fat and organs are less even than a phantom's."""
    num = image.shape[0]
    field_key, strength_key = jax.random.split(key)
    field = _smooth_fields(field_key, num, _TISSUE_NODES, side=image.shape[1])
    strength = jax.random.uniform(strength_key, (num, 1, 1, 2), maxval=jnp.array(_TISSUE))
    # The first field is a slight change everywhere, the second one's heights are fat.
    change = strength * jnp.stack([field[..., 0], -jnp.maximum(field[..., 1] - 1, 0)], axis=-1)
    is_tissue = jnp.clip((image - _AERATED) / 0.1, 0, 1) * (1 - lungs)
    return image + is_tissue * change.sum(-1, keepdims=True)


def _smooth_fields(key: jax.Array, num: int, nodes: int, side: int = SIZE) -> jax.Array:
    """Two random fields a sample, (num, side, side, 2), of variance near 1."""
    coarse = jax.random.normal(key, (num * nodes * nodes * 2,)).reshape(num, nodes, nodes, 2)
    return jax.image.resize(coarse, (num, side, side, 2), 'cubic')


def _outside_box(lungs: jax.Array, margins: jax.Array) -> jax.Array:
    """(B, S, S): beyond the box of the lungs, (B, S, S), and `margins` (B, 4) of its sides around
    it; nothing where there is no lung."""
    at = jnp.arange(lungs.shape[1])
    outside = jnp.zeros(lungs.shape, bool)
    for axis, (before, after) in ((2, margins[:, :2].T), (1, margins[:, 2:].T)):
        first, last = _ends(lungs, axis)
        length = last - first
        is_out = (at < (first - before * length)[:, None]) | (at > (last + after * length)[:, None])
        is_out &= (last >= 0)[:, None]
        outside |= jnp.expand_dims(is_out, axis)
    return outside


def _ends(lungs: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """The first and the last row, or column, with lung, (B,) each, without the given axis; the side
    and -1 where there is none."""
    seen, at = lungs.max(axis) > 0.5, jnp.arange(lungs.shape[1])
    return jnp.where(seen, at, len(at)).min(1), jnp.where(seen, at, -1).max(1)


def _frame(lungs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Middle (B, 2), row and column, and longer side (B,) of the lungs' boxes, in pixels; those of
    the whole slice where there is no lung."""
    side = lungs.shape[1]
    ends = []
    for axis in (2, 1):
        first, last = _ends(lungs, axis)
        ends.append((jnp.where(last < 0, 0, first), jnp.where(last < 0, side - 1, last)))
    middle = jnp.stack([(first + last) / 2 for first, last in ends], axis=1)
    longer = jnp.maximum(*(last - first for first, last in ends))
    return middle, jnp.maximum(longer, side // 4).astype(jnp.float32)


def _source_pixels(
    middle: jax.Array, extent: jax.Array, turn: jax.Array, stretch: jax.Array, mirror: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(B, SIZE, SIZE) row and column in the source of each pixel of a square of the side `extent`
    around `middle`, turned, stretched and mirrored."""
    at = (jnp.arange(SIZE) + 0.5) / SIZE - 0.5
    down = at[None, :, None] * (extent * stretch)[:, None, None]
    right = at[None, None, :] * (mirror * extent / stretch)[:, None, None]
    sine, cosine = (function(turn)[:, None, None] for function in (jnp.sin, jnp.cos))
    rows = middle[:, 0, None, None] + cosine * down - sine * right
    return rows, middle[:, 1, None, None] + sine * down + cosine * right


def _sample(layers: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """(S, S, C) at fractional pixels (H, W), linear between them: (H, W, C)."""
    top, left = jnp.floor(rows), jnp.floor(columns)
    below, right = (rows - top)[..., None], (columns - left)[..., None]

    def take(row: jax.Array, column: jax.Array) -> jax.Array:
        last = layers.shape[0] - 1
        row, column = (jnp.clip(i, 0, last).astype(jnp.int32) for i in (row, column))
        return layers[row, column]

    upper = take(top, left) * (1 - right) + take(top, left + 1) * right
    lower = take(top + 1, left) * (1 - right) + take(top + 1, left + 1) * right
    return upper * (1 - below) + lower * below
