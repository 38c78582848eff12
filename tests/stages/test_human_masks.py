"""Human masks that a network learned from are counted, and it is not scored on them."""

import types

import pytest

from covseg_jax.errors import InputError
from covseg_jax.stages.human_masks import (
    SCANS,
    count_human_masks,
    describe_human_masks,
    refuse_learned,
)


def make_case(study_id, crc32):
    return types.SimpleNamespace(study_id=study_id, description={'voxel_crc32': crc32})


def test_masks_of_a_training_and_of_the_model_before_it_are_counted_once():
    first = describe_human_masks([make_case('a', 7), make_case('b', 5)], [])
    assert first == {'human_masks': True, SCANS: [5, 7]}
    second = describe_human_masks([make_case('c', 7), make_case('d', 9)], [first])
    assert count_human_masks([second]) == 3
    assert describe_human_masks([], []) == {'human_masks': False, SCANS: []}
    # A model of an earlier version that had none, and one that had some; weights of anybody.
    assert describe_human_masks([], [{'human_masks': False}]) == {'human_masks': False, SCANS: []}
    assert describe_human_masks([], [{'human_masks': True}]) == {'human_masks': True}
    unknown = describe_human_masks([], [None])
    assert unknown == {'human_masks': None}
    assert count_human_masks([first, unknown]) is count_human_masks([None]) is None


def test_scan_whose_mask_was_learned_from_is_not_scored_under_any_name():
    learned = [{'human_masks': True, SCANS: [5, 7]}, None]
    refuse_learned([make_case('x', 6)], learned)
    with pytest.raises(InputError, match=r'^y: .*human mask.*evaluation_pattern'):
        refuse_learned([make_case('x', 6), make_case('y', 7)], learned)
