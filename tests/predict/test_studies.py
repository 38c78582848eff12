"""Studies to masks, beside other processes and in this one, and on where it was stopped."""

import csv
import dataclasses
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from covseg_jax import written
from covseg_jax.checksums import describe_data_set
from covseg_jax.errors import InputError
from covseg_jax.imaging import formats, nifti
from covseg_jax.imaging.masks import MaskSettings
from covseg_jax.imaging.studies import find_inputs, find_studies
from covseg_jax.predict.model import Model
from covseg_jax.predict.studies import Extras, predict_studies
from covseg_jax.prepare.study_files import read_image
from tests.imaging.chest import AFFINE, SHAPE, draw_chest, write_stored, write_study
from tests.imaging.test_dicom import write_series
from tests.settings import prepare_settings


def mark_opacity(image, lungs):
    # (-500 + 1000) / 1400 against (-850 + 1000) / 1400 around it
    return np.where(np.asarray(image, np.float32) > 0.25, 0.9, 0.0) * lungs


MODEL = Model(
    # As on a host with two devices.
    probabilities=(mark_opacity, mark_opacity),
    preparation=prepare_settings(grid=(28, 64, 64)),
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
        assert found.as_stored.shape == SHAPE
        np.testing.assert_array_equal(found.affine, AFFINE)
        overlap = (
            2 * (found.as_stored[opacity] > 0).sum() / ((found.as_stored > 0).sum() + opacity.sum())
        )
        assert overlap > 0.9
    # a sphere of radius 20 mm
    assert rows[0]['lesion_ml'] == pytest.approx(33.5, rel=0.15)
    assert rows[0]['severity'] == 'CT-1'
    assert rows[0]['seconds'] > 0


def test_what_is_wanted_is_written_beside_the_mask(tmp_path):
    write_study(tmp_path / 'scans', 'a', lesion=False)
    (row,), _ = predict_studies(
        find_inputs(tmp_path / 'scans'), MODEL, tmp_path, wanted=Extras(True, True, True)
    )
    probability = nifti.read_volume(tmp_path / 'a_probability.nii.gz').as_stored
    assert probability.shape == SHAPE
    assert probability.dtype == np.float32
    assert Image.open(tmp_path / 'a_preview.png').size[0] > 200
    # The opacity is at low x of a file whose x runs to the Left: in the right lung.
    assert row['right_lesion_ml'] == row['lesion_ml'] > 0
    assert row['left_lesion_ml'] == 0
    assert row['right_lung_ml'] + row['left_lung_ml'] == pytest.approx(row['lung_ml'])
    assert read_csv(tmp_path)[0]['right_lung_ml'] == str(row['right_lung_ml'])


def test_volumes_of_both_lungs_and_doubts_are_always_in_the_results(tmp_path):
    image, _ = draw_chest('a')
    write_stored(tmp_path / 'scans' / 'a.nii.gz', image[:, :, 8:], AFFINE)  # begins in the lungs
    (row,), _ = predict_studies(find_inputs(tmp_path / 'scans'), MODEL, tmp_path)
    assert 'right_lesion_ml' not in row
    assert row['right_lung_ml'] == pytest.approx(row['left_lung_ml'], rel=0.03)
    assert row['right_lung_ml'] + row['left_lung_ml'] == pytest.approx(row['lung_ml'])
    written_row = read_csv(tmp_path)[0]
    assert written_row['right_lung_ml'] == str(row['right_lung_ml'])
    assert written_row['notes'].startswith('the lungs reach the lowest slice; ')


def test_dicom_series_in_mask_on_its_grid_out(tmp_path):
    image, _ = draw_chest('a')
    write_series(tmp_path / 'scans' / 'chest', image, AFFINE)
    (row,), faults = predict_studies(find_inputs(tmp_path / 'scans'), MODEL, tmp_path / 'masks')
    assert not faults
    mask = nifti.read_volume(tmp_path / 'masks' / row['mask'])
    assert mask.lies_on_grid_of(read_image(find_inputs(tmp_path / 'scans')[0]))
    assert mask.as_stored.sum() * mask.voxel_ml == pytest.approx(33.5, rel=0.15)


def count_done(output):
    """How often each study was done, by the journal."""
    text = (output / 'results.0.jsonl').read_text()
    lines = [json.loads(line) for line in text.splitlines() if line.endswith('}')]
    return [sum(line['study_id'] == name for line in lines) for name in 'abcd']


def test_resume_does_what_is_missing_or_of_another_scan_and_keeps_the_rest(tmp_path):
    scans, output = tmp_path / 'scans', tmp_path / 'masks'
    for name in 'abc':
        write_study(scans, name, lesion=False)
    first, _ = predict_studies(find_inputs(scans), MODEL, output, num_workers=0)
    assert count_done(output) == [1, 1, 1, 0]

    # b's mask is gone; c's scan is another; d is new.
    (output / 'b_mask.nii.gz').unlink()
    write_study(scans, 'c', lesion=False, opacity_hu=-400)
    write_study(scans, 'd', lesion=False)
    with (output / 'results.0.jsonl').open('a') as file:
        file.write('{"study_id": "a", "iden')  # cut short by a kill
    before = (output / 'a_mask.nii.gz').stat().st_mtime_ns
    again, _ = predict_studies(find_inputs(scans), MODEL, output, num_workers=0, resume=True)
    assert (output / 'a_mask.nii.gz').stat().st_mtime_ns == before
    assert again[0] == first[0]
    assert nifti.read_volume(output / 'b_mask.nii.gz').as_stored.any()
    assert count_done(output) == [1, 2, 2, 1]
    assert [row['study_id'] for row in read_csv(output)] == list('abcd')

    changed = dataclasses.replace(MODEL, identity='another')
    predict_studies(find_inputs(scans), changed, output, num_workers=0, resume=True)
    assert (output / 'a_mask.nii.gz').stat().st_mtime_ns > before


def test_what_an_earlier_run_left_of_a_study_goes_with_it(tmp_path):
    scans, output = tmp_path / 'scans', tmp_path / 'masks'
    for name in 'ab':
        write_study(scans, name, lesion=False)
    predict_studies(find_inputs(scans), MODEL, output, num_workers=0, wanted=Extras(preview=True))
    (scans / 'b.nii.gz').write_bytes(b'broken')
    changed = dataclasses.replace(MODEL, identity='another')
    predict_studies(find_inputs(scans), changed, output, num_workers=0, resume=True)
    left = {path.name for path in output.iterdir()}
    assert left == {
        'a_mask.nii.gz', 'a_results.json', 'results.csv', 'results.0.jsonl', written.RECORD
    }  # fmt: skip


def read_all(folder):
    return {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def test_human_masks_are_not_written_over_wherever_the_studies_were_found(tmp_path):
    data = tmp_path / 'mydata'
    for name in 'ab':
        write_study(data / 'studies' / 'CT-1', name, lesion=False)
    _, opacity = draw_chest('any')
    write_stored(data / 'masks' / 'b_mask.nii.gz', opacity, AFFINE)
    write_study(tmp_path / 'plain', 'a', lesion=True)
    before = read_all(tmp_path)
    for scans, output, named in (
        (data / 'studies' / 'CT-1', data / 'masks', 'b_mask'),
        (data, data / 'masks', 'b_mask'),
        (tmp_path / 'plain', tmp_path / 'plain', 'a_mask'),
    ):
        for resume in (False, True):
            with pytest.raises(InputError, match=rf'{named}\.nii\.gz: is in the way'):
                predict_studies(find_inputs(scans), MODEL, output, num_workers=0, resume=resume)
        assert read_all(tmp_path) == before


def test_what_a_person_keeps_in_the_output_folder_stays(tmp_path):
    write_study(tmp_path / 'scans', 'a', lesion=False)
    studies, output = find_inputs(tmp_path / 'scans'), tmp_path / 'masks'
    output.mkdir()
    # Nothing of these names is written: they are in nobody's way.
    kept = [output / name for name in ('a_preview.png', 'results.best.jsonl', 'b_mask.nii.gz')]
    for path in kept:
        path.write_text('mine')
    for name in ('results.csv', 'results.0.jsonl', 'results.1.jsonl', 'a_probability.nii.gz'):
        mine = output / name
        mine.write_text('{"mine": 1}\n')
        with pytest.raises(InputError, match=rf'{name}: is in the way'):
            predict_studies(studies, MODEL, output, num_workers=0, wanted=Extras(probability=True))
        assert mine.read_text() == '{"mine": 1}\n'
        mine.unlink()
    predict_studies(studies, MODEL, output, num_workers=0)
    assert [path.read_text() for path in kept] == ['mine'] * 3


@pytest.mark.parametrize('resume', [False, True])
def test_mask_that_a_person_corrected_is_theirs(tmp_path, resume):
    write_study(tmp_path / 'scans', 'a', lesion=False)
    studies, output = find_inputs(tmp_path / 'scans'), tmp_path / 'masks'
    predict_studies(studies, MODEL, output, num_workers=0)
    mask = output / 'a_mask.nii.gz'
    corrected = np.array(nifti.read_volume(mask).as_stored)
    corrected[10, 30, 14] ^= 1
    write_stored(mask, corrected, AFFINE)
    before = read_all(output)
    with pytest.raises(InputError, match=r'a_mask\.nii\.gz: is in the way.* changed since'):
        predict_studies(studies, MODEL, output, num_workers=0, resume=resume)
    assert read_all(output) == before


def write_predicted_plain(folder):
    """A scan with its human mask as .nii, and its prediction beside them."""
    write_study(folder, 'a', lesion=False)
    _, opacity = draw_chest('any')
    write_stored(folder / 'a_mask.nii', opacity, AFFINE)
    before = find_studies(folder)
    everything = Extras(True, True, True, True)
    predict_studies(before, MODEL, folder, num_workers=0, wanted=everything)
    return before, lambda: predict_studies(
        find_studies(folder), MODEL, folder, num_workers=0, wanted=everything
    )


def write_predicted_series(folder):
    """A DICOM series with its prediction in the same folder."""
    image, _ = draw_chest('a')
    write_series(folder, image, AFFINE)
    before = find_studies(folder)
    predict_studies(before, MODEL, folder, num_workers=0)
    return before, lambda: predict_studies(find_studies(folder), MODEL, folder, num_workers=0)


@pytest.mark.parametrize('write', [write_predicted_plain, write_predicted_series])
def test_predictions_among_the_scans_are_neither_scans_nor_human_masks(tmp_path, write):
    before, predict_again = write(tmp_path / 'scans')
    assert len(list((tmp_path / 'scans').glob('*_mask.nii.gz'))) == len(before)
    assert find_studies(tmp_path / 'scans') == before
    checksums = [formats.source_crc32(study.image) for study in before]
    files = describe_data_set(tmp_path / 'scans', tmp_path / 'known.json')
    rows, faults = predict_again()
    assert ([row['study_id'] for row in rows], faults) == ([s.study_id for s in before], [])
    for path in written_by_this_program(tmp_path / 'scans'):
        path.unlink()
    assert [formats.source_crc32(study.image) for study in before] == checksums
    assert describe_data_set(tmp_path / 'scans', tmp_path / 'known.json') == files


def written_by_this_program(folder):
    return [path for path in folder.iterdir() if written.is_output(path)]


def test_predictions_among_human_masks_are_none(tmp_path):
    for name in 'ab':
        write_study(tmp_path / 'studies' / 'CT-1', name, lesion=False)
    _, opacity = draw_chest('any')
    write_stored(tmp_path / 'masks' / 'a_mask.nii.gz', opacity, AFFINE)
    before = find_studies(tmp_path)
    predict_studies([before[1]], MODEL, tmp_path / 'masks', num_workers=0)
    assert (tmp_path / 'masks' / 'b_mask.nii.gz').exists()
    assert find_studies(tmp_path) == before
    # A person looks through it and keeps it, corrected: now it is a human mask.
    write_stored(tmp_path / 'masks' / 'b_mask.nii.gz', opacity[::-1], AFFINE)
    assert find_studies(tmp_path)[1].lesion_mask == tmp_path / 'masks' / 'b_mask.nii.gz'


class Killed(BaseException):
    pass


@pytest.mark.parametrize('resume', [False, True])
@pytest.mark.parametrize('moment', ['before the mask has its name', 'after'])
def test_run_killed_around_the_moment_when_a_mask_is_replaced_goes_on(
    tmp_path, monkeypatch, moment, resume
):
    write_study(tmp_path / 'scans', 'a', lesion=False)
    studies, output = find_inputs(tmp_path / 'scans'), tmp_path / 'masks'
    predict_studies(studies, MODEL, output, num_workers=0)
    replace = pathlib.Path.replace

    def die(self, target):
        if target.name == 'a_mask.nii.gz':
            if moment == 'after':
                replace(self, target)
            raise Killed
        return replace(self, target)

    mask = output / 'a_mask.nii.gz'
    first = mask.read_bytes()
    other = dataclasses.replace(
        MODEL, identity='another', probabilities=(lambda _, lungs: 0.9 * lungs,)
    )
    monkeypatch.setattr(pathlib.Path, 'replace', die)
    with pytest.raises(Killed):
        predict_studies(studies, other, output, num_workers=0)
    monkeypatch.undo()
    assert mask.exists() == (moment == 'after')
    _, faults = predict_studies(studies, other, output, num_workers=0, resume=resume)
    assert not faults
    assert count_done(output) == [1, 0, 0, 0]
    assert mask.read_bytes() != first


def test_without_resume_all_is_done_again(tmp_path):
    write_study(tmp_path / 'scans', 'a', lesion=False)
    studies = find_inputs(tmp_path / 'scans')
    for _ in range(2):
        predict_studies(studies, MODEL, tmp_path, num_workers=0)
    assert count_done(tmp_path) == [1, 0, 0, 0]
