import dataclasses
import json
import math

import numpy as np
import pytest

from covseg_jax.errors import InputError
from covseg_jax.evaluation import metric_table, scores


def mark(shape, *places):
    mask = np.zeros(shape, bool)
    for place in places:
        mask[place] = True
    return mask


@pytest.fixture
def case():
    """Native grid: 3 slices of 2×5, lungs the first 4 columns. Model grid: 3 slices of 10×20, lungs
    the first 5 rows, which are 100 voxels a slice."""
    native, model = (3, 2, 5), (3, 10, 20)
    probability = np.zeros(model, np.float32)
    probability[2, 9, 9] = 0.5  # the study's maximum: the original's threshold is 0.1
    probability[1, 0, :3] = 0.3, 0.08, 0.2
    return scores.CaseArrays(
        study_id='study_0255',
        category='CT-1',
        truth=mark(native, (1, 0, 0), (1, 0, 1), (1, 0, 4)),
        prediction=mark(native, (1, 0, 1), (1, 0, 2), (2, 1, 0)),
        lungs=mark(native, np.s_[:, :, :4]),
        spacing_mm=(5.0, 2.0, 1.0),
        truth_model=mark(model, (0, 0, 0), (1, 0, 0), (1, 0, 1)),
        probability_model=probability,
        lungs_model=mark(model, np.s_[:, :5]),
        subject='patient_7',
    )


def test_volume_row_equals_hand_counts(case):
    row, _ = scores.score_case(case)
    # Image: TP 1, FP 2, FN 2, TN 25 of 30. Lungs (24): TP 1, FP 2, FN 1, TN 20. Voxel 0.01 ml.
    expected = {
        'dice': 1 / 3,
        'iou': 1 / 5,
        'sensitivity': 1 / 3,
        'precision': 1 / 3,
        'specificity_image': 25 / 27,
        'specificity_lung': 20 / 22,
        'volume_ml_true': 0.03,
        'volume_ml_predicted': 0.03,
        'lung_ml': 0.24,
        'infection_percent': 100 * 2 / 24,
        'infection_percent_predicted': 100 * 3 / 24,
        # Every voxel is surface. From the truth: 1 (column 0 → 1), 0, 2 mm (column 4 → 2); from the
        # prediction: 0, 1 and 5.385 (slice 2, row 1 → slice 1, row 0). The 95th percentile of
        # (0, 1, √29) lies 0.9 of the way from 1 to √29; 5 of 6 voxels are within 2 mm.
        'hd95_mm': 1 + 0.9 * (math.sqrt(29) - 1),
        'nsd': 5 / 6,
    }
    assert {name: row[name] for name in expected} == pytest.approx(expected)
    assert (row['study_id'], row['subject']) == ('study_0255', 'patient_7')
    assert row['category'] == 'CT-1'
    assert tuple(row) == scores.CASE_COLUMNS


def test_slice_all_scores_lesion_slices_of_the_native_grid(case):
    rows = [row for row in scores.score_case(case)[1] if row['protocol'] == 'slice_all']
    # Slice 1 only. Image: TP 1, FP 1, FN 2, TN 6. Lungs (8): TP 1, FP 1, FN 1, TN 5.
    assert [row['slice'] for row in rows] == [1]
    assert rows[0] == {
        'study_id': 'study_0255',
        'subject': 'patient_7',
        'protocol': 'slice_all',
        'slice': 1,
        'dice': pytest.approx(2 / 5),
        'sensitivity': pytest.approx(1 / 3),
        'specificity_lung': pytest.approx(5 / 6),
        'specificity_image': pytest.approx(6 / 7),
        'infection_percent': pytest.approx(25),
    }


def original_rows(case):
    rows = scores.score_case(case)[1]
    return [row for row in rows if row['protocol'] == 'slice_infection_over_1pct']


def test_original_protocol_takes_slices_over_1_percent_and_a_fifth_of_the_study_maximum(case):
    # Slice 0 has exactly 1 %, slice 1 has 2 %. Above 0.1 are 0.3 (true) and 0.2 (false), not 0.08,
    # which the slice's own maximum would have let in: TP 1, FP 1, FN 1.
    (row,) = original_rows(case)
    assert (row['slice'], row['infection_percent']) == (1, pytest.approx(2))
    assert (row['dice'], row['sensitivity']) == pytest.approx((0.5, 0.5))
    assert row['specificity_image'] == pytest.approx(197 / 198)
    assert row['specificity_lung'] == pytest.approx(97 / 98)


def test_original_protocol_predicts_nothing_from_an_output_of_zeros(case):
    silent = dataclasses.replace(case, probability_model=np.zeros((3, 10, 20), np.float16))
    (row,) = original_rows(silent)
    assert (row['dice'], row['specificity_image']) == (0, 1)


def test_slice_without_lungs_is_not_in_the_original_protocol(case):
    lungs = case.lungs_model.copy()
    lungs[1] = False
    assert original_rows(dataclasses.replace(case, lungs_model=lungs)) == []


def test_arrays_on_different_grids_are_refused_by_study(case):
    with pytest.raises(InputError, match=r'study_0255.*truth \(3, 2, 5\), prediction \(2, 2, 5\)'):
        dataclasses.replace(case, prediction=case.prediction[:2])


@pytest.mark.parametrize('value', [math.nan, 1.5, -0.1])
def test_probability_outside_0_to_1_is_refused(case, value):
    probability = case.probability_model.copy()
    probability[0, 0, 0] = value
    with pytest.raises(InputError, match='study_0255: the probability map'):
        dataclasses.replace(case, probability_model=probability)


def random_rows(num_studies=12):
    """Rows of random studies; the first is healthy and rightly left empty."""
    rng = np.random.default_rng(5)
    case_rows, slice_rows = [], []
    for index in range(num_studies):
        truth, prediction, lungs = rng.random((3, 5, 12, 10)) < [[[[0.1]]], [[[0.2]]], [[[0.8]]]]
        if index == 0:
            truth, prediction = np.zeros_like(truth), np.zeros_like(truth)
        probability = rng.random(truth.shape).astype(np.float16)
        name = f'study, "{index}"' if index == 1 else f'study_{index:04d}'
        category = None if index == 2 else 'CT-1'
        arrays = scores.CaseArrays(
            *(name, category, truth, prediction, lungs, (8.0, 0.7, 0.7)),
            *(truth, probability, lungs),
            subject=f'subject_{index // 2}',
        )
        row, rows = scores.score_case(arrays)
        case_rows.append(row)
        slice_rows += rows
    return case_rows, slice_rows


def test_every_metric_has_a_title_and_every_place_is_known():
    assert all(metric.title for metric in metric_table.METRICS)
    places = {place for column in metric_table.COLUMNS for place in column.shown}
    assert places == {'slices', 'headline', 'compare', 'strata', 'hparams'}


def test_summary_figures_equal_hand_computed_ones():
    row = random_rows(1)[0][0]
    case_rows = [
        row | {'study_id': name, 'subject': name, 'dice': dice}
        for name, dice in [('a', 0.2), ('b', math.nan), ('c', 0.6)]
    ]
    found = scores.summarise(case_rows, [])['volume']['dice']
    # The sample's standard deviation of 0.2 and 0.6: √(2 · 0.2² / 1). A draw of two: 0.2, 0.4, 0.6.
    assert found == {
        'mean': pytest.approx(0.4),
        'std': pytest.approx(math.sqrt(0.08)),
        'median': pytest.approx(0.4),
        'ci95': pytest.approx([0.2, 0.6]),
        'n': 2,
        'undefined': 1,
    }


def test_summary_interval_draws_a_subject_with_both_of_its_studies():
    row = random_rows(1)[0][0]
    case_rows = [
        row | {'study_id': study, 'subject': subject, 'dice': dice}
        for study, subject, dice in [('p_1', 'p', 0.2), ('p_2', 'p', 0.4), ('q_1', 'q', 0.9)]
    ]
    found = scores.summarise(case_rows, [])['volume']['dice']
    # Two draws of p and q: both p, (0.2 + 0.4 + 0.2 + 0.4) / 4 = 0.3; one each, 1.5 / 3 = 0.5; both
    # q, 0.9; with chances of 1/4, 1/2 and 1/4. Were studies drawn, the lowest of 27 would be 0.2.
    assert (found['mean'], found['n']) == (pytest.approx(0.5), 3)
    assert found['ci95'] == pytest.approx([0.3, 0.9])


def test_summary_interval_of_slices_draws_subjects():
    # 60 slices of two subjects, one with two studies, all 0 and all 1: the interval is that of two
    # subjects.
    base = dict.fromkeys(scores.SLICE_COLUMNS, 0.0) | {'protocol': 'slice_all'}
    rows = [
        base | {'study_id': f'{name}_{z % 2}', 'subject': name, 'slice': z, 'dice': dice}
        for name, dice in [('a', 0.0), ('b', 1.0)]
        for z in range(30)
    ]
    found = scores.summarise([], rows)['slice_all']['dice']
    assert (found['mean'], found['ci95'], found['n']) == (0.5, [0, 1], 60)


def test_summary_of_nothing_has_every_key_and_no_figure():
    nothing = {'mean': None, 'std': None, 'median': None}
    nothing |= {'ci95': [None, None], 'n': 0, 'undefined': 0}
    names = (  # other programs read them
        'dice', 'sensitivity', 'specificity_lung', 'specificity_image', 'hd95_mm', 'nsd', 'iou',
        'precision', 'lesion_f1', 'volume_error_ml', 'volume_error_percent', 'average_precision',
        'ece', 'brier',
    )  # fmt: skip
    found = scores.summarise([], [])
    assert tuple(found['volume']) == names
    assert found == {
        protocol: dict.fromkeys(names, nothing)
        for protocol in ('volume', 'slice_infection_over_1pct', 'slice_all')
    }


def test_summary_json_can_be_recomputed_from_the_tables(tmp_path):
    case_rows, slice_rows = random_rows()
    summary = {
        'protocols': scores.summarise(case_rows, slice_rows),
        'strata': scores.stratify(case_rows),
        'studies': len(case_rows),
    }
    scores.write_tables(tmp_path, case_rows, slice_rows)
    scores.write_summary(tmp_path, summary)

    written = json.loads((tmp_path / 'summary.json').read_text())
    read = scores.read_tables(tmp_path)
    assert written['protocols'] == scores.summarise(*read)
    assert written['strata'] == scores.stratify(read[0])
    assert sum(each['n'] for each in written['strata']['lesion_size'].values()) > 0
    # And the rows were worth it: something of everything, one undefined Dice.
    assert written['protocols']['volume']['dice']['undefined'] == 1
    assert written['protocols']['slice_infection_over_1pct']['dice']['n'] > 40
    assert written['protocols']['slice_all']['hd95_mm']['n'] == 0


def test_tables_keep_every_value(tmp_path):
    case_rows, slice_rows = random_rows()
    scores.write_tables(tmp_path, case_rows, slice_rows)
    for found, expected in zip(scores.read_tables(tmp_path), (case_rows, slice_rows), strict=True):
        # repr, because NaN equals nothing.
        assert repr(found) == repr(expected)
    assert 'np.' not in (tmp_path / 'cases.csv').read_text()


def cut_last_line(text):
    return text[: text.rindex(',')]


def without_subjects(text):
    return ''.join(
        ','.join(line.split(',')[:1] + line.split(',')[2:]) for line in text.splitlines(True)
    )


@pytest.mark.parametrize(
    ('damage', 'complaint'),
    [
        (lambda text: text.replace('dice', 'dise'), 'no column dice'),
        (without_subjects, 'no column subject; run evaluate again'),  # of an earlier version
        (lambda text: text.replace('CT-1,', 'CT-1,x', 1), 'damaged'),
        (cut_last_line, 'cut short'),
    ],
)
def test_damaged_table_is_refused_by_name(tmp_path, damage, complaint):
    scores.write_tables(tmp_path, *random_rows(3))
    path = tmp_path / 'cases.csv'
    path.write_text(damage(path.read_text()))
    with pytest.raises(InputError, match=rf'cases\.csv.*{complaint}'):
        scores.read_tables(tmp_path)


def test_missing_table_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match=r'cases\.csv'):
        scores.read_tables(tmp_path)


def test_summary_with_nan_is_refused_and_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match='JSON'):
        scores.write_summary(tmp_path, {'threshold': math.nan})
    assert list(tmp_path.iterdir()) == []
