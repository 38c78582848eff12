"""Synthetic opacities on the device: what the GAN's denoiser learns to take out of healthy lungs.

Blobs of smooth random shape are blended towards the density of ground glass, or add what is missing
to it, some with a consolidated core, in three dimensions, inside the lungs only, and never darken a
voxel: a denoiser that has seen these removes *opacities*, where zero-mean noise, as published,
teaches it to smooth everything. In most samples they prefer the lungs' periphery and back, as
COVID-19 pneumonia does (Bernheim et al., Radiology 295:685, 2020), in some they lie anywhere.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from covseg_jax.data.feeds import HEALTHY, IMAGE, LABEL, LUNGS, TARGET
from covseg_jax.data.smoothing import gaussian_weights, mean_of_lungs
from covseg_jax.data.streams import stream_key
from covseg_jax.prepare.cases import Case

# Density is added to the tissue around a voxel: a Gaussian mean of the lungs, in parts of the
# image's side, in which vessels count as no denser than the first. What is as dense as the second
# holds no air that an opacity could take the place of. By judgement, not measured.
_AROUND = 1 / 64
_TISSUE_HU = -510.0
_VESSEL_HU = 50.0
# How far above a blob's border its core begins, and how softly: standard deviations of the field.
_CORE_LEVEL = (0.3, 1.0)
_CORE_EDGE = 0.15
_NUMBERS = 10  # that are drawn for each sample


@dataclasses.dataclass(frozen=True)
class OpacityModel:
    """Statistics of the synthetic opacities; pairs are ranges."""

    window_hu: tuple[float, float]  # of image values 0 and 1
    target_hu: tuple[float, float]  # the density that a blob is blended towards
    opacity: tuple[float, float]  # the blending weight at a blob's core
    # The level, in standard deviations, above which the random field is a blob: 0.7 covers about
    # 24 % of the lungs, 2.6 about 0.5 %.
    coverage_threshold: tuple[float, float]
    grain_voxels: tuple[float, float]  # finest and coarsest in-plane spacing of the field's nodes
    grain_slices: tuple[float, float]  # and along depth
    edge: tuple[float, float]  # softness of the blobs' borders, in standard deviations of the field
    texture: float  # its relative strength inside a blob
    # How much the field rises from deep inside the lungs to their edge, before it is standardised.
    periphery: tuple[float, float]
    dependence: tuple[float, float]  # and from the middle of the image to its last row, the back
    core_share: float  # of samples whose blobs have a consolidated core
    core_hu: tuple[float, float]
    # How much of an opacity is density that is added to the tissue, most of whose noise stays, and
    # not a blend of both, which is smoother than the lung around it: at most, in a sample.
    added_share: float
    clean_fraction: float  # of samples that stay as they are
    dependent_density: float  # how far healthy lungs are varied, `augment.add_dependent_density`


def opacity_model(config: ml_collections.ConfigDict) -> OpacityModel:
    """The synthetic opacities of a config."""
    return OpacityModel(window_hu=tuple(config.prepare.window_hu), **config.opacities)


def _smooth_field(key: jax.Array, shape: tuple[int, ...], spacing: tuple[float, ...]) -> jax.Array:
    """(B, D, H, W) Gaussian field, zero mean and unit variance, its nodes `spacing` apart."""
    nodes = tuple(max(2, round(n / s)) for n, s in zip(shape[1:], spacing, strict=True))
    # Drawn flat: XLA compiles draws of many axes slowly on CPU.
    coarse = jax.random.normal(key, (shape[0] * math.prod(nodes),)).reshape(shape[0], *nodes)
    field = jax.image.resize(coarse, shape, 'cubic')
    axes = (1, 2, 3)
    return (field - field.mean(axes, keepdims=True)) / (field.std(axes, keepdims=True) + 1e-6)


def _field_of_mixed_grain(key: jax.Array, shape: tuple[int, ...], model: OpacityModel) -> jax.Array:
    """A random mixture, per sample, of a fine, a middle and a coarse field."""
    fine, coarse = model.grain_voxels
    thin, thick = model.grain_slices
    *keys, weight_key = jax.random.split(key, 4)
    spacings = [
        (thin, fine, fine),
        ((thin * thick) ** 0.5, (fine * coarse) ** 0.5, (fine * coarse) ** 0.5),
        (thick, coarse, coarse),
    ]
    # Exponential numbers over their sum are uniform over all mixtures; of the fine field there is
    # less.
    drawn = jax.random.exponential(weight_key, (shape[0] * 3,)).reshape(shape[0], 3)
    drawn *= jnp.array([0.6, 1.0, 1.0])
    weights = drawn / drawn.sum(1, keepdims=True)
    field = sum(
        weights[:, i, None, None, None] * _smooth_field(keys[i], shape, spacing)
        for i, spacing in enumerate(spacings)
    )
    return field / field.std((1, 2, 3), keepdims=True)


def _periphery(lungs: jax.Array) -> jax.Array:
    """(B, D, H, W) map of 1 at the edge of the lungs, falling to 0 deep inside, slice by slice."""
    rows, columns = map(_blur_matrix, lungs.shape[2:])
    blurred = jnp.einsum('ih,bdhw,jw->bdij', rows, lungs, columns)
    return jnp.clip(2.0 * (1.0 - blurred), 0.0, 1.0)  # a straight edge blurs to one half


def _blur_matrix(size: int) -> jax.Array:
    weights = gaussian_weights(size, size / 12)
    return weights / weights.sum(1, keepdims=True)


def _standardise_inside(field: jax.Array, lungs: jax.Array) -> jax.Array:
    """Zero mean and unit variance in the lungs of each (D, H, W) sample."""
    axes = (1, 2, 3)
    count = jnp.maximum(lungs.sum(axes, keepdims=True), 1.0)
    field = field - (field * lungs).sum(axes, keepdims=True) / count
    variance = (jnp.square(field) * lungs).sum(axes, keepdims=True) / count
    return field / jnp.sqrt(variance + 1e-12)


def add_opacities(
    key: jax.Array, image: jax.Array, lungs: jax.Array, model: OpacityModel
) -> tuple[jax.Array, jax.Array]:
    """Puts random opacities into healthy lungs; `image` in [0, 1] and `lungs` are (B, D, H, W, 1).

    Returns:
      The corrupted image, nowhere darker than the input and equal to it outside the lungs; and the
      opacities' soft mask in [0, 1], both shaped as image.
    """
    shape, inside = image.shape[:-1], lungs[..., 0]
    numbers_key, *keys, added_key = jax.random.split(key, 5)
    keys = iter(keys)
    # All numbers at once: each draw of its own costs XLA for CPUs as long to compile as this one.
    numbers = iter(jax.random.uniform(numbers_key, (shape[0] * _NUMBERS,)).reshape(_NUMBERS, -1))

    def uniform(bounds: tuple[float, float]) -> jax.Array:
        drawn = bounds[0] + (bounds[1] - bounds[0]) * next(numbers)
        return drawn.reshape(shape[0], 1, 1, 1)

    field = _field_of_mixed_grain(next(keys), shape, model)
    field += uniform(model.periphery) * _periphery(inside)
    # Row by row from −1 at the front to 1 at the back: cases lie in canonical order.
    field += uniform(model.dependence) * jnp.linspace(-1.0, 1.0, shape[2])[:, None]
    field = _standardise_inside(field, inside) - uniform(model.coverage_threshold)
    mask = jax.nn.sigmoid(field / uniform(model.edge))
    mask = jnp.where(mask < 0.05, 0.0, mask)
    present = uniform((0.0, 1.0)) >= model.clean_fraction
    mask = mask * present * inside

    target_hu = uniform(model.target_hu)
    # Density varies within one lung: a slow field of its own, half as wide as the range itself.
    spread = 0.25 * (model.target_hu[1] - model.target_hu[0])
    coarse = (model.grain_slices[1], model.grain_voxels[1], model.grain_voxels[1])
    target_hu += spread * 0.5 * _smooth_field(next(keys), shape, coarse)
    has_core = uniform((0.0, 1.0)) < model.core_share
    core = has_core * jax.nn.sigmoid((field - uniform(_CORE_LEVEL)) / _CORE_EDGE)
    target_hu += core * jnp.maximum(uniform(model.core_hu) - target_hu, 0.0)
    low, high = model.window_hu
    target = jnp.clip((target_hu - low) / (high - low), 0.0, 1.0)

    fine = (model.grain_slices[0], model.grain_voxels[0] / 2, model.grain_voxels[0] / 2)
    texture = 1.0 + model.texture * _smooth_field(next(keys), shape, fine)
    weight = jnp.clip(mask * uniform(model.opacity) * texture, 0.0, 1.0)[..., None]
    more = jnp.maximum(target[..., None] - image, 0.0)
    if model.added_share:
        share = model.added_share * jax.random.uniform(added_key, (shape[0], 1, 1, 1, 1))
        added = _added_density(image, lungs, target[..., None], model)
        # Noise on top of a dense target may leave the window.
        more = jnp.minimum((1 - share) * more + share * added, 1.0 - image)
    return image + weight * more, mask[..., None]


def _added_density(
    image: jax.Array, lungs: jax.Array, target: jax.Array, model: OpacityModel
) -> jax.Array:
    """What brings the tissue around each voxel to the target, less where a voxel holds less air."""
    low, high = model.window_hu
    most, vessel = ((hu - low) / (high - low) for hu in (_TISSUE_HU, _VESSEL_HU))
    around = tuple(size * _AROUND for size in image.shape[2:4])
    tissue = mean_of_lungs(jnp.minimum(image, most)[..., 0], lungs[..., 0], around)[..., None]
    # What is darker than the mean is taken for noise, and gets as much as the mean.
    solid = jnp.clip((image - tissue) / (vessel - tissue), 0.0, 1.0)
    return (1 - solid) * jnp.maximum(target - tissue, 0.0)


def paint_slices(
    key: jax.Array, batch: dict[str, jax.Array], model: OpacityModel, share: float
) -> dict[str, jax.Array]:
    """Puts opacities into some of the slices of a batch: lesions whose masks are exact.

    Pseudo-masks share the GAN's faults from scan to scan; a network that sees these beside them
    learns what it cannot learn from either alone. COVID slices are painted too, beside what their
    target marks: healthy subjects are few.

    Args:
      key: PRNG key.
      batch: IMAGE, TARGET, LUNGS (B, H, W, 1), LABEL and HEALTHY (B,); other keys pass through.
      model: its clean_fraction is on top of `share`.
      share: of the slices that are painted, in [0, 1].

    Returns:
      The batch; where a slice was painted, TARGET is 1 in the opacities' mask, cut at 0.5, and
      LABEL 1; LABEL is 0 for the other healthy slices.
    """
    share_key, paint_key = jax.random.split(key)
    chosen = jax.random.uniform(share_key, batch[HEALTHY].shape) < share
    image, lungs = batch[IMAGE][:, None], batch[LUNGS][:, None]  # volumes of one slice
    painted, mask = add_opacities(paint_key, image, lungs, model)
    mask = (mask[:, 0] >= 0.5).astype(jnp.float32)
    chosen &= mask.any((1, 2, 3))
    here = chosen[:, None, None, None]
    label = jnp.where(batch[HEALTHY] > 0, 0, batch[LABEL])
    return batch | {
        IMAGE: jnp.where(here, painted[:, 0], batch[IMAGE]),
        TARGET: jnp.where(here, jnp.maximum(mask, batch[TARGET]), batch[TARGET]),
        LABEL: jnp.maximum(label, chosen.astype(label.dtype)),
    }


@dataclasses.dataclass(frozen=True)
class PaintedScan:
    """A healthy scan with opacities whose mask is known; (D, H, W) each."""

    image: np.ndarray  # float32 in [0, 1]
    lungs: np.ndarray
    mask: np.ndarray  # bool
    voxel_ml: float


def paint_scans(cases: Sequence[Case], model: OpacityModel, seed: int) -> Iterator[PaintedScan]:
    """Healthy scans, each painted once, always in the same way for its study id and the seed: truth
    without a human mask."""
    always = dataclasses.replace(model, clean_fraction=0.0)
    paint = jax.jit(functools.partial(add_opacities, model=always))
    for case in cases:
        image = np.asarray(case.image(), np.float32)[None, ..., None]
        lungs = np.asarray(case.lungs(), np.float32)[None, ..., None]
        painted, mask = paint(stream_key(seed, 'paint', case.study_id), image, lungs)
        yield PaintedScan(
            np.asarray(painted)[0, ..., 0],
            np.asarray(case.lungs()),
            np.asarray(mask)[0, ..., 0] >= 0.5,
            case.geometry.voxel_ml,
        )
