"""Perlin noise on the device: the published recipe's corruption of healthy scans.

method.md section 2: on 8 of 32 slices, 2D Perlin noise is added. It is as often negative as
positive, so a denoiser that has seen it smooths where the default recipe's takes opacities out
(`opacities`). Perlin, Improving Noise (SIGGRAPH 2002), with the sum over octaves divided by the sum
of their amplitudes.
"""

import jax
import jax.numpy as jnp

_TABLE = 256  # nodes after which the lattice repeats, as in Perlin's own code
# The published statistics.
_SLICE_SHARE = 0.25  # of a scan's slices, those that get noise
_SCALE_PIXELS = (10.0, 30.0)  # range of the spacing of the coarsest lattice's nodes
_OCTAVES = 10  # lattices that are added, each twice as fine as the one before
_PERSISTENCE = (-0.5, 0.5)  # range of the ratio of their amplitudes


def gradient_noise(permutation: jax.Array, y: jax.Array, x: jax.Array) -> jax.Array:
    """Perlin's gradient noise at points given in units of the lattice, in (−1, 1); 0 at its nodes.

    Args:
      permutation: (256,) int32 permutation, which draws the gradients.
      y, x: coordinates, at least 0; shapes that broadcast.
    """
    nodes = [jnp.floor(c).astype(jnp.int32) for c in (y, x)]
    offsets = [y - nodes[0], x - nodes[1]]
    fades = [t * t * t * (t * (6 * t - 15) + 10) for t in offsets]
    corners = []
    for dy in (0, 1):
        row = permutation[(nodes[0] + dy) % _TABLE]
        for dx in (0, 1):
            hashed = permutation[(row + nodes[1] + dx) % _TABLE]
            angle = hashed * (2 * jnp.pi / _TABLE)
            ramp = jnp.sin(angle) * (offsets[0] - dy) + jnp.cos(angle) * (offsets[1] - dx)
            corners.append(ramp)
    upper = corners[0] + fades[1] * (corners[1] - corners[0])
    lower = corners[2] + fades[1] * (corners[3] - corners[2])
    return upper + fades[0] * (lower - upper)


def _draw_slice(key: jax.Array, height: int, width: int) -> jax.Array:
    """(H, W) noise of one slice."""
    scale_key, persistence_key, table_key, shift_key = jax.random.split(key, 4)
    (low, high), (weakest, strongest) = _SCALE_PIXELS, _PERSISTENCE
    scale = jax.random.uniform(scale_key, minval=low, maxval=high)
    persistence = jax.random.uniform(persistence_key, minval=weakest, maxval=strongest)
    permutation = jax.random.permutation(table_key, _TABLE)
    # Elsewhere on the lattice each time: every octave is 0 where its nodes lie.
    start = jax.random.uniform(shift_key, (2,), maxval=_TABLE)
    y = start[0] + jnp.arange(height)[:, None] / scale
    x = start[1] + jnp.arange(width)[None, :] / scale
    total, norm, amplitude, frequency = 0.0, 0.0, 1.0, 1.0
    for _ in range(_OCTAVES):
        total += amplitude * gradient_noise(permutation, y * frequency, x * frequency)
        norm += amplitude
        amplitude *= persistence
        frequency *= 2.0
    return total / norm


def add_perlin_noise(key: jax.Array, image: jax.Array) -> jax.Array:
    """The image (B, D, H, W, 1) with noise added to some of each scan's slices, each slice with a
    noise of its own; not clipped, as published."""
    batch, depth, height, width, _ = image.shape
    count = max(1, round(_SLICE_SHARE * depth))

    def corrupt(scan_key: jax.Array, scan: jax.Array) -> jax.Array:
        place_key, noise_key = jax.random.split(scan_key)
        places = jax.random.permutation(place_key, depth)[:count]
        draw = jax.vmap(lambda k: _draw_slice(k, height, width))
        return scan.at[places].add(draw(jax.random.split(noise_key, count))[..., None])

    return jax.vmap(corrupt)(jax.random.split(key, batch), image)
