"""Studies to masks, beside other processes and in this one, and on where it was stopped."""

import csv
import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from covseg_jax.errors import InputError
from covseg_jax.imaging import nifti
from covseg_jax.imaging.prepare import PrepareSettings
from covseg_jax.imaging.studies import find_inputs
from covseg_jax.imaging.study_files import read_image
from covseg_jax.inference.masks import MaskSettings
from covseg_jax.inference.model import Model
from covseg_jax.inference.predict import Wanted, predict_studies
from tests.imaging.chest import AFFINE, SHAPE, draw_chest, write_study
from tests.imaging.test_dicom import write_series


def mark_opacity(image, lungs):
    # (-500 + 1000) / 1400 against (-850 + 1000) / 1400 around it
    return np.where(np.asarray(image, np.float32) > 0.25, 0.9, 0.0) * lungs


MODEL = Model(
    # As on a host with two devices.
    probabilities=(mark_opacity, mark_opacity),
    preparation=PrepareSettings(grid=(28, 64, 64)),
    masks=MaskSettings(0.5, 0.6),
    identity='marks opacities',
)


def read_csv(output):
    with (output / 'results.csv').open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize('num_workers', [0, 2])
def test_masks_of_a_folder_are_those_of_its_studies_and_a_damaged_one_is_named(
    tmp_path, num_workers
):
    scans, output = tmp_path / 'scans', tmp_path / 'masks'
    for name in ('a', 'b', 'c', 'd', 'e', 'f'):
        write_study(scans, name, lesion=False)
    damaged = scans / 'c.nii.gz'
    damaged.write_bytes(damaged.read_bytes()[:-100])
    rows, faults = predict_studies(find_inputs(scans), MODEL, output, num_workers=num_workers)
    assert [row['study_id'] for row in read_csv(output)] == list('abcdef')
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
    assert rows[0]['severity'] == 'CT-1'
    assert rows[0]['seconds'] > 0


def test_what_is_wanted_is_written_beside_the_mask(tmp_path):
    write_study(tmp_path / 'scans', 'a', lesion=False)
    (row,), _ = predict_studies(
        find_inputs(tmp_path / 'scans'), MODEL, tmp_path, wanted=Wanted(True, True, True)
    )
    probability = nifti.read_volume(tmp_path / 'a_probability.nii.gz').data
    assert probability.shape == SHAPE
    assert probability.dtype == np.float32
    assert Image.open(tmp_path / 'a_preview.png').size[0] > 200
    # The opacity is at low x of a file whose x runs to the Left: in the right lung.
    assert row['right_lesion_ml'] == row['lesion_ml'] > 0
    assert row['left_lesion_ml'] == 0
    assert row['right_lung_ml'] + row['left_lung_ml'] == pytest.approx(row['lung_ml'])
    assert read_csv(tmp_path)[0]['right_lung_ml'] == str(row['right_lung_ml'])


def test_dicom_series_in_mask_on_its_grid_out(tmp_path):
    image, _ = draw_chest('a')
    write_series(tmp_path / 'scans' / 'chest', image, AFFINE)
    (row,), faults = predict_studies(find_inputs(tmp_path / 'scans'), MODEL, tmp_path / 'masks')
    assert not faults
    mask = nifti.read_volume(tmp_path / 'masks' / row['mask'])
    assert mask.lies_on_grid_of(read_image(find_inputs(tmp_path / 'scans')[0]))
    assert mask.data.sum() * mask.voxel_ml == pytest.approx(33.5, rel=0.15)


def count_done(output):
    """How often each study was done, by the journal."""
    text = (output / 'results.0.jsonl').read_text()
    lines = [json.loads(line) for line in text.splitlines() if line.endswith('}')]
    return [sum(line['study_id'] == name for line in lines) for name in 'abcd']


def test_resume_does_what_is_missing_damaged_or_of_another_scan_and_keeps_the_rest(tmp_path):
    scans, output = tmp_path / 'scans', tmp_path / 'masks'
    for name in 'abc':
        write_study(scans, name, lesion=False)
    first, _ = predict_studies(find_inputs(scans), MODEL, output, num_workers=0)
    assert count_done(output) == [1, 1, 1, 0]

    # b's mask is there and can be read, but is not what was written; c's scan is another; d is new.
    other = np.zeros(SHAPE, np.uint8)
    nifti.write_volume(output / 'b_mask.nii.gz', other, AFFINE)
    write_study(scans, 'c', lesion=False, opacity_hu=-400)
    write_study(scans, 'd', lesion=False)
    with (output / 'results.0.jsonl').open('a') as file:
        file.write('{"study_id": "a", "iden')  # cut short by a kill
    before = (output / 'a_mask.nii.gz').stat().st_mtime_ns
    again, _ = predict_studies(find_inputs(scans), MODEL, output, num_workers=0, resume=True)
    assert (output / 'a_mask.nii.gz').stat().st_mtime_ns == before
    assert again[0] == first[0]
    assert nifti.read_volume(output / 'b_mask.nii.gz').data.any()
    assert count_done(output) == [1, 2, 2, 1]
    assert [row['study_id'] for row in read_csv(output)] == list('abcd')

    changed = dataclasses.replace(MODEL, identity='another')
    predict_studies(find_inputs(scans), changed, output, num_workers=0, resume=True)
    assert (output / 'a_mask.nii.gz').stat().st_mtime_ns > before


def test_what_an_earlier_run_left_of_a_study_goes_with_it(tmp_path):
    scans, output = tmp_path / 'scans', tmp_path / 'masks'
    for name in 'ab':
        write_study(scans, name, lesion=False)
    predict_studies(find_inputs(scans), MODEL, output, num_workers=0, wanted=Wanted(preview=True))
    (scans / 'b.nii.gz').write_bytes(b'broken')
    changed = dataclasses.replace(MODEL, identity='another')
    predict_studies(find_inputs(scans), changed, output, num_workers=0, resume=True)
    left = {path.name for path in output.iterdir()}
    assert left == {'a_mask.nii.gz', 'results.csv', 'results.0.jsonl'}


def test_masks_of_the_input_are_not_written_over(tmp_path):
    write_study(tmp_path, 'a', lesion=True)
    before = (tmp_path / 'a_mask.nii.gz').read_bytes()
    with pytest.raises(InputError, match=r'a_mask.nii.gz: is a mask of the input'):
        predict_studies(find_inputs(tmp_path), MODEL, tmp_path, num_workers=0)
    assert (tmp_path / 'a_mask.nii.gz').read_bytes() == before


def test_without_resume_all_is_done_again(tmp_path):
    write_study(tmp_path / 'scans', 'a', lesion=False)
    studies = find_inputs(tmp_path / 'scans')
    for _ in range(2):
        predict_studies(studies, MODEL, tmp_path, num_workers=0)
    assert count_done(tmp_path) == [1, 0, 0, 0]
