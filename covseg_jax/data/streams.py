"""The random numbers of a run: one seed, and streams of it that names tell apart.

Whatever draws at random takes its seed or key from here. The streams of one seed, and those of two
seeds, share nothing: a number added to a seed would give another run's stream.
"""

import hashlib
import json

import jax


def stream_seed(seed: int, *name: str | int) -> int:
    """A seed for NumPy or Grain, in [0, 2³²): 32 bits of SHA-256 of the run's seed, or of what this
    function gave of it, and the stream's name, whose parts are text or numbers."""
    digest = hashlib.sha256(json.dumps([seed, *name]).encode()).digest()
    return int.from_bytes(digest[:4])


def stream_key(seed: int, *name: str | int) -> jax.Array:
    """A key of JAX: the run's own, folded with the stream's name."""
    return jax.random.fold_in(jax.random.key(seed), stream_seed(0, *name))
