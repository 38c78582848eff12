"""Scores of probability maps, by hand."""

import math

import numpy as np
import pytest

from covseg_jax.evaluation import probabilities

TRUTH = np.array([1, 0, 1, 0], bool)
PROBABILITY = np.array([0.9, 0.8, 0.8, 0.1], np.float32)


def test_brier_score():
    expected = (0.1**2 + 0.8**2 + 0.2**2 + 0.1**2) / 4
    assert probabilities.brier_score(TRUTH, PROBABILITY) == pytest.approx(expected)


def test_calibration_error_compares_each_bin_with_what_is_there():
    # bins of 1/15: 0.9 alone (1 true), both 0.8 (1 true of 2), 0.1 alone (none)
    expected = (abs(0.9 - 1) + abs(1.6 - 1) + 0.1) / 4
    found = probabilities.expected_calibration_error(TRUTH, PROBABILITY)
    assert found == pytest.approx(expected, rel=1e-6)
    assert probabilities.expected_calibration_error(TRUTH, TRUTH.astype(float)) == 0


def test_average_precision_takes_ties_together():
    # above 0.9: 1 of 1, half of all; above 0.8: 2 of 3, the other half
    found = probabilities.average_precision(TRUTH, PROBABILITY)
    assert found == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert math.isnan(probabilities.average_precision(~TRUTH & TRUTH, PROBABILITY))
