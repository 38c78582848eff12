"""Which studies a trained network may be scored on."""

import json

import pytest

from covseg_jax.errors import InputError
from covseg_jax.prepare.cases import find_cases
from covseg_jax.stages.pipeline import _refuse_trained_subjects
from tests.conftest import write_case


def test_subject_that_was_trained_on_and_got_a_mask_since_is_not_scored(tmp_path):
    for number in range(3):
        write_case(tmp_path / 'prepared', f'study_{number}', 'CT-1', masked=True)
    cases = find_cases(tmp_path / 'prepared')
    _refuse_trained_subjects(cases, tmp_path)  # imported weights, or a run of older code
    (tmp_path / 'transunet').mkdir()
    calibration = tmp_path / 'transunet' / 'calibration.json'
    calibration.write_text(json.dumps({'subjects': ['study_1', 'study_7']}))
    with pytest.raises(InputError, match='study_1: the network learned from this subject'):
        _refuse_trained_subjects(cases, tmp_path)
    _refuse_trained_subjects(cases[::2], tmp_path)
