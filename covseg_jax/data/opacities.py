"""Synthetic opacities on the device: what the GAN's denoiser learns to take out of healthy lungs.

Blobs of smooth random shape are blended towards the density of ground glass or consolidation, in
three dimensions, inside the lungs only, and never darken a voxel: a denoiser that has seen these
removes *opacities*, where zero-mean noise, as published, teaches it to smooth everything.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from covseg_jax.data.pipeline import HEALTHY, IMAGE, LABEL, LUNGS, TARGET


@dataclasses.dataclass(frozen=True)
class OpacityModel:
    """Statistics of the synthetic opacities.

    Attributes:
      window_hu: HU of image values 0 and 1.
      target_hu: range of the density that a blob is blended towards.
      opacity: range of the blending weight at a blob's core.
      coverage_threshold: range of the level, in standard deviations, above which the random field
        is a blob: 0.7 covers about 24 % of the lungs, 2.6 about 0.5 %.
      grain_voxels: finest and coarsest in-plane spacing of the random field's nodes.
      grain_slices: finest and coarsest spacing of the nodes along depth.
      edge: softness of a blob's border, in standard deviations of the field.
      texture: relative strength of the texture inside a blob.
      clean_fraction: share of samples that stay as they are.
    """

    window_hu: tuple[float, float] = (-1000.0, 400.0)
    target_hu: tuple[float, float] = (-780.0, -250.0)
    opacity: tuple[float, float] = (0.5, 1.0)
    coverage_threshold: tuple[float, float] = (0.7, 2.6)
    grain_voxels: tuple[float, float] = (4.0, 16.0)
    grain_slices: tuple[float, float] = (1.5, 4.0)
    edge: float = 0.25
    texture: float = 0.25
    clean_fraction: float = 0.2


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
    weights = jax.random.dirichlet(weight_key, jnp.array([0.6, 1.0, 1.0]), (shape[0],))
    field = sum(
        weights[:, i, None, None, None] * _smooth_field(keys[i], shape, spacing)
        for i, spacing in enumerate(spacings)
    )
    return field / field.std((1, 2, 3), keepdims=True)


def add_opacities(
    key: jax.Array, image: jax.Array, lungs: jax.Array, model: OpacityModel
) -> tuple[jax.Array, jax.Array]:
    """Puts random opacities into healthy lungs.

    Args:
      key: PRNG key.
      image: (B, D, H, W, 1) in [0, 1].
      lungs: as image, 1 inside the lungs.
      model: their statistics.

    Returns:
      The corrupted image, nowhere darker than the input and equal to it outside the lungs; and the
      opacities' soft mask in [0, 1], both shaped as image.
    """
    shape = image.shape[:-1]
    per_sample = (shape[0], 1, 1, 1)
    keys = jax.random.split(key, 7)

    def uniform(k: jax.Array, bounds: tuple[float, float]) -> jax.Array:
        drawn = jax.random.uniform(k, shape[:1], minval=bounds[0], maxval=bounds[1])
        return drawn.reshape(per_sample)

    low, high = model.window_hu
    target_hu = uniform(keys[0], model.target_hu)
    # Density varies within one lung: a slow field of its own, half as wide as the range itself.
    spread = 0.25 * (model.target_hu[1] - model.target_hu[0])
    coarse = (model.grain_slices[1], model.grain_voxels[1], model.grain_voxels[1])
    target_hu = target_hu + spread * 0.5 * _smooth_field(keys[1], shape, coarse)
    target = jnp.clip((target_hu - low) / (high - low), 0.0, 1.0)

    threshold = uniform(keys[2], model.coverage_threshold)
    field = _field_of_mixed_grain(keys[3], shape, model)
    mask = jax.nn.sigmoid((field - threshold) / model.edge)
    mask = jnp.where(mask < 0.05, 0.0, mask)
    present = uniform(keys[4], (0.0, 1.0)) >= model.clean_fraction
    mask = mask * present * lungs[..., 0]

    fine = (model.grain_slices[0], model.grain_voxels[0] / 2, model.grain_voxels[0] / 2)
    texture = 1.0 + model.texture * _smooth_field(keys[5], shape, fine)
    weight = jnp.clip(mask * uniform(keys[6], model.opacity) * texture, 0.0, 1.0)[..., None]
    corrupted = image + weight * jnp.maximum(target[..., None] - image, 0.0)
    return corrupted, mask[..., None]


def paint_healthy_slices(
    key: jax.Array, batch: dict[str, jax.Array], model: OpacityModel, share: float
) -> dict[str, jax.Array]:
    """Puts opacities into some of the healthy slices of a batch: lesions whose masks are exact.

    Pseudo-masks share the GAN's faults from scan to scan; a network that sees these beside them
    learns what it cannot learn from either alone.

    Args:
      key: PRNG key.
      batch: IMAGE, TARGET, LUNGS (B, H, W, 1), LABEL and HEALTHY (B,); other keys pass through.
      model: the opacities' statistics; its clean_fraction is on top of `share`.
      share: of the healthy slices that are painted, in [0, 1].

    Returns:
      The batch; where a slice was painted, TARGET is the opacities' mask, cut at 0.5, and LABEL 1.
    """
    share_key, paint_key = jax.random.split(key)
    chosen = batch[HEALTHY] * (jax.random.uniform(share_key, batch[HEALTHY].shape) < share)
    image, lungs = batch[IMAGE][:, None], batch[LUNGS][:, None]  # volumes of one slice
    painted, mask = add_opacities(paint_key, image, lungs, model)
    mask = (mask[:, 0] >= 0.5).astype(jnp.float32)
    chosen *= mask.any((1, 2, 3))
    here = chosen[:, None, None, None] > 0
    return batch | {
        IMAGE: jnp.where(here, painted[:, 0], batch[IMAGE]),
        TARGET: jnp.where(here, mask, batch[TARGET]),
        LABEL: jnp.where(chosen > 0, 1, batch[LABEL]),
    }
