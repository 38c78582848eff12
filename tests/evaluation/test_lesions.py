"""Single lesions, by hand."""

import math

import numpy as np
import pytest

from covseg_jax.evaluation import lesions


def place(*boxes):
    mask = np.zeros((4, 8, 8), bool)
    for box in boxes:
        mask[box] = True
    return mask


def test_lesions_found_missed_and_false():
    # three true lesions of 2, 1 and 4 voxels; the first half covered, the second missed, the third
    # touched; one predicted lesion touches none of them
    truth = place(np.s_[0, 0, 0:2], np.s_[3, 7, 7], np.s_[2, 4:6, 0:2])
    prediction = place(np.s_[0, 0, 0], np.s_[2, 4, 0], np.s_[0, 6:8, 6:8])
    match = lesions.match_lesions(truth, prediction)
    assert sorted(zip(match.true_voxels, match.covered, strict=True)) == [
        (1, 0.0),
        (2, 0.5),
        (4, 0.25),
    ]
    assert (match.num_predicted, match.num_false) == (3, 1)
    assert match.f1 == pytest.approx(4 / (4 + 1 + 1))


def test_voxels_that_share_a_corner_are_one_lesion():
    match = lesions.match_lesions(place(np.s_[0, 0, 0], np.s_[1, 1, 1]), place())
    assert match.true_voxels.tolist() == [2]


def test_lesions_of_empty_masks():
    one = place(np.s_[1, 1, 1])
    assert math.isnan(lesions.match_lesions(place(), place()).f1)
    assert lesions.match_lesions(one, place()).f1 == 0
    assert lesions.match_lesions(place(), one).f1 == 0


def test_a_lesion_can_be_asked_to_be_covered_more():
    truth = place(np.s_[0, 0, 0:8], np.s_[2, 0:5, 0:4])  # of 8 and 20 voxels
    match = lesions.match_lesions(truth, place(np.s_[0, 0, 0], np.s_[2, 0, 0]))
    assert match.f1_at(0) == match.f1 == 1
    # 1 of 8 is more than a tenth and 1 of 20 less: missed, and what touches it is not false.
    assert match.f1_at(0.1) == pytest.approx(2 / (2 + 1))
    assert match.f1_at(0.2) == 0
