"""Studies to masks, beside other processes and in this one."""

import csv

import numpy as np
import pytest

from covseg_jax.imaging import nifti
from covseg_jax.imaging.prepare import PrepareSettings
from covseg_jax.imaging.studies import find_inputs
from covseg_jax.inference.masks import MaskSettings
from covseg_jax.inference.predict import predict_studies
from tests.imaging.chest import AFFINE, SHAPE, draw_chest, write_study


def mark_opacity(image, lungs):
    # (-500 + 1000) / 1400 against (-850 + 1000) / 1400 around it
    return np.where(np.asarray(image, np.float32) > 0.25, 0.9, 0.0) * lungs


@pytest.mark.parametrize('num_workers', [0, 2])
def test_masks_of_a_folder_are_those_of_its_studies_and_a_damaged_one_is_named(
    tmp_path, num_workers
):
    scans, output = tmp_path / 'scans', tmp_path / 'masks'
    for name in ('a', 'b', 'c', 'd', 'e', 'f'):
        write_study(scans, name, lesion=False)
    damaged = scans / 'c.nii.gz'
    damaged.write_bytes(damaged.read_bytes()[:-100])
    rows, faults = predict_studies(
        find_inputs(scans),
        mark_opacity,
        PrepareSettings(grid=(28, 64, 64)),
        MaskSettings(0.5, 0.6),
        output,
        num_workers=num_workers,
    )
    with (output / 'results.csv').open() as file:
        assert [row['study_id'] for row in csv.DictReader(file)] == list('abcdef')
    assert [row['status'] == 'ok' for row in rows] == [True, True, False, True, True, True]
    assert len(faults) == 1
    assert 'c.nii.gz' in faults[0]
    assert not (output / 'c_mask.nii.gz').exists()
    _, opacity = draw_chest('any')
    for name in 'abdef':
        found = nifti.read_volume(output / f'{name}_mask.nii.gz')
        assert found.data.shape == SHAPE
        np.testing.assert_array_equal(found.affine, AFFINE)
        overlap = 2 * (found.data[opacity] > 0).sum() / ((found.data > 0).sum() + opacity.sum())
        assert overlap > 0.9
    # a sphere of radius 20 mm
    assert rows[0]['lesion_ml'] == pytest.approx(33.5, rel=0.15)
