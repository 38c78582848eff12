"""A data set's description changes with its contents, and with nothing else."""

import os
import shutil

import pytest

from covseg_jax import checksums


@pytest.fixture
def data_set(tmp_path):
    folder = tmp_path / 'data'
    for name in ('CT-0/a.nii', 'CT-1/b.nii', 'masks/b_mask.nii'):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


@pytest.fixture
def describe(tmp_path):
    return lambda folder: checksums.describe_data_set(folder, tmp_path / 'known.json')


def test_touched_or_copied_files_are_the_same_data_set(data_set, describe, tmp_path):
    before = describe(data_set)
    os.utime(data_set / 'CT-0' / 'a.nii', (1, 1))
    (data_set / '.DS_Store').write_text('not a study')
    assert describe(data_set) == before
    shutil.copytree(data_set, tmp_path / 'copy', copy_function=shutil.copyfile)
    assert describe(tmp_path / 'copy') == before


def test_another_added_removed_or_renamed_file_is_another_data_set(data_set, describe):
    seen = [describe(data_set)]
    path = data_set / 'CT-0' / 'a.nii'
    status = path.stat()
    path.write_text('CT-0/A.nii')  # of the same size, with the time set back
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    seen.append(describe(data_set))
    (data_set / 'CT-1' / 'c.nii').write_text('c')
    seen.append(describe(data_set))
    path.unlink()
    seen.append(describe(data_set))
    (data_set / 'CT-1' / 'c.nii').rename(data_set / 'CT-0' / 'c.nii')
    seen.append(describe(data_set))
    assert len(set(seen)) == 5
    assert [text.split(' ')[0] for text in seen] == ['3', '3', '4', '3', '3']


def test_files_are_read_again_only_where_they_changed(data_set, describe, monkeypatch):
    read, sha256 = [], checksums.sha256
    monkeypatch.setattr(checksums, 'sha256', lambda path: read.append(path.name) or sha256(path))
    for _ in range(2):
        describe(data_set)
    assert sorted(read) == ['a.nii', 'b.nii', 'b_mask.nii']
    (data_set / 'CT-1' / 'b.nii').write_text('changed')
    describe(data_set)
    assert read[3:] == ['b.nii']


def test_files_behind_links_count_and_circles_end(data_set, describe, tmp_path):
    before = describe(data_set)
    (tmp_path / 'disk').mkdir()
    (tmp_path / 'disk' / 'd.nii').write_text('d')
    (data_set / 'CT-2').symlink_to(tmp_path / 'disk')
    (data_set / 'CT-1' / 'again').symlink_to(data_set)
    assert describe(data_set).startswith('4 files')
    assert describe(data_set) != before
    assert describe(tmp_path / 'nothing').startswith('0 files')
