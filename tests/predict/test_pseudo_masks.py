"""Pseudo-masks on the studies' own grids, and who stands in the training set made of them."""

import json

import nibabel
import numpy as np
import pytest

from covseg_jax.errors import InputError
from covseg_jax.imaging import geometry as geometries
from covseg_jax.imaging import nifti
from covseg_jax.imaging.masks import MaskSettings, mask_on_study_grid
from covseg_jax.imaging.studies import find_studies
from covseg_jax.predict.pseudo_masks import (
    refuse_foreign_files,
    write_nnunet_data_set,
    write_pseudo_masks,
)
from covseg_jax.prepare.cases import find_cases, split_cases
from covseg_jax.prepare.prepare_studies import prepare_studies
from tests.imaging.chest import AFFINE, SHAPE, write_stored, write_study
from tests.settings import prepare_settings

SETTINGS = MaskSettings(0.5, min_component_ml=0.1)


@pytest.fixture
def cohort(tmp_path):
    """Three healthy studies, of which one is held out, two to learn from (one of them plain .nii)
    and one with a human mask: (splits, study id -> study)."""
    folder = tmp_path / 'data' / 'studies'
    for category, names in (('CT-0', ('h1', 'h2', 'h3')), ('CT-2', ('c1', 'c2', 'e1'))):
        (folder / category).mkdir(parents=True)
        for name in names:
            write_study(folder / category, name, lesion=False)
    zipped = folder / 'CT-2' / 'c2.nii.gz'
    volume = nifti.read_volume(zipped)
    write_stored(zipped.with_suffix(''), volume.as_stored, AFFINE)
    zipped.unlink()
    write_stored(tmp_path / 'data/masks/e1_mask.nii.gz', volume.as_stored > 0, AFFINE)
    studies = find_studies(tmp_path / 'data')
    prepare_studies(
        studies, tmp_path / 'prepared', prepare_settings(grid=(28, 64, 64)), num_workers=1
    )
    splits = split_cases(
        find_cases(tmp_path / 'prepared'), seed=0, calibration_fraction=0.3, validation_fraction=0.5
    )
    return splits, {study.study_id: study for study in studies}


def read_pseudo_mask(case):
    # (-500 + 1000) / 1400 in the opacity against (-850 + 1000) / 1400 around it
    return np.clip(np.asarray(case.image(), np.float32) * 2, 0, 1).astype(np.float16)


def write_all(cohort, folder):
    splits, studies = cohort
    covid = splits.train + splits.validation + splits.evaluation
    write_pseudo_masks(covid, read_pseudo_mask, folder / 'masks', SETTINGS)
    return write_nnunet_data_set(splits, studies, folder / 'masks', folder / 'raw')


def test_pseudo_masks_are_those_of_the_evaluation_on_each_studys_grid(cohort, tmp_path):
    splits, _ = cohort
    write_all(cohort, tmp_path)
    for case in splits.train + splits.validation + splits.evaluation:
        soft, lungs = read_pseudo_mask(case).astype(np.float32), np.asarray(case.lungs())
        wanted = mask_on_study_grid(soft, lungs, case.geometry, SETTINGS)
        mask, probability = (
            nifti.read_volume(tmp_path / f'masks/{case.study_id}_{kind}.nii.gz')
            for kind in ('mask', 'probability')
        )
        assert (mask.as_stored.dtype, probability.as_stored.dtype) == (np.uint8, np.float32)
        for found in (mask, probability):
            assert found.as_stored.shape == SHAPE
            np.testing.assert_array_equal(found.affine, AFFINE)
        assert wanted.mask.any()
        np.testing.assert_array_equal(mask.array, wanted.mask)
        inside = geometries.from_canonical(wanted.lungs, AFFINE)
        assert not probability.as_stored[~inside].any()
        # 2 · 500 / 1400 well inside the opacity at (-65, 10, 0) mm; the lungs around have 0.21.
        assert probability.as_stored[23, 34, 14] == pytest.approx(0.714, abs=0.01)


def test_nnunet_data_set_holds_what_the_networks_learn_from_and_nothing_else(cohort, tmp_path):
    splits, studies = cohort
    data_set = write_all(cohort, tmp_path)
    assert data_set.name == 'Dataset501_CovidPseudoMasks'
    (held_out,) = splits.healthy_calibration
    wanted = {'c1', 'c2', 'h1', 'h2', 'h3'} - {held_out.study_id}
    assert {p.name for p in (data_set / 'imagesTr').iterdir()} == {
        f'{name}_0000.nii.gz' for name in wanted
    }
    assert {p.name for p in (data_set / 'labelsTr').iterdir()} == {f'{n}.nii.gz' for n in wanted}
    described = json.loads((data_set / 'dataset.json').read_text())
    assert described['numTraining'] == 4
    assert described['labels'] == {'background': 0, 'lesion': 1}
    assert '2 studies of COVID-19' in described['description']
    assert '2 healthy' in described['description']
    for name in wanted:
        image = nifti.read_volume(data_set / 'imagesTr' / f'{name}_0000.nii.gz')
        label = nifti.read_volume(data_set / 'labelsTr' / f'{name}.nii.gz')
        source = studies[name].image
        if source.suffix == '.gz':
            copy = data_set / 'imagesTr' / f'{name}_0000.nii.gz'
            assert copy.read_bytes() == source.read_bytes()
        np.testing.assert_array_equal(image.as_stored, nifti.read_volume(source).as_stored)
        assert label.as_stored.shape == image.as_stored.shape
        np.testing.assert_array_equal(label.affine, image.affine)
        mask = np.zeros(SHAPE)
        if name.startswith('c'):
            mask = nifti.read_volume(tmp_path / f'masks/{name}_mask.nii.gz').as_stored
        np.testing.assert_array_equal(label.as_stored, mask)


def test_second_call_writes_only_what_is_missing_or_new(cohort, tmp_path):
    splits, _ = cohort
    data_set = write_all(cohort, tmp_path)
    files = [p for name in ('masks', 'raw') for p in (tmp_path / name).rglob('*.gz')]
    whole = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
    missing = data_set / 'labelsTr' / 'c1.nii.gz', data_set / 'imagesTr' / 'c2_0000.nii.gz'
    for path in missing:
        path.unlink()
    write_all(cohort, tmp_path)
    for path, (mtime_ns, content) in whole.items():
        assert path.read_bytes() == content
        assert (path.stat().st_mtime_ns == mtime_ns) == (path not in missing)
    # Pseudo-masks made anew, with the same files there and whole.
    write_pseudo_masks(splits.train, lambda case: 0 * case.image(), tmp_path / 'masks', SETTINGS)
    name = splits.train[0].study_id
    assert not nifti.read_volume(tmp_path / f'masks/{name}_mask.nii.gz').as_stored.any()


def test_what_is_not_ours_or_was_changed_is_refused_before_any_work(cohort, tmp_path):
    splits, _ = cohort

    def refuse():
        cases = splits.train + splits.validation + splits.evaluation
        refuse_foreign_files(cases, tmp_path / 'masks', splits, tmp_path / 'raw')

    data_set = write_all(cohort, tmp_path)
    for path in (
        tmp_path / 'masks' / 'e1_mask.nii.gz',
        tmp_path / 'masks' / 'c1_probability.nii.gz',
        data_set / 'imagesTr' / 'c2_0000.nii.gz',
        data_set / 'labelsTr' / 'c1.nii.gz',
        data_set / 'dataset.json',
    ):
        refuse()
        ours = path.read_bytes()
        path.write_bytes(ours[:-3] + b'abc')
        with pytest.raises(InputError, match=rf'{path}: is in the way'):
            refuse()
        with pytest.raises(InputError, match=rf'{path}: is in the way'):
            write_all(cohort, tmp_path)
        assert path.read_bytes() == ours[:-3] + b'abc'
        path.write_bytes(ours)


def test_nnunet_data_set_has_scans_and_no_human_masks(cohort, tmp_path):
    data_set = write_all(cohort, tmp_path)
    found = find_studies(data_set)
    assert len(found) == len(list((data_set / 'imagesTr').iterdir())) == 4
    assert [study.lesion_mask for study in found] == [None] * 4
    assert len(find_studies(data_set / 'imagesTr')) == 4


def test_header_that_readers_take_differently_is_not_copied(cohort, tmp_path):
    _, studies = cohort
    source = studies['c1'].image
    volume = nifti.read_volume(source)
    # The same voxels with a fourth axis.
    nibabel.save(nibabel.Nifti1Image(volume.as_stored[..., None], volume.affine), source)
    data_set = write_all(cohort, tmp_path)
    found = nibabel.load(data_set / 'imagesTr' / 'c1_0000.nii.gz')
    assert found.shape == SHAPE


def test_data_set_refuses_a_strangers_case_and_an_image_that_changed(cohort, tmp_path):
    splits, studies = cohort
    data_set = write_all(cohort, tmp_path)
    (data_set / 'imagesTr' / 'c1_0000.nii.gz').unlink()
    write_study(studies['c1'].image.parent, 'c1', lesion=False, opacity_hu=-400)
    with pytest.raises(InputError, match=r'c1\.nii\.gz: is not the image that was prepared'):
        write_nnunet_data_set(splits, studies, tmp_path / 'masks', tmp_path / 'raw')
    write_stored(data_set / 'imagesTr' / 'e1_0000.nii.gz', np.zeros(SHAPE, np.uint8), AFFINE)
    with pytest.raises(InputError, match=r'e1_0000\.nii\.gz: not a case of this training set'):
        write_nnunet_data_set(splits, studies, tmp_path / 'masks', tmp_path / 'raw')
