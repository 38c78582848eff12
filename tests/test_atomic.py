"""Folders that are replaced: killed at any moment, nothing is lost."""

import os
import pathlib
import subprocess
import sys

import pytest

from covseg_jax import atomic
from tests.program import ROOT

# Replaces the folder argv[1], and dies as by kill -9 in its rename number argv[2].
REPLACE = """
import os, pathlib, sys
from covseg_jax import atomic
path, renames = pathlib.Path(sys.argv[1]), []
rename = pathlib.Path.rename
def rename_or_die(self, target):
    if len(renames) == int(sys.argv[2]):
        os._exit(9)
    renames.append(target)
    return rename(self, target)
pathlib.Path.rename = rename_or_die
with atomic.new_folder(path) as temporary:
    (temporary / 'text').write_text('new')
"""


def replace_and_die(path, in_rename):
    command = [sys.executable, '-c', REPLACE, path, str(in_rename)]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 9


def write_old(path):
    path.mkdir()
    (path / 'text').write_text('old')


def names_beside(path):
    return sorted(os.listdir(path.parent))


@pytest.mark.parametrize('name', ['case', 'case-before', 'a-b [1]'])
@pytest.mark.parametrize('by', ['remove_leftovers', 'new_folder', 'recover'])
def test_folder_killed_between_its_renames_is_put_in_place(tmp_path, name, by):
    path = tmp_path / name
    write_old(path)
    replace_and_die(path, in_rename=1)
    assert not path.exists()
    if by == 'remove_leftovers':
        atomic.remove_leftovers(tmp_path)
    elif by == 'recover':
        atomic.recover(path)
    else:
        with pytest.raises(ValueError, match='stop'), atomic.new_folder(path):
            raise ValueError('stop')
    assert (path / 'text').read_text() == 'new'  # it was whole
    assert names_beside(path) == [name]


def test_folder_killed_before_its_renames_stays_the_old_one(tmp_path):
    write_old(tmp_path / 'case')
    replace_and_die(tmp_path / 'case', in_rename=0)
    atomic.remove_leftovers(tmp_path)
    assert (tmp_path / 'case' / 'text').read_text() == 'old'
    assert names_beside(tmp_path / 'case') == ['case']


def test_folder_that_cannot_be_put_in_place_stays_the_old_one(tmp_path, monkeypatch):
    path, rename = tmp_path / 'case', pathlib.Path.rename
    write_old(path)

    def fail(self, target):
        if target == path and (self / 'text').read_text() == 'new':
            raise OSError('no')
        return rename(self, target)

    monkeypatch.setattr(pathlib.Path, 'rename', fail)
    with pytest.raises(OSError, match='no'), atomic.new_folder(path) as temporary:
        (temporary / 'text').write_text('new')
    assert (path / 'text').read_text() == 'old'
    assert names_beside(path) == ['case']
