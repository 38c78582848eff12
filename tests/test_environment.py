"""The revision of this code, from git or from an archive, and machines that lack things."""

import os
import shutil
import subprocess
import sys

import pytest

from covseg_jax import cpu, environment
from covseg_jax.stages.inputs import num_workers
from tests.program import ROOT

ASK = 'from covseg_jax import environment; print(environment.find_revision())'


def git(*arguments, cwd):
    identity = ('-c', 'user.name=name', '-c', 'user.email=name@localhost')
    done = subprocess.run(
        ['git', *identity, *arguments], cwd=cwd, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def ask(folder, **variables):
    done = subprocess.run(
        [sys.executable, '-c', ASK], cwd=folder, env=os.environ | variables, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path):
    """The package in a repository of its own."""
    folder = tmp_path / 'repository'
    shutil.copytree(ROOT / 'covseg_jax', folder / 'covseg_jax')
    shutil.copy(ROOT / '.gitattributes', folder)
    git('init', '--quiet', cwd=folder)
    git('add', '.', cwd=folder)
    git('commit', '--quiet', '--message=all', cwd=folder)
    return folder


def test_archive_without_git_names_its_revision(repository, tmp_path):
    revision = git('rev-parse', 'HEAD', cwd=repository)
    assert ask(repository) == revision
    # Unpacked in another project's repository, whose revision is not this code's.
    outer = tmp_path / 'outer'
    (outer / 'unpacked').mkdir(parents=True)
    git('init', '--quiet', cwd=outer)
    git('commit', '--quiet', '--allow-empty', '--message=outer', cwd=outer)
    git('archive', f'--output={tmp_path / "code.tar"}', 'HEAD', cwd=repository)
    shutil.unpack_archive(tmp_path / 'code.tar', outer / 'unpacked')
    assert ask(outer / 'unpacked') == revision
    assert ask(outer / 'unpacked', PATH='') == revision
    (outer / 'unpacked' / 'covseg_jax' / 'revision.txt').write_text('$Format:%H$\n')
    assert ask(outer / 'unpacked') == 'None'


def test_environment_is_described_without_git(monkeypatch):
    monkeypatch.setenv('PATH', '')
    described = environment.describe_environment()
    assert described['packages']['jax']
    written = (ROOT / 'covseg_jax' / 'revision.txt').read_text()
    assert (described['git_revision'] is None) == written.startswith('$Format')


def test_cores_are_counted_where_a_process_has_no_set_of_them(monkeypatch):
    monkeypatch.delattr(os, 'sched_getaffinity', raising=False)  # as on macOS
    assert cpu.count_cores() == num_workers(None) == os.cpu_count()
