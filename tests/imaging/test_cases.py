"""Scans as they come off scanners and out of archives: each small case is read right."""

import re

import numpy as np
import pytest

from covseg_jax.imaging import nifti, studies
from covseg_jax.prepare import study_files

# What lies in shared data's cases/ -> (spacing z in mm, note). All are made from chest_ct_64.
CASES = {
    '02_raw_private': (3.9873, 'passed over beside the slices: 1 × private object'),
    '03_scout_other': (3.9873, 'passed over beside the slices: 1 × scout'),
    '04_doubled': (3.9873, '79 slices are there twice, with the same pixels'),
    '06_enhanced': (3.9873, None),
    '12_no_preamble': (3.9873, None),
    '18_tree': (3.9873, None),
    '21_quat': (3.9873, 'its quaternion has the length 1.000001, which is taken for 1'),
    '22_qfac2': (3.9873, r'its qfac \(pixdim\[0\]\) is 2, not 1 or -1; 1 is used'),
    '31_names/f1': (3.9873, None),
    '35_float_near': (3.9873, None),
    '36_origin_001': (3.9873, None),
}


@pytest.mark.parametrize('name', CASES)
def test_case_is_the_scan_that_it_was_made_from(shared_data, name):
    spacing_mm, note = CASES[name]
    truth = nifti.read_volume(shared_data / 'chest_ct_64' / 'image.nii.gz')
    (study,) = studies.find_inputs(shared_data / 'cases' / name)
    image = study_files.read_image(study)
    np.testing.assert_array_equal(image.array, truth.array)
    assert image.spacing_mm[0] == pytest.approx(spacing_mm, abs=1e-4)
    assert [bool(re.search(note, found)) for found in image.notes] == [True] if note else True
    if study.lesion_mask is not None:
        mask = study_files.read_mask(study, 'lesion_mask', image, labels=(1,))
        assert mask.sum() == 546


def test_rounded_positions_span_first_to_last(shared_data):
    (study,) = studies.find_inputs(shared_data / 'cases' / '01_rounded_0625')
    image = study_files.read_image(study)
    # 473 gaps between -360.3 and -64.6 mm
    assert image.spacing_mm[0] == pytest.approx((360.3 - 64.6) / 473)
    assert re.match(
        'slices are 0.6 to 0.7 mm apart, as positions that were rounded', image.notes[0]
    )


def test_jpeg_ls_case_is_the_scan_inside_its_circle(shared_data):
    truth = nifti.read_volume(shared_data / 'chest_ct_64' / 'image.nii.gz').array
    (study,) = studies.find_inputs(shared_data / 'cases' / '61_jls_p')
    found = study_files.read_image(study).array
    # -2000 pads what lies outside, and the intercept is -1024.
    np.testing.assert_array_equal(found, np.where(found == -3024, -3024, truth))
    assert 0.7 < (found != -3024).mean() < 0.85
