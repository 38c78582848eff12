"""What the segmentation network learns from: pseudo-masks, human masks, or painted lesions alone."""

import dataclasses
from collections.abc import Callable

import numpy as np

from covseg_jax.data.cases import Case, Splits
from covseg_jax.errors import InputError

ReadTarget = Callable[[Case], np.ndarray]  # case -> (D, H, W) lesion in [0, 1]

TARGETS = ('pseudo', 'human', 'human_else_pseudo', 'synthetic')


def choose_targets(
    kind: str, splits: Splits, read_pseudo_mask: ReadTarget
) -> tuple[Splits, ReadTarget]:
    """Who trains the network, and on what.

    Args:
      kind: 'pseudo' (COVID scans on their pseudo-masks), 'human' (those with a human mask alone),
        'human_else_pseudo' (human masks where there are any), or 'synthetic' (no COVID scan:
        healthy ones with painted opacities alone).
      splits: who may train. Evaluation subjects do not, whatever the kind.
      read_pseudo_mask: case -> its pseudo-mask.

    Raises:
      InputError: another kind, or 'human' and no training subject has a mask.
    """
    if kind not in TARGETS:
        raise InputError(f'train.targets={kind!r} is not one of {", ".join(TARGETS)}')
    if kind == 'pseudo':
        return splits, read_pseudo_mask
    if kind == 'synthetic':
        return dataclasses.replace(splits, train=(), validation=()), read_pseudo_mask
    if kind == 'human':
        splits = dataclasses.replace(
            splits,
            train=tuple(c for c in splits.train if c.has_lesion_mask),
            validation=tuple(c for c in splits.validation if c.has_lesion_mask),
        )
        if not splits.train:
            raise InputError(
                "train.targets='human': no training subject has a lesion mask, all that have one "
                'are kept for evaluation; let data.evaluation_pattern match fewer of them'
            )

    def read_target(case: Case) -> np.ndarray:
        return case.lesion() if case.has_lesion_mask else read_pseudo_mask(case)

    return splits, read_target
