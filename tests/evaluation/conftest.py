"""Rows and pictures that the tests of figures, viewer and report share."""

import math

import numpy as np
import pytest

from covseg_jax.evaluation import evaluate_cases, figures, report, scores

DICE = {'study_0255': 0.5, 'study_0256': 0.125, 'study_0257': 0.875, 'study_0258': math.nan}


@pytest.fixture
def case_rows():
    text = ('study_id', 'subject', 'category')
    numbers = [column for column in scores.CASE_COLUMNS if column not in text]
    base = dict.fromkeys(numbers, 0.25) | {'category': 'CT-1'}
    return [
        base | {'study_id': name, 'subject': name, 'dice': value} for name, value in DICE.items()
    ]


def slice_rows(num, **values):
    base = dict.fromkeys(scores.SLICE_COLUMNS, 0.5) | {'study_id': 'a', 'protocol': 'slice_all'}
    return [base | {'slice': z, 'infection_percent': 1.0 + z} | values for z in range(num)]


def case_images(**changes):
    """A body of soft tissue with air inside; truth in the slices 2 and 4, prediction in 2."""
    image_hu = np.full((6, 40, 50), -1000.0, np.float32)
    image_hu[:, 5:35, 5:45] = 40
    image_hu[:, 10:30, 10:40] = -850
    truth, prediction = np.zeros((2, *image_hu.shape), bool)
    truth[2, 12:20, 12:20] = truth[4, 15:18, 15:18] = True
    prediction[2, 14:24, 14:24] = True
    lungs = image_hu == -850
    arrays = {'image_hu': image_hu, 'lungs': lungs, 'truth': truth, 'prediction': prediction}
    settings = {'study_id': 's', 'dice': 0.5, 'pseudo_mask': None, 'spacing_mm': (8, 0.7, 0.7)}
    return figures.CaseImages(**(arrays | settings | changes))


@pytest.fixture
def report_path(case_rows, tmp_path):
    """A report of four cases, two of them with views."""
    drawn = [figures.plot_overlay('best', case_images(), tmp_path)]
    summary = {
        'protocols': scores.summarise(case_rows, slice_rows(12, dice=0.375)),
        'pseudo_masks': scores.summarise(case_rows[:1], []),
        'strata': scores.stratify(case_rows),
    }
    views = [
        evaluate_cases.draw_views(case_images(study_id=name), 100_000)
        for name in ('study_0257', 'study_0256')
    ]
    run = {'config': 'transunet.py:phantom', 'devices': ['cpu:0'], 'note': '<b>&'}
    path = report.write_report(tmp_path, summary, case_rows, drawn, run, views)
    assert path == tmp_path / 'report.html'
    return path


@pytest.fixture
def page(report_path):
    return report_path.read_text()
