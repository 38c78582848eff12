"""Studies are found in MosMed's layout and in plain folders; what is wrong is named."""

import pathlib
import zipfile

import openpyxl
import pytest

from covseg_jax import written
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
    # Scans of one's own may lie so, without a registry, and are no MosMedData.
    data_set = 'MosMedData' if registry else tmp_path.name
    assert {healthy.data_set, covid.data_set} == {data_set}


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
    with pytest.raises(InputError, match='no such file or folder'):
        studies.find_studies(tmp_path / 'absent')
    with pytest.raises(InputError, match='no such file or folder'):
        studies.find_inputs(tmp_path / 'absent.nii.gz')
    with pytest.raises(InputError, match='no studies; it should hold'):
        studies.find_studies(tmp_path)


def test_files_that_a_registry_names_and_that_are_absent_stay_named(tmp_path):
    # Left out, a study without its mask would be trained on; it is told when it is read.
    _write_registry(tmp_path / 'dataset_registry.csv')
    _touch(tmp_path, 'studies/CT-0/study_0001.nii.gz')
    _, covid = studies.find_studies(tmp_path)
    assert covid.image == tmp_path / 'studies/CT-1/study_0255.nii.gz'
    assert covid.lesion_mask == tmp_path / 'masks/study_0255_mask.nii.gz'


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


def test_names_that_cannot_be_study_ids_are_refused_or_passed_over(tmp_path):
    nnunet = tmp_path / 'nnunet' / 'imagesTr'
    nnunet.mkdir(parents=True)
    (nnunet / '_0000.nii.gz').touch()  # the id would be '', and its case the whole folder
    with pytest.raises(InputError, match="study id '' cannot name a folder; rename"):
        studies.find_studies(tmp_path / 'nnunet')
    mosmed = tmp_path / 'mosmed' / 'studies' / 'CT-0'
    mosmed.mkdir(parents=True)
    for name in ('study_0001.nii.gz', '._study_0001.nii.gz', '.nii.gz'):
        (mosmed / name).touch()
    assert [s.study_id for s in studies.find_studies(tmp_path / 'mosmed')] == ['study_0001']


@pytest.mark.parametrize('content', [b'study_file\n\xff\xfe', b'study_file\n' + b'a' * 200_000])
def test_registry_that_is_no_text_is_refused(tmp_path, content):
    (tmp_path / 'dataset_registry.csv').write_bytes(content)
    with pytest.raises(InputError, match=r'dataset_registry\.csv: '):
        studies.find_studies(tmp_path)


def test_study_that_is_there_twice_is_refused(tmp_path):
    _touch(tmp_path, 'a.nii', 'a.nii.gz')
    with pytest.raises(InputError, match='study a occurs twice'):
        studies.find_studies(tmp_path)


def test_zenodo_layout_knows_the_windowed_cases(tmp_path):
    for name in ('coronacases_001', 'radiopaedia_10_85902_1'):
        _touch(
            tmp_path,
            f'COVID-19-CT-Seg_20cases/{name}.nii.gz',
            f'Infection_Mask/{name}.nii.gz',
            f'Lung_Mask/{name}.nii.gz',
        )
    corona, radiopaedia = studies.find_studies(tmp_path)
    assert corona.lesion_mask == tmp_path / 'Infection_Mask/coronacases_001.nii.gz'
    assert corona.lung_mask == tmp_path / 'Lung_Mask/coronacases_001.nii.gz'
    assert (corona.window, radiopaedia.window) == (None, (0.0, 255.0, -1250.0, 250.0))


@pytest.mark.parametrize('part', ['', 'Train/'])
def test_covid19_20_layout(tmp_path, part):
    name = 'volume-covid19-A-0003'
    _touch(tmp_path, f'{part}{name}_ct.nii.gz', f'{part}{name}_seg.nii.gz')
    (study,) = studies.find_studies(tmp_path)
    assert (study.study_id, study.data_set) == (name, 'COVID-19-20')
    assert study.lesion_mask == tmp_path / f'{part}{name}_seg.nii.gz'


def test_nnunet_layout(tmp_path):
    _touch(tmp_path, 'dataset.json', 'imagesTr/a_0000.nii.gz', 'labelsTr/a.nii.gz')
    _touch(tmp_path, 'imagesTs/b_0000.nii.gz', 'imagesTr/.hidden_0000.nii.gz')
    first, second = studies.find_studies(tmp_path)
    assert (first.study_id, first.lesion_mask) == ('a', tmp_path / 'labelsTr/a.nii.gz')
    assert (second.study_id, second.lesion_mask) == ('b', None)


def test_what_this_program_wrote_is_no_study_and_no_mask_in_any_layout(tmp_path):
    folders = {
        'mosmed': ('studies/CT-1/a.nii.gz', 'studies/CT-1/a_mask.nii.gz', 'masks/a_mask.nii.gz',
                   'lung_masks/a_lungs.nii.gz'),
        'plain': ('a.nii.gz', 'a_mask.nii.gz', 'a_lungs.nii.gz', 'a_probability.nii.gz'),
        'zenodo': ('COVID-19-CT-Seg_20cases/a.nii.gz', 'COVID-19-CT-Seg_20cases/a_mask.nii.gz',
                   'Infection_Mask/a.nii.gz', 'Lung_Mask/a.nii.gz'),
        'covid19_20': ('volume-covid19-a_ct.nii.gz', 'volume-covid19-a_seg.nii.gz'),
        'nnunet': ('imagesTr/a_0000.nii.gz', 'labelsTr/a.nii.gz'),
    }  # fmt: skip
    for layout, (scan, *outputs) in folders.items():
        _touch(tmp_path / layout, scan)
        for name in outputs:
            written.write_text(tmp_path / layout / name, 'ours')
        (study,) = studies.find_studies(tmp_path / layout)
        assert study.image == tmp_path / layout / scan
        assert (study.lesion_mask, study.lung_mask) == (None, None), layout


def test_mask_that_a_registry_names_and_this_program_wrote_is_refused(tmp_path):
    # Taken for a human mask it would be scored against; left out, its study would be trained on.
    _write_registry(tmp_path / 'dataset_registry.csv')
    _touch(tmp_path, 'studies/CT-0/study_0001.nii.gz', 'studies/CT-1/study_0255.nii.gz')
    written.write_text(tmp_path / 'masks' / 'study_0255_mask.nii.gz', 'ours')
    with pytest.raises(
        InputError, match=r'study_0255_mask\.nii\.gz: dataset_registry\.csv names it'
    ):
        studies.find_studies(tmp_path)
    _touch(tmp_path, 'masks/study_0255_mask.nii')  # a Kaggle copy's own
    _, covid = studies.find_studies(tmp_path)
    assert covid.lesion_mask == tmp_path / 'masks/study_0255_mask.nii'


def test_layout_can_be_named_and_a_wrong_name_is_refused(tmp_path):
    _touch(tmp_path, 'dataset_registry.csv', 'a.nii.gz')
    (study,) = studies.find_studies(tmp_path, 'plain')
    assert study.study_id == 'a'
    with pytest.raises(InputError, match=r'data\.layout .plane.: one of auto, mosmed'):
        studies.find_studies(tmp_path, 'plane')


def test_workbook_that_would_fill_the_memory_is_refused(tmp_path):
    path = tmp_path / 'dataset_registry.xlsx'
    openpyxl.Workbook().save(path)
    with zipfile.ZipFile(path, 'a', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('xl/sharedStrings.xml', b' ' * 2**28)
    with pytest.raises(InputError, match=r'dataset_registry\.xlsx: .* unpack to 268,') as error:
        studies.find_studies(tmp_path)
    assert '\n' not in str(error.value)


def _find(folder):
    strays = []
    return studies.find_studies(folder, 'auto', strays.append), [str(stray) for stray in strays]


def test_names_that_browsers_and_people_make_are_studies(tmp_path):
    names = ['scan (1)', 'a[2]', "it's, a & b", '-x', 'é #5', '(1)']
    _touch(tmp_path, *(f'{name}.nii.gz' for name in names), 'scan (1)_mask.nii.gz')
    found, strays = _find(tmp_path)
    assert ({study.study_id for study in found}, strays) == (set(names), [])
    (masked,) = [study for study in found if study.lesion_mask]
    assert masked.lesion_mask == tmp_path / 'scan (1)_mask.nii.gz'


def test_bad_name_never_stops_the_folder(tmp_path):
    # What Windows forbids in a name, twice to the same id, and a name too long for its masks.
    _touch(tmp_path, 'a:b.nii.gz', 'a?b.nii.gz', 'c*.nii.gz', f'{"x" * 240}.nii.gz', 'good.nii')
    found, strays = _find(tmp_path)
    ids = [study.study_id for study in found]
    assert (len(set(ids)), strays) == (5, [])
    assert {'good', 'c_'} < set(ids)
    assert sum(name.startswith('a_b_') for name in ids) == 2
    assert max(map(len, ids)) < 200
    _touch(tmp_path / 'nnunet', 'imagesTr/_0000.nii.gz', 'imagesTr/a_0000.nii.gz')
    (study,), strays = _find(tmp_path / 'nnunet')
    assert study.study_id == 'a'
    assert strays == [
        "_0000.nii.gz: study id '' cannot name a folder, so it is passed over; rename its file or "
        'folder'
    ]


LONE_MASKS = {
    'plain': (['a.nii.gz', 'b_mask.nii.gz', 'c_lungs.nii'], ['b_mask.nii.gz', 'c_lungs.nii']),
    'mosmed': (
        ['studies/CT-1/a.nii.gz', 'masks/b_mask.nii.gz', 'masks/c.nii'],
        ['b_mask.nii.gz', 'c.nii'],
    ),
    'zenodo': (
        ['COVID-19-CT-Seg_20cases/a.nii.gz', 'Infection_Mask/b.nii.gz', 'Lung_Mask/a.nii.gz'],
        ['b.nii.gz'],
    ),
    'covid19_20': (
        ['volume-covid19-a_ct.nii.gz', 'volume-covid19-b_seg.nii.gz'],
        ['volume-covid19-b_seg.nii.gz'],
    ),
    'nnunet': (['imagesTr/a_0000.nii.gz', 'labelsTr/b.nii.gz'], ['b.nii.gz']),
}


@pytest.mark.parametrize(
    'files', [['imagesTr/a_0000.nii', 'imagesTr/b.nii'], ['volume-covid19-a_ct.nii', 'b.nii']]
)
def test_file_that_its_layout_has_no_name_for_is_named(tmp_path, files):
    _touch(tmp_path, *files)
    found, strays = _find(tmp_path)
    assert len(found) == 1
    assert len(strays) == 1
    assert strays[0].startswith('b.nii: its name is that of no scan or mask in the layout')


@pytest.mark.parametrize('layout', LONE_MASKS)
def test_mask_without_its_scan_is_named_in_every_layout(tmp_path, layout):
    files, lone = LONE_MASKS[layout]
    _touch(tmp_path, *files)
    found, strays = _find(tmp_path)
    assert len(found) == 1
    assert [stray.split(':')[0] for stray in strays] == lone
    assert all('a mask without its scan' in stray for stray in strays)


def test_folder_of_masks_alone_says_so(tmp_path):
    _touch(tmp_path, 'a_mask.nii.gz', 'b_mask.nii.gz')
    with pytest.raises(
        InputError, match=r'no studies; a_mask\.nii\.gz: a mask without .*1 more such'
    ):
        studies.find_studies(tmp_path)


def test_links_that_lead_nowhere_are_named(tmp_path):
    _touch(tmp_path, 'a.nii.gz', 'b.nii.gz')
    for name in ('gone.nii.gz', 'b_mask.nii.gz', 'notes.txt'):
        (tmp_path / name).symlink_to(f'/no/such/{name}')
    found, strays = _find(tmp_path)
    # A scan of its own and a mask of b's: reading them tells.
    assert [study.study_id for study in found] == ['a', 'b', 'gone']
    assert found[1].lesion_mask == tmp_path / 'b_mask.nii.gz'
    assert len(strays) == 1
    assert strays[0].startswith('notes.txt: a link to /no/such/notes.txt, which is not there; ')
    with pytest.raises(InputError, match=r'gone\.nii\.gz: a link to .* which is not there; fetch'):
        studies.find_inputs(tmp_path / 'gone.nii.gz')


def test_scans_in_folders_are_found_where_the_folder_itself_has_none(tmp_path):
    _touch(tmp_path, 'p1/day 1/ct.nii.gz', 'p1/day 1/ct_mask.nii.gz', 'p2/ct.nii', 'p2/b_mask.nii')
    found, strays = _find(tmp_path)
    assert [study.study_id for study in found] == ['p1_day 1_ct', 'p2_ct']
    assert found[0].lesion_mask == tmp_path / 'p1/day 1/ct_mask.nii.gz'
    assert [stray.split(':')[0] for stray in strays] == ['b_mask.nii']
    _touch(tmp_path, 'a.nii.gz')  # as in a folder of scans beside one of other files
    assert [study.study_id for study in _find(tmp_path)[0]] == ['a']


def test_nifti_files_below_others_are_told_to_be_left_out(tmp_path):
    for name in ('a.nii.gz', 'sub/b.nii.gz', 'sub/c.nii.gz', 'sub/c_mask.nii.gz'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (study,), (stray,) = _find(tmp_path)
    assert study.study_id == 'a'
    assert stray.startswith('sub: its NIfTI files are left out')
