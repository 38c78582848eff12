"""Losses: plain functions of arrays of any floating type. They give a scalar, computed in float32,
or in float64 where that comes in.

Sources: Shabani et al. 2022 and its adaptation, as method.md section 4 writes them down; the
contrastive form follows Khosla et al., Supervised Contrastive Learning (NeurIPS 2020), with sums
inside the logarithm; least-squares GAN: Mao et al. (ICCV 2017), equation 2.
"""

import jax
import jax.numpy as jnp

_SMALLEST_FEATURE = 1e-12  # a vector whose largest entry is below this has no direction


def contrastive_loss(
    features: jax.Array,
    labels: jax.Array,
    *,
    temperature: float,
    sensitivity_weight: float = 1.0,
    include_self: bool = False,
) -> jax.Array:
    """Enhanced supervised contrastive loss of one batch.

    With s_ij the cosine similarity of features i and j over the temperature, P_i and N_i the sums
    of exp(s_ij) over j of the same and of another label, and w the sensitivity weight:
    mean over i of −log(w P_i / (w P_i + N_i)) = softplus(log N_i − log P_i − log w).
    w = 1 is the adapted loss, w = 1.5 the enhanced one; both published with include_self=True and
    temperature 1. Anchors without a positive or without a negative are left out of the mean; where
    none is left the loss is 0 and so is its gradient. A zero feature vector has similarity 0 with
    all others and receives no gradient.

    Args:
      features: (B, F).
      labels: (B,) integers.
      temperature: divisor of the similarities, above 0.
      sensitivity_weight: w, above 0.
      include_self: count the pair (i, i) among the positives, as published.
    """
    unit = _unit_vectors(_at_least_float32(features))
    similarity = unit @ unit.T / temperature  # (B, B)
    same = labels[:, None] == labels[None, :]
    positive = same if include_self else same & ~jnp.eye(labels.shape[0], dtype=bool)
    counts = positive.any(axis=1) & (~same).any(axis=1)  # (B,)
    # The sums of those left out run over all pairs, so that no log(0) is differentiated.
    left_out = ~counts[:, None]
    log_positive = jax.nn.logsumexp(similarity, axis=1, where=positive | left_out)
    log_negative = jax.nn.logsumexp(similarity, axis=1, where=~same | left_out)
    losses = jax.nn.softplus(log_negative - log_positive - jnp.log(sensitivity_weight))
    return jnp.sum(jnp.where(counts, losses, 0)) / jnp.maximum(jnp.sum(counts), 1)


def sensitivity_loss(
    logits: jax.Array,
    targets: jax.Array,
    *,
    beta: float,
    weights: jax.Array | None = None,
    clip: bool = True,
) -> jax.Array:
    """Sensitivity-enhanced cross entropy: mean of BCE(z, t) · (1 + β (1 − σ(z)) t).

    Published β = 2; β = 0 is plain binary cross entropy. BCE is in the stable form
    softplus(z) − z t. method.md section 4.

    Args:
      logits: (B, H, W, 1) z.
      targets: the shape of logits, t, soft or hard.
      beta: weight of missed lesion pixels, at least 0.
      weights: None or an array that broadcasts to the logits, such as (B, H, W, 1) pixel weights or
        (B, 1, 1, 1) valid rows: the mean becomes a weighted mean (0 where all weights are 0).
      clip: clip the targets to [0, 1] first. Published is False, on signed differences: below 0
        they make the cross entropy fall without bound as z does, and only the squared error of the
        logits, which the published sum holds too, stops it.
    """
    logits = _at_least_float32(logits)
    targets = _targets_like(logits, targets, clip)
    cross_entropy = jax.nn.softplus(logits) - logits * targets
    missed = jax.nn.sigmoid(-logits) * targets  # (1 − σ(z)) t
    return _weighted_mean(cross_entropy * (1 + beta * missed), weights)


def mse_loss(
    logits: jax.Array,
    targets: jax.Array,
    *,
    on: str = 'probability',
    weights: jax.Array | None = None,
    clip: bool = True,
) -> jax.Array:
    """Mean squared error between prediction and soft pseudo-mask.

    on='probability' compares σ(z) with t. on='logits' compares z itself, as published, which pulls
    against the cross entropy (method.md section 4).

    Args:
      logits: (B, H, W, 1) z.
      targets: the shape of logits.
      on: 'probability' or 'logits'.
      weights, clip: as for `sensitivity_loss`.

    Raises:
      ValueError: `on` is neither of the two.
    """
    if on not in ('probability', 'logits'):
        raise ValueError(f"mse_loss: on={on!r}; use 'probability' or 'logits'")
    logits = _at_least_float32(logits)
    targets = _targets_like(logits, targets, clip)
    prediction = jax.nn.sigmoid(logits) if on == 'probability' else logits
    return _weighted_mean(jnp.square(prediction - targets), weights)


def one_hot_loss(probabilities: jax.Array, label: int) -> jax.Array:
    """Published GAN loss: mean squared error between D's softmax and a one-hot label. method.md
    section 2.

    Args:
      probabilities: (B, 2) softmax of the published discriminator.
      label: 1 for "real healthy", 0 for "generated". The generator is trained towards 1.
    """
    probabilities = _at_least_float32(probabilities)
    one_hot = jax.nn.one_hot(label, probabilities.shape[-1], dtype=probabilities.dtype)
    return jnp.mean(jnp.square(probabilities - one_hot))


def lsgan_discriminator_loss(
    real: jax.Array,
    fake: jax.Array,
    *,
    weights: tuple[jax.Array | None, jax.Array | None] = (None, None),
) -> jax.Array:
    """Least-squares loss of D: ½ mean (D(real) − 1)² + ½ mean D(fake)². Mao et al., equation 2.
    0.25 for a D that says 0.5 everywhere.

    Args:
      real, fake: patch logits of any shape, such as (B, d, h, w, 1).
      weights: of the patches of each, as for `sensitivity_loss`.
    """
    on_fake = _weighted_mean(jnp.square(_at_least_float32(fake)), weights[1])
    return lsgan_generator_loss(real, weights=weights[0]) + 0.5 * on_fake


def lsgan_generator_loss(fake: jax.Array, *, weights: jax.Array | None = None) -> jax.Array:
    """Least-squares loss of G: ½ mean (D(G(x)) − 1)². Mao et al., equation 2. Arguments as for
    `lsgan_discriminator_loss`."""
    return 0.5 * _weighted_mean(jnp.square(_at_least_float32(fake) - 1), weights)


def _at_least_float32(array: jax.Array) -> jax.Array:
    array = jnp.asarray(array)
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def _targets_like(logits: jax.Array, targets: jax.Array, clip: bool) -> jax.Array:
    targets = targets.astype(logits.dtype)
    return jnp.clip(targets, 0, 1) if clip else targets


def _unit_vectors(features: jax.Array) -> jax.Array:
    """Rows of (B, F) scaled to length 1; rows of zeros stay zeros, without gradient."""
    largest = jnp.max(jnp.abs(features), axis=1, keepdims=True)
    directed = largest > _SMALLEST_FEATURE
    # dividing by a constant first keeps the squares from overflowing and changes no direction
    scaled = features / jax.lax.stop_gradient(jnp.where(directed, largest, 1))
    squared = jnp.sum(jnp.square(scaled), axis=1, keepdims=True)
    return jnp.where(directed, scaled / jnp.sqrt(jnp.where(directed, squared, 1)), 0)


def _weighted_mean(values: jax.Array, weights: jax.Array | None) -> jax.Array:
    if weights is None:
        return jnp.mean(values)
    weights = jnp.broadcast_to(weights.astype(values.dtype), values.shape)
    total = jnp.sum(weights)
    return jnp.sum(values * weights) / jnp.where(total > 0, total, 1)
