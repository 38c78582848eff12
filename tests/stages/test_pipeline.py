"""Which studies a trained network may be scored on, and what is said of many at once."""

import json

import pytest

from covseg_jax.errors import InputError
from covseg_jax.prepare.cases import find_cases
from covseg_jax.stages.pipeline import _refuse_trained_subjects, join_notes
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


def test_notes_that_differ_in_what_was_measured_are_one_line_with_a_range():
    notes = {
        'a': ['the view cuts off 5 % of 2 lungs', 'tilted'],
        'b': ['the view cuts off 12 % of 2 lungs', 'the air has -700 HU'],
        'c': ['the view cuts off 9 % of 2 lungs', 'its first file is CT 0012 mm.dcm'],
        'd': ['its first file is CT 0013 lung.dcm', 'the air has -650 HU', 'tilted'],
        'e': ['slices are 1.4 to 1.9 mm apart', 'slices are 1.4 to 2.1 mm apart'],
    }
    assert join_notes(notes) == [
        'a and 2 more: the view cuts off 5 to 12 % of 2 lungs',
        'a and 1 more: tilted',
        'b and 1 more: the air has -700 to -650 HU',
        'c: its first file is CT 0012 mm.dcm',
        'd: its first file is CT 0013 lung.dcm',
        'e: slices are 1.4 to 1.9 mm apart',
        'e: slices are 1.4 to 2.1 mm apart',
    ]
