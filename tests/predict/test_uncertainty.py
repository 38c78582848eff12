"""Two networks: where they disagree, the range of lesion ml; and one network, which has neither."""

import csv
import dataclasses
import json
import math

import numpy as np
import pytest

from covseg_jax.imaging import nifti
from covseg_jax.imaging.masks import MaskSettings
from covseg_jax.imaging.studies import find_inputs
from covseg_jax.predict import uncertainty
from covseg_jax.predict.model import average_models
from covseg_jax.predict.studies import Extras, predict_studies
from tests.imaging.chest import SHAPE, write_study
from tests.predict.test_studies import MODEL, mark_opacity

HALF = MODEL.preparation.grid[0] // 2  # the middle of the opacity


def mark_upper_half(image, lungs):
    found = mark_opacity(image, lungs)
    found[:HALF] = 0
    return found


TWO = average_models(
    [MODEL, dataclasses.replace(MODEL, probabilities=(mark_upper_half,) * 2, identity='half')]
)
SURE = MaskSettings(0.4, 0.4, 0)


def networks(*columns):
    """(N, 1, 1, W), of the probabilities of W voxels by each of N networks."""
    return np.array(columns, np.float32)[:, None, None]


def read_row(output):
    with (output / 'results.csv').open() as file:
        (row,) = csv.DictReader(file)
    return row


def test_disagreement_of_two_is_half_their_difference():
    found = uncertainty.disagreement(networks([0.9, 0.5, 0], [0.1, 0.5, 0]))
    np.testing.assert_allclose(found[0, 0], [0.4, 0, 0], atol=1e-7)


def test_range_is_of_what_all_mark_strictly_and_any_marks_laxly():
    # Odds of 0.4 are 2/3: times 2 they are of 0.571, divided by it of 0.25.
    both = networks([0.9, 0.5, 0.3, 0.1, 0.9], [0.6, 0.9, 0.2, 0.2, 0.1])
    assert uncertainty.lesion_range_ml(both, 2.0, SURE, 6.0, 2) == (2, 8)
    # Their mean is at least 0.4 in three voxels; what both mark and what any marks are these two
    # and four.
    assert uncertainty.lesion_range_ml(both, 2.0, SURE, 6.0, 1) == (4, 6)
    # The mask's own volume, which resampling changes a little, is in the range.
    assert uncertainty.lesion_range_ml(both, 2.0, SURE, 8.5, 2) == (2, 8.5)
    # A cut at a share of the highest mean, 0.75, is the same for both networks: 0.375.
    by_share = MaskSettings(min_component_ml=0, share_of_max=0.5)
    assert uncertainty.lesion_range_ml(both, 2.0, by_share, 6.0, 1) == (4, 6)


def test_least_factor_is_the_first_whose_range_holds_the_truth():
    both = networks([0.5, 0.3, 0.1], [0.5, 0.3, 0.1])
    # One voxel is marked at 0.4; 0.3 is from odds of 3/7 on, 1.56 times less, and 0.1 from 1/9.
    factors = [
        uncertainty.least_factor(both, 1.0, SURE, lesion_ml=1.0, true_ml=ml) for ml in (1, 2, 3, 4)
    ]
    assert factors == [1, 2**0.75, 2**2.75, math.inf]


def test_two_networks_give_a_map_and_a_range(tmp_path):
    write_study(tmp_path / 'scans', 'a', lesion=False)
    wanted = Extras(disagreement=True, report=True)
    (row,), _ = predict_studies(
        find_inputs(tmp_path / 'scans'), TWO, tmp_path, num_workers=0, wanted=wanted
    )
    # Both mark one half of a sphere with a radius of 20 mm, and one the other half too.
    assert row['lesion_ml'] == pytest.approx(33.5 / 2, rel=0.15)
    # The model's grid is coarse for it.
    assert row['lesion_ml_low'] == pytest.approx(33.5 / 2, rel=0.35)
    assert row['lesion_ml_high'] == pytest.approx(33.5, rel=0.35)
    assert row['lesion_ml_low'] <= row['lesion_ml'] <= row['lesion_ml_high']
    written, record = read_row(tmp_path), json.loads((tmp_path / 'a_results.json').read_text())
    for name in ('lesion_ml_low', 'lesion_ml_high'):
        assert float(written[name]) == record['results'][name] == row[name]
    found = nifti.read_volume(tmp_path / 'a_disagreement.nii.gz')
    assert (found.as_stored.shape, found.as_stored.dtype) == (SHAPE, np.float32)
    assert 0 == found.as_stored.min() < found.as_stored.max() <= np.float32(0.45)
    apart_ml = np.count_nonzero(found.as_stored > 0.3) * found.voxel_ml
    assert 33.5 / 4 < apart_ml < 33.5 * 0.7

    page = (tmp_path / 'report.html').read_text()
    span = f'{row["lesion_ml_low"]:.1f} to {row["lesion_ml_high"]:.1f}'
    assert f'<dd>{span} ml</dd>' in page
    assert f'{span}</td>' in page
    assert 'data-key="d"' in page

    one = TWO.predict(tmp_path / 'scans' / 'a.nii.gz')
    np.testing.assert_array_equal(one.disagreement, found.as_stored)
    assert one.lesion_ml_low == pytest.approx(row['lesion_ml_low'], abs=1e-4)
    assert one.lesion_ml_high == pytest.approx(row['lesion_ml_high'], abs=1e-4)


def test_one_network_has_neither(tmp_path):
    write_study(tmp_path / 'scans', 'a', lesion=False)
    wanted = Extras(disagreement=True, report=True)
    predict_studies(find_inputs(tmp_path / 'scans'), MODEL, tmp_path, num_workers=0, wanted=wanted)
    assert not (tmp_path / 'a_disagreement.nii.gz').exists()
    row = read_row(tmp_path)
    assert (row['lesion_ml_low'], row['lesion_ml_high']) == ('', '')
    assert 'lesion_ml_low' not in (tmp_path / 'a_results.json').read_text()
    page = (tmp_path / 'report.html').read_text()
    assert 'Range' not in page
    assert 'data-key="d"' not in page
    found = MODEL.predict(tmp_path / 'scans' / 'a.nii.gz')
    assert (found.disagreement, found.lesion_ml_low, found.lesion_ml_high) == (None, None, None)


def test_resumed_run_makes_a_map_that_was_not_asked_for_before(tmp_path):
    write_study(tmp_path / 'scans', 'a', lesion=False)
    studies, path = find_inputs(tmp_path / 'scans'), tmp_path / 'a_disagreement.nii.gz'
    predict_studies(studies, TWO, tmp_path, num_workers=0)
    assert not path.exists()
    wanted = Extras(disagreement=True)
    predict_studies(studies, TWO, tmp_path, num_workers=0, wanted=wanted, resume=True)
    made = path.stat().st_mtime_ns
    predict_studies(studies, TWO, tmp_path, num_workers=0, wanted=wanted, resume=True)
    assert path.stat().st_mtime_ns == made
