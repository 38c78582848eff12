"""Studies are found in MosMed's layout and in plain folders; what is wrong is named."""

import pathlib

import openpyxl
import pytest

from covseg_jax.errors import InputError
from covseg_jax.imaging import studies

ROWS = [
    ('study_id', 'category', 'study_file', 'mask_file'),
    ('study_0255', 'CT-1', '/studies/CT-1/study_0255.nii.gz', '/masks/study_0255_mask.nii.gz'),
    ('study_0001', 'CT-0', '/studies/CT-0/study_0001.nii.gz', None),
]


def _touch(folder: pathlib.Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def _write_registry(path: pathlib.Path, rows=ROWS) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == '.csv':
        lines = [','.join(cell or '' for cell in row) for row in rows]
        path.write_text('\n'.join(lines), encoding='utf-8-sig')  # with a byte-order mark
    else:
        book = openpyxl.Workbook()
        for row in rows:
            book.active.append(row)
        book.save(path)


@pytest.mark.parametrize('registry', ['dataset_registry.xlsx', 'dataset_registry.csv', None])
@pytest.mark.parametrize('suffix', ['.nii.gz', '.nii'])
def test_mosmed_layout_is_found_with_either_registry_or_none(tmp_path, registry, suffix):
    if registry:
        _write_registry(tmp_path / registry)
    _touch(
        tmp_path,
        f'studies/CT-1/study_0255{suffix}',
        f'studies/CT-0/study_0001{suffix}',
        f'masks/study_0255_mask{suffix}',
    )
    healthy, covid = studies.find_studies(tmp_path)
    assert (healthy.study_id, healthy.category, healthy.lesion_mask) == ('study_0001', 'CT-0', None)
    assert healthy.image == tmp_path / f'studies/CT-0/study_0001{suffix}'
    assert (covid.study_id, covid.category) == ('study_0255', 'CT-1')
    assert covid.lesion_mask == tmp_path / f'masks/study_0255_mask{suffix}'
    assert {healthy.data_set, covid.data_set} == {'MosMedData'}


def test_plain_folder_takes_masks_as_masks(tmp_path):
    _touch(tmp_path, 'b.nii', 'a.nii.gz', 'a_mask.nii.gz', 'a_lungs.nii', 'lung_mask.nii.gz')
    _touch(tmp_path, 'notes.txt', '.tmp-1-c.nii.gz')
    first, second = studies.find_studies(tmp_path)
    assert (first.study_id, second.study_id) == ('a', 'b')
    assert first.lesion_mask == tmp_path / 'a_mask.nii.gz'
    assert first.lung_mask == tmp_path / 'a_lungs.nii'
    assert (second.lesion_mask, second.lung_mask, second.category) == (None, None, None)
    assert first.data_set == tmp_path.name


def test_single_file_is_one_input(tmp_path):
    _touch(tmp_path, 'scan.v2.nii.gz', 'scan.txt')
    (study,) = studies.find_inputs(tmp_path / 'scan.v2.nii.gz')
    assert (study.study_id, study.image) == ('scan.v2', tmp_path / 'scan.v2.nii.gz')
    assert studies.find_inputs(tmp_path) == (study,)
    with pytest.raises(InputError, match=r'not a \.nii or \.nii\.gz file'):
        studies.find_inputs(tmp_path / 'scan.txt')


def test_missing_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(InputError, match='no such folder'):
        studies.find_studies(tmp_path / 'absent')
    with pytest.raises(InputError, match='no such folder'):
        studies.find_inputs(tmp_path / 'absent.nii.gz')
    with pytest.raises(InputError, match='no studies; it should hold'):
        studies.find_studies(tmp_path)


def test_registry_rows_without_files_are_counted_and_the_first_named(tmp_path):
    _write_registry(tmp_path / 'dataset_registry.csv')
    _touch(tmp_path, 'studies/CT-0/study_0001.nii.gz')
    with pytest.raises(InputError, match=r'CT-1/study_0255\.nii\.gz: .*\(2 such files'):
        studies.find_studies(tmp_path)


@pytest.mark.parametrize(
    ('row', 'words'),
    [
        (('a', 'CT-0', '/studies/../../secret.nii.gz', ''), 'leaves the data set'),
        (('a', 'CT-0', '..\\secret.nii.gz', ''), 'leaves the data set'),
        (('a', 'CT-0', 'C:/secret.nii.gz', ''), 'leaves the data set'),
        (('../a', 'CT-0', '/studies/a.nii.gz', ''), 'cannot name a folder'),
        (('a', 'CT-9', '/studies/a.nii.gz', ''), "category 'CT-9'"),
    ],
)
def test_registry_rows_that_cannot_be_true_are_refused(tmp_path, row, words):
    _touch(tmp_path, 'data/studies/a.nii.gz', 'secret.nii.gz')
    _write_registry(tmp_path / 'data/dataset_registry.csv', [ROWS[0], row])
    with pytest.raises(InputError, match=words):
        studies.find_studies(tmp_path / 'data')


def test_registry_of_another_kind_is_refused(tmp_path):
    _write_registry(tmp_path / 'dataset_registry.csv', [('name', 'age'), ('a', '3')])
    with pytest.raises(InputError, match=r'no column study_file \(columns: name, age\)'):
        studies.find_studies(tmp_path)
    (tmp_path / 'dataset_registry.xlsx').write_text('no workbook')
    with pytest.raises(InputError, match='not a readable workbook'):
        studies.find_studies(tmp_path)


def test_study_that_is_there_twice_is_refused(tmp_path):
    _touch(tmp_path, 'a.nii', 'a.nii.gz')
    with pytest.raises(InputError, match='study a is there twice'):
        studies.find_studies(tmp_path)
