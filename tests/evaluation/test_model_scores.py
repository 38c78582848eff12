"""A model's scores of every study: by hand, as predict gives masks, and not twice."""

import dataclasses
import math

import numpy as np
import pytest

from covseg_jax.errors import InputError
from covseg_jax.evaluation import model_scores
from covseg_jax.evaluation.model_scores import score_arrays, score_studies
from covseg_jax.imaging.masks import MaskSettings, StudyMask
from covseg_jax.imaging.studies import find_inputs
from covseg_jax.predict.model import Model, average_models
from tests.imaging.chest import AFFINE, SHAPE, draw_chest, write_stored, write_study
from tests.settings import prepare_settings


def mark_opacity(image, lungs):
    # (-500 + 1000) / 1400 against (-850 + 1000) / 1400 around it
    return np.where(np.asarray(image, np.float32) > 0.25, 0.7, 0.2).astype(np.float32) * lungs


MODEL = Model(
    (mark_opacity,), prepare_settings(grid=(28, 64, 64)), MaskSettings(0.5, 0.6, 0.1), 'opacities'
)


def test_scores_are_those_by_hand():
    # Lesions of 4, 10 and 20 voxels of 0.1 ml: the first is found (1 of 4), the second too (1 of
    # 10), the third is not (1 of 20); and one is marked where there is none.
    truth, marked, lungs = (np.zeros((4, 8, 10), bool) for _ in range(3))
    truth[0, 0, :4] = truth[0, 4] = truth[2, 0:2] = True
    marked[0, 0, 0] = marked[0, 4, 0] = marked[2, 0, 0] = marked[3, 7, 9] = True
    lungs[0] = True
    probability = np.where(marked, 0.52, 0.0).astype(np.float32)
    probability[0, 4] = 0.31
    found = score_arrays(truth, probability, StudyMask(marked, lungs), 0.1)
    assert found['true_ml'] == pytest.approx(3.4)
    assert found['marked_ml'] == pytest.approx(0.4)
    assert found['dice'] == pytest.approx(2 * 3 / (34 + 4))
    assert found['dice_at_0.50'] == pytest.approx(2 * 2 / (34 + 3))
    assert found['dice_at_0.55'] == 0
    assert found['dice_at_0.30'] == found['dice_at_0.05'] == pytest.approx(2 * 12 / (34 + 13))
    assert found['lesion_f1'] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert (found['nodules'], found['nodules_found']) == (1, 1)  # 10 voxels are a ml
    # 2 of the 3 highest are lesion, then 12 of 13, then all 34 of 320 with what is 0.
    expected = 2 / 34 * 2 / 3 + 10 / 34 * 12 / 13 + 22 / 34 * 34 / 320
    assert found['average_precision'] == pytest.approx(expected)
    # In the lungs: one voxel of 0.52 is lesion, ten of 0.31 are, and 3 of 69 of 0 are.
    assert found['ece'] == pytest.approx((0.48 + 10 * 0.69 + 3) / 80, rel=1e-4)


def test_empty_truth_and_mask_have_no_dice():
    nothing = np.zeros((2, 4, 4), bool)
    found = score_arrays(nothing, nothing.astype(np.float32), StudyMask(nothing, ~nothing), 0.1)
    undefined = {name for name, value in found.items() if math.isnan(value)}
    assert undefined == {'dice', *model_scores.DICE_AT, 'average_precision', 'lesion_f1'}


def test_studies_are_scored_as_predicted_and_done_once(tmp_path):
    for name in ('a', 'b'):
        write_study(tmp_path / 'scans', name)
    write_study(tmp_path / 'scans', 'healthy', lesion=False)
    # Of a scan without lungs nothing can be said, but what lesion there is was not found.
    without_lungs = np.full(SHAPE, 40, np.int16)
    without_lungs[:4] = -1000
    write_stored(tmp_path / 'scans' / 'solid.nii.gz', without_lungs, AFFINE)
    write_stored(tmp_path / 'scans' / 'solid_mask.nii.gz', draw_chest('a')[1], AFFINE)
    studies, done = find_inputs(tmp_path / 'scans'), tmp_path / 'done'
    rows = score_studies(MODEL, studies, done, 0, 'test')
    assert [row['study_id'] for row in rows] == ['a', 'b', 'healthy', 'solid']
    found = MODEL.predict(tmp_path / 'scans' / 'a.nii.gz')
    _, truth = draw_chest('a')
    dice = 2 * (found.mask * truth).sum() / (found.mask.sum() + truth.sum())
    assert 0.8 < dice < 1
    assert rows[0]['dice'] == pytest.approx(dice)
    at_cut = found.probability >= 0.35
    dice = 2 * (at_cut & truth).sum() / (at_cut.sum() + truth.sum())
    assert rows[0]['dice_at_0.35'] == pytest.approx(dice)
    assert rows[2].keys() <= {'study_id', 'category', 'status', 'marked_ml'}
    assert rows[2]['marked_ml'] == pytest.approx(found.lesion_ml, rel=0.01)
    assert 'lungs' in rows[3]['status']
    assert (rows[3]['dice'], rows[3]['dice_at_0.05'], rows[3]['marked_ml']) == (0, 0, 0)

    def fail(image, lungs):
        raise AssertionError('done again')

    again = dataclasses.replace(MODEL, probabilities=(fail,))
    np.testing.assert_equal(score_studies(again, studies, done, 0, 'test'), rows)
    assert 'range_factor' not in rows[0]  # it is one network
    with pytest.raises(AssertionError, match='done again'):  # it is another model
        score_studies(dataclasses.replace(again, identity='other'), studies, done, 0, 'test')
    write_stored(tmp_path / 'scans' / 'a_mask.nii.gz', 0 * truth.astype(np.uint8), AFFINE)
    changed = score_studies(MODEL, studies, done, 0, 'test')
    assert (changed[0]['dice'], changed[1]['dice']) == (0, rows[1]['dice'])


def test_range_of_two_networks_is_scored_against_the_truth(tmp_path):
    for name, lesion in (('a', True), ('healthy', False)):
        write_study(tmp_path / 'scans', name, lesion=lesion)
    nothing = dataclasses.replace(MODEL, probabilities=(lambda _, lungs: 0.0 * lungs,))
    rows = score_studies(
        average_models([MODEL, nothing]), find_inputs(tmp_path / 'scans'), tmp_path, 0, 'test'
    )
    # One marks the lesion with 0.7 and the other does not: their mean does not reach the cut.
    assert (rows[0]['marked_ml'], rows[0]['lesion_ml_low']) == (0, 0)
    # The model's grid is coarse for it.
    assert rows[0]['lesion_ml_high'] == pytest.approx(rows[0]['true_ml'], rel=0.3)
    # Outside the lesion are 0.2: at odds of a quarter and less of the cut's all of the lungs.
    least = 1 if rows[0]['lesion_ml_high'] >= rows[0]['true_ml'] else 4
    assert least <= rows[0]['range_factor'] <= 2**2.25
    assert rows[1]['lesion_ml_high'] == pytest.approx(rows[0]['lesion_ml_high'], rel=0.01)
    assert 'range_factor' not in rows[1]


def test_scan_that_cannot_be_read_is_named(tmp_path):
    write_study(tmp_path / 'scans', 'a')
    studies = find_inputs(tmp_path / 'scans')
    scan = tmp_path / 'scans' / 'a.nii.gz'
    scan.write_bytes(scan.read_bytes()[:-100])
    with pytest.raises(InputError, match=r'a\.nii\.gz'):
        score_studies(MODEL, studies, tmp_path / 'done', 0, 'test')
