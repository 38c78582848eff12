"""Splits: who is never on two sides."""

import json

import pytest

from covseg_jax.data.cases import find_cases, split_cases
from covseg_jax.errors import InputError
from tests.conftest import write_case


def split(cases, seed=0):
    return split_cases(cases, seed=seed, calibration_fraction=0.3, validation_fraction=0.25)


def names(cases):
    return {case.study_id for case in cases}


@pytest.mark.parametrize('seed', range(5))
def test_split_cases_puts_each_subject_on_one_side(prepared, seed):
    splits = split(find_cases(prepared), seed)
    sides = [
        names(side)
        for side in (
            splits.healthy_train,
            splits.healthy_calibration,
            splits.train,
            splits.validation,
            splits.evaluation,
        )
    ]
    assert sum(len(side) for side in sides) == 17
    assert len(set().union(*sides)) == 17
    # 30 % of 6 healthy and 25 % of 8 unmasked COVID subjects, rounded.
    assert [len(side) for side in sides] == [4, 2, 6, 2, 3]


def test_split_cases_keeps_all_studies_of_a_subject_together(tmp_path):
    for number in range(10):
        for scan in 'ab':
            masked = number == 9 and scan == 'a'
            category = 'CT-0' if number < 4 else 'CT-1'
            write_case(tmp_path, f'p{number}_{scan}', category, masked=masked)
    splits = split(find_cases(tmp_path, subject_pattern='(p[0-9]+)_'))
    # p9_b has no mask of its own, but its subject is an evaluation subject.
    assert names(splits.evaluation) == {'p9_a', 'p9_b'}
    for side in (splits.healthy_train, splits.train, splits.validation):
        assert all(f'{case.subject}_{scan}' in names(side) for case in side for scan in 'ab')


def test_split_cases_lets_masked_subjects_train_where_the_pattern_says_so(prepared):
    cases = find_cases(prepared)
    masked = sorted(case.study_id for case in cases if case.has_lesion_mask)
    splits = split_cases(
        cases,
        seed=0,
        calibration_fraction=0.3,
        validation_fraction=0.25,
        evaluation_pattern=masked[0],
    )
    assert names(splits.evaluation) == {masked[0]}
    assert set(masked[1:]) < names(splits.train) | names(splits.validation)
    with pytest.raises(InputError, match='evaluation_pattern'):
        split_cases(
            cases, seed=0, calibration_fraction=0, validation_fraction=0, evaluation_pattern='('
        )


def test_split_cases_does_not_move_subjects_when_others_arrive(prepared):
    before = split(find_cases(prepared))
    write_case(prepared, 'study_0900', 'CT-3')
    after = split(find_cases(prepared))
    # One more subject may push at most one over the border of its share.
    assert len(names(before.train) & names(after.validation)) <= 1
    assert not names(before.validation) - names(after.validation) - names(after.train)


def test_split_cases_refuses_a_set_without_healthy_scans(tmp_path):
    for number in range(4):
        write_case(tmp_path, f's{number}', 'CT-1')
    with pytest.raises(InputError, match='0 healthy'):
        split(find_cases(tmp_path))


def test_find_cases_names_an_empty_folder(tmp_path):
    with pytest.raises(InputError, match='no prepared cases'):
        find_cases(tmp_path)


def test_find_cases_ignores_what_a_killed_process_left(prepared):
    left = prepared / '.tmp-12-study_0000'
    left.mkdir()
    (left / 'geometry.json').write_text(json.dumps({'study_id': 'x', 'category': None}))
    assert 'x' not in names(find_cases(prepared))
