"""The human masks that a network has learned from: they are counted, and it is not scored on them.

A network learns from human masks where `train.targets` says so, or where the model that it went on
from, or one that made its pseudo-masks, did. Each scan is noted by the CRC-32 of its voxels, which
stays the same under any name.
"""

from collections.abc import Sequence
from typing import Any

from covseg_jax.errors import InputError
from covseg_jax.prepare.cases import Case

SCANS = 'human_mask_scans'  # of training_data: the voxel_crc32 of each, ascending
TrainingData = dict[str, Any] | None  # of a model; None where nobody knows it: imported weights


def describe_human_masks(cases: Sequence[Case], before: Sequence[TrainingData]) -> dict[str, Any]:
    """What training_data says of human masks.

    Args:
      cases: those whose human mask was a target.
      before: training_data of the models that the training went on from, or was taught by.

    Returns:
      `human_masks`, whether there were any (None: not known), and SCANS where all are known.
    """
    if count_human_masks(before) is None:
        is_any = bool(cases) or any(each and each.get('human_masks') for each in before)
        return {'human_masks': is_any or None}
    scans = {case.description.get('voxel_crc32') for case in cases} | _scans(before)
    return {'human_masks': bool(scans), SCANS: sorted(scans - {None})}


def count_human_masks(of_models: Sequence[TrainingData]) -> int | None:
    """How many human masks models have learned from; None where that is not known of one of them,
    as of imported weights."""
    for each in of_models:
        # Versions that noted no scans said whether there were any.
        if each is None or (SCANS not in each and each.get('human_masks') is not False):
            return None
    return len(_scans(of_models))


def refuse_learned(cases: Sequence[Case], of_models: Sequence[TrainingData]) -> None:
    """Raises an InputError where one of the cases, which are to be scored, is a scan whose human
    mask the models have learned from."""
    learned = _scans(of_models)
    both = sorted(c.study_id for c in cases if c.description.get('voxel_crc32') in learned)
    if both:
        raise InputError(
            f'{both[0]}: the network, or a model that it goes on from or learns from, learned from '
            f'the human mask of this scan ({len(both)} such studies), and is not scored on it; '
            'leave it out '
            'with --config.data.evaluation_pattern, or take another model'
        )


def _scans(of_models: Sequence[TrainingData]) -> set[int]:
    return {crc32 for each in of_models for crc32 in (each or {}).get(SCANS, ())}
