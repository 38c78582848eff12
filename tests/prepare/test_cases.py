"""Splits: who is never on two sides."""

import dataclasses
import hashlib
import json

import pytest

from configs import transunet
from covseg_jax import manifest
from covseg_jax.errors import InputError
from covseg_jax.prepare.cases import Case, evaluation_cases, find_cases, split_cases
from covseg_jax.stages.inputs import split_studies
from tests.conftest import write_case


def split(cases, seed=0):
    return split_cases(cases, seed=seed, calibration_fraction=0.3, validation_fraction=0.25)


def place(subject, seed):
    """A subject's hash as a share of all hashes."""
    return int(hashlib.sha256(f'{seed}:{subject}'.encode()).hexdigest(), 16) / 2**256


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
    assert len(sides[4]) == 3
    for learns, held_out, fraction in ((*sides[:2], 0.3), (*sides[2:4], 0.25)):
        ordered = sorted(learns | held_out, key=lambda name: place(name, seed))
        number = sum(place(name, seed) < fraction for name in ordered)
        # All below the fraction, but never none of them and never all.
        assert held_out == set(ordered[: min(max(number, 1), len(ordered) - 1)])


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


def test_split_cases_does_not_move_subjects_when_others_arrive(tmp_path):
    def case(number):
        category = 'CT-0' if number % 2 else 'CT-1'
        return Case(f's{number}', f's{number}', tmp_path, category, False, {})

    old = tuple(map(case, range(80)))
    new = tuple(map(case, range(80, 120)))
    for seed in range(200):
        before, after = split(old, seed), split(old + new, seed)
        held_out = before.healthy_calibration, before.validation
        # With so many subjects some of them lie below the fraction: nobody stands in for them.
        assert min(len(side) for side in held_out) > 1
        for side in ('healthy_calibration', 'validation'):
            assert names(getattr(before, side)) == names(getattr(after, side)) & names(old)


def test_split_cases_without_healthy_scans_says_how_to_name_them(tmp_path):
    for number in range(4):
        write_case(tmp_path, f's{number}', None)
    with pytest.raises(InputError, match=r'0 healthy.*--config\.data\.healthy_pattern') as refused:
        split(find_cases(tmp_path))
    assert '\n' not in str(refused.value)
    # They can be evaluated on without any.
    write_case(tmp_path, 'm1', None, masked=True)
    assert names(evaluation_cases(find_cases(tmp_path))) == {'m1'}


def test_healthy_scans_alone_are_split_where_nothing_learns_from_covid_scans(tmp_path):
    for number in range(4):
        write_case(tmp_path, f's{number}', 'CT-0')
    config = transunet.get_config('phantom')
    with config.unlocked():
        config.data.prepared = str(tmp_path)
    splits = split_studies(config, tmp_path, needs_covid=False)
    assert len(splits.healthy_train + splits.healthy_calibration) == 4
    assert not splits.train + splits.validation
    with pytest.raises(InputError, match=r'0 COVID subjects .* at least two.*synthetic'):
        split_studies(config, tmp_path)


def test_healthy_pattern_names_healthy_studies_of_any_data_set(tmp_path):
    for name in ('normal_1', 'normal_2', 'abnormal_1', 'covid_1', 'covid_2'):
        write_case(tmp_path, name, None)
    write_case(tmp_path, 'study_0001', 'CT-0')
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')}

    def healthy(pattern):
        cases = find_cases(tmp_path, healthy_pattern=pattern)
        return {case.study_id for case in cases if case.is_healthy}

    # The whole id counts, and what the data set itself calls healthy stays so. Another pattern
    # holds at once: nothing is prepared again.
    assert healthy('') == {'study_0001'}
    assert healthy('normal_.*') == {'normal_1', 'normal_2', 'study_0001'}
    assert healthy('normal') == {'study_0001'}
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')} == before
    splits = split(find_cases(tmp_path, healthy_pattern='normal_.*'))
    learns = names(splits.healthy_train + splits.healthy_calibration)
    assert learns == {'normal_1', 'normal_2', 'study_0001'}
    assert names(splits.train + splits.validation) == {'abnormal_1', 'covid_1', 'covid_2'}


def test_training_names_a_healthy_pattern_that_matches_nothing(prepared):
    config = transunet.get_config('tiny').unlock()
    config.data.prepared = str(prepared)
    config.data.healthy_pattern = 'study_000[0-9]'
    assert len(split_studies(config, prepared).healthy_train) > 0
    config.data.healthy_pattern = 'normal_.*'
    with pytest.raises(InputError, match=r'healthy_pattern .normal_.*matches no prepared study'):
        split_studies(config, prepared)


def test_studies_that_were_taken_out_of_the_data_set_serve_for_nothing(prepared, tmp_path):
    config = transunet.get_config('tiny').unlock()
    config.data.prepared = str(prepared)
    kept = sorted(names(find_cases(prepared)))[:-1]
    found = [prepared / name / 'geometry.json' for name in kept]
    manifest.finish(tmp_path, 'prepare', {}, found, 1.0)
    splits = split_studies(config, tmp_path)
    used = (getattr(splits, each.name) for each in dataclasses.fields(splits))
    assert {case.study_id for cases in used for case in cases} == set(kept)


@pytest.mark.parametrize('setting', ['subject_pattern', 'healthy_pattern'])
def test_find_cases_names_a_pattern_that_is_none(prepared, setting):
    with pytest.raises(InputError, match=rf'data\.{setting} .\(.: missing'):
        find_cases(prepared, **{setting: '('})


def test_evaluation_cases_are_those_with_a_mask_and_of_no_scan_that_trains(tmp_path):
    for name, masked in (('p1_a', True), ('p1_b', False), ('p2_a', True), ('p3_a', False)):
        write_case(tmp_path, name, 'CT-1', masked=masked)
    cases = find_cases(tmp_path, subject_pattern='(p[0-9])_')
    assert names(evaluation_cases(cases)) == {'p1_a', 'p2_a'}
    assert names(evaluation_cases(cases, 'p2')) == {'p2_a'}
    twins = tuple(
        dataclasses.replace(case, description={'voxel_crc32': 5})
        for case in cases
        if case.study_id in ('p2_a', 'p3_a')
    )
    with pytest.raises(InputError, match='p3_a: the same scan as p2_a'):
        evaluation_cases(twins)


def test_find_cases_names_an_empty_folder(tmp_path):
    with pytest.raises(InputError, match='no prepared cases'):
        find_cases(tmp_path)


def test_find_cases_ignores_what_a_killed_process_left(prepared):
    left = prepared / '.tmp-12-study_0000'
    left.mkdir()
    (left / 'geometry.json').write_text(json.dumps({'study_id': 'x', 'category': None}))
    assert 'x' not in names(find_cases(prepared))
