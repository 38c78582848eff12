"""Folders of masks from any tool."""

import numpy as np
import pytest

from covseg_jax import written
from covseg_jax.errors import FileFault, InputError
from covseg_jax.evaluation.folders import pair_masks, score_folder
from covseg_jax.evaluation.scores import read_tables
from tests.imaging.chest import write_stored

AFFINE = np.diag([2.0, 2.0, 5.0, 1.0])


def write(path, *places, shape=(6, 6, 3), affine=AFFINE):
    data = np.zeros(shape, np.uint8)
    for place in places:
        data[place] = 1
    write_stored(path, data, affine)


def test_masks_are_paired_by_study_and_scored(tmp_path):
    predictions, truths = tmp_path / 'predictions', tmp_path / 'truths'
    write(predictions / 'study_0001_mask.nii.gz', (0, 0, 0), (1, 0, 0))
    write(predictions / 'study_0002_0000.nii.gz', (5, 5, 2))
    write(predictions / 'study_0003.nii.gz')
    write(truths / 'study_0001.nii.gz', (1, 0, 0))
    write(truths / 'study_0002_mask.nii', (5, 5, 2))
    pairs, alone = pair_masks(predictions, truths)
    assert [study_id for study_id, _, _ in pairs] == ['study_0001', 'study_0002']
    assert alone == ['study_0003']
    summary = score_folder(pairs, tmp_path / 'scores')
    volume = summary['protocols']['volume']
    assert volume['dice']['mean'] == pytest.approx((2 / 3 + 1) / 2)
    # without lungs what refers to them is undefined, and nothing is made up
    assert volume['specificity_lung']['mean'] is None
    assert volume['specificity_image']['n'] == 2
    assert (tmp_path / 'scores' / 'summary.json').exists()


def test_what_this_program_wrote_is_scored_and_never_the_truth(tmp_path):
    for name in ('a', 'b'):
        write(tmp_path / 'masks' / f'{name}.nii.gz', (0, 0, 0))
        write(tmp_path / 'other' / f'{name}.nii.gz', (0, 0, 0))
    # b was predicted into the folder of human masks.
    data = np.ones((6, 6, 3), np.uint8)
    write_stored(tmp_path / 'masks' / 'b_mask.nii.gz', data, AFFINE, written.new_file)
    (tmp_path / 'masks' / 'b.nii.gz').unlink()
    pairs, alone = pair_masks(tmp_path / 'other', tmp_path / 'masks')
    assert ([name for name, _, _ in pairs], alone) == (['a'], ['b'])
    pairs, _ = pair_masks(tmp_path / 'masks', tmp_path / 'other')
    assert [name for name, _, _ in pairs] == ['a', 'b']


def test_masks_of_a_folder_are_scored_over_the_subjects_that_a_pattern_names(tmp_path):
    for name, place in (('p1_a', (0, 0, 0)), ('p1_b', (1, 0, 0)), ('p2_a', (0, 0, 0))):
        write(tmp_path / 'a' / f'{name}.nii.gz', (0, 0, 0))
        write(tmp_path / 'b' / f'{name}.nii.gz', place)
    pairs, _ = pair_masks(tmp_path / 'a', tmp_path / 'b')
    summary = score_folder(pairs, tmp_path / 'scores', '(p.)_')
    assert (summary['studies'], summary['subjects']) == (3, 2)
    # Two draws of p1 (Dice 1 and 0) and p2 (1): the mean is 1/2, 2/3 or 1.
    assert summary['protocols']['volume']['dice']['ci95'] == pytest.approx([0.5, 1])
    case_rows, slice_rows = read_tables(tmp_path / 'scores')
    assert [row['subject'] for row in case_rows] == ['p1', 'p1', 'p2']
    assert {row['subject'] for row in slice_rows} == {'p1', 'p2'}
    with pytest.raises(InputError, match='subject_pattern'):
        score_folder(pairs, tmp_path / 'scores', 'p1_')


def test_masks_of_another_grid_and_doubled_ones_are_named(tmp_path):
    write(tmp_path / 'a' / 'x.nii.gz', (0, 0, 0), affine=2 * AFFINE)
    write(tmp_path / 'b' / 'x.nii.gz', (0, 0, 0))
    pairs, _ = pair_masks(tmp_path / 'a', tmp_path / 'b')
    with pytest.raises(FileFault, match=r'x\.nii\.gz: lies on another grid'):
        score_folder(pairs, tmp_path / 'scores')
    write(tmp_path / 'a' / 'x_mask.nii.gz')
    with pytest.raises(InputError, match='are both masks of x'):
        pair_masks(tmp_path / 'a', tmp_path / 'b')


def write_values(path, values):
    write_stored(path, np.reshape([values, values], (2, 2, 2)).astype(np.float32), AFFINE)


def test_a_scan_is_no_truth(tmp_path):
    write_values(tmp_path / 'a' / 'x.nii.gz', [0, 1, 0, 0])
    for values in ([-900, 40, 30, -1000], [0, 1024, 0, 3]):
        write_values(tmp_path / 'b' / 'x.nii.gz', values)
        pairs, _ = pair_masks(tmp_path / 'a', tmp_path / 'b')
        with pytest.raises(FileFault, match='a scan, not a mask of labels'):
            score_folder(pairs, tmp_path / 'scores')


def test_what_rounding_left_of_zero_is_no_lesion(tmp_path):
    write_values(tmp_path / 'a' / 'x.nii.gz', [0, 1, 0, 0])
    write_values(tmp_path / 'b' / 'x.nii.gz', [1e-6, 1, -1e-6, 0])
    pairs, _ = pair_masks(tmp_path / 'a', tmp_path / 'b')
    summary = score_folder(pairs, tmp_path / 'scores')
    assert summary['protocols']['volume']['dice']['mean'] == 1


def test_a_study_of_its_own_name_in_0000_is_paired_with_itself(tmp_path):
    for name in ('case_0000', 'case_0001'):
        write(tmp_path / 'a' / f'{name}_mask.nii.gz', (0, 0, 0))
        write(tmp_path / 'b' / f'{name}.nii.gz', (0, 0, 0))
    pairs, alone = pair_masks(tmp_path / 'a', tmp_path / 'b')
    assert [name for name, _, _ in pairs] == ['case_0000', 'case_0001']
    assert alone == []


def test_volumes_of_a_tilted_scan_are_those_of_its_voxels(tmp_path):
    """At 45 degrees a voxel of 2 x 2 x 5 mm, measured along its axes, has √½ of 20 mm³."""
    affine = AFFINE.copy()
    affine[:3, 2] = 5 * np.array([0, np.sqrt(0.5), np.sqrt(0.5)])
    for folder in ('a', 'b'):
        write(tmp_path / folder / 'x.nii.gz', (0, 0, 0), (1, 0, 0), affine=affine)
    pairs, _ = pair_masks(tmp_path / 'a', tmp_path / 'b')
    score_folder(pairs, tmp_path / 'scores')
    (row,), _ = read_tables(tmp_path / 'scores')
    assert row['volume_ml_true'] == pytest.approx(0.04 * np.sqrt(0.5))
