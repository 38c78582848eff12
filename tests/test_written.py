"""What this program wrote is known by its present content; all else is a person's."""

import os
import subprocess
import sys

import pytest

from covseg_jax import written
from covseg_jax.errors import InputError
from tests.program import ROOT


def test_file_is_ours_only_while_it_holds_what_was_written(tmp_path):
    path = tmp_path / 'a.txt'
    written.write_text(path, 'first')
    written.write_text(path, 'other')
    assert written.is_ours(path)
    path.write_text('first')  # of an earlier run
    assert written.is_ours(path)
    path.write_text('thesis')
    assert not written.is_ours(path)
    path.write_text('OTHER')  # of the same size
    assert not written.is_ours(path)
    copy = tmp_path / 'copy' / 'a.txt'
    copy.parent.mkdir()
    copy.write_text('other')
    link = tmp_path / 'b.txt'
    link.symlink_to(copy)
    for foreign in (copy, link, copy.parent):
        with pytest.raises(InputError, match=rf'{foreign}: is in the way'):
            written.refuse_foreign([tmp_path / 'not there', foreign])


def test_foreign_file_is_neither_written_over_nor_removed(tmp_path):
    mine, theirs = tmp_path / 'mine', tmp_path / 'theirs'
    written.write_text(mine, 'mine')

    def write_theirs():
        with written.new_file(theirs) as new:
            new.write_text('ours')
            theirs.write_text('theirs')  # while this program was at work

    def write_both():
        with written.new_files(tmp_path) as folder:
            for name in ('mine', 'theirs'):
                (folder / name).write_text('ours')

    for write in (write_theirs, write_both):
        with pytest.raises(InputError, match='theirs: is in the way'):
            write()
        assert theirs.read_text() == 'theirs'
    assert mine.read_text() == 'mine'
    written.remove([mine, theirs])
    assert theirs.read_text() == 'theirs'
    assert sorted(path.name for path in tmp_path.iterdir()) == [written.RECORD, 'theirs']


KILLED = """
import os, pathlib, sys
from covseg_jax import written
pathlib.Path.replace = lambda *_: os._exit(9)
written.write_text(sys.argv[1], 'second')
"""


def test_kill_before_the_file_gets_its_name_leaves_nothing_that_nobody_claims(tmp_path):
    path = tmp_path / 'a.txt'
    written.write_text(path, 'first')
    killed = subprocess.run([sys.executable, '-c', KILLED, path], cwd=ROOT, check=False)
    assert killed.returncode == 9
    (left,) = tmp_path.glob('.tmp-*')
    assert path.read_text() == 'first'
    assert written.is_ours(path)
    os.replace(left, path)  # the kill came just after
    assert path.read_text() == 'second'
    assert written.is_ours(path)


def test_record_that_a_kill_cut_short_still_tells_the_rest(tmp_path):
    for name in ('a', 'b'):
        written.write_text(tmp_path / name, name)
        with (tmp_path / written.RECORD).open('a') as file:
            file.write('{"name": "c", "byt')
    assert all(written.is_ours(tmp_path / name) for name in ('a', 'b'))


APPEND = """
import sys
from covseg_jax import written
for number in range(15):
    written.write_text(f'{sys.argv[1]}/{sys.argv[2]}_{number}', sys.argv[2])
"""


def test_processes_that_write_at_once_lose_no_note(tmp_path):
    processes = [
        subprocess.Popen([sys.executable, '-c', APPEND, tmp_path, name], cwd=ROOT) for name in 'abc'
    ]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert sum(map(written.is_ours, tmp_path.glob('[abc]_*'))) == 45


def test_file_that_grows_is_known_by_how_it_begins(tmp_path):
    path = tmp_path / 'log'
    written.claim(path, b'head\n')
    for content, expected in (
        (b'', True),
        (b'head\n', True),
        (b'head\nmore', True),
        (b'other\nmore', False),
        (b'hea', False),
    ):
        path.write_bytes(content)
        assert written.is_ours(path) == expected


def test_files_of_several_folders_have_one_record_and_a_copied_scan_is_no_output(tmp_path):
    scan, label = tmp_path / 'imagesTr' / 'a', tmp_path / 'labelsTr' / 'a'
    for path, is_scan in ((scan, True), (label, False)):
        with written.new_file(path, tmp_path, is_scan=is_scan) as temporary:
            temporary.write_text('content')
    with written.new_files(tmp_path) as folder:
        (folder / 'figures').mkdir()
        (folder / 'figures' / 'a.png').write_bytes(b'png')
    paths = (scan, label, tmp_path / 'figures' / 'a.png')
    assert [written.is_ours(path) for path in paths] == [True, True, True]
    assert [written.is_output(path) for path in paths] == [False, True, True]


def test_what_lies_at_the_programs_own_places_is_adopted(tmp_path):
    path = tmp_path / 'verify.csv'
    path.write_text('of an older version')
    written.adopt([path, tmp_path / 'not there'])
    written.write_text(path, 'new')
    assert path.read_text() == 'new'
