"""The notebooks run, and what they show in the repository is of the code that they have."""

import re

import nbformat
import pytest

from tests.execute_notebooks import MADE_FROM, NOTEBOOKS, execute, hash_code
from tests.program import ROOT


def shown(notebook):
    """Everything that is written in a notebook's outputs, pictures left out."""
    texts = []
    for cell in notebook.cells:
        for output in cell.get('outputs', ()):
            texts += [output.get('text', ''), *output.get('traceback', ())]
            texts += [text for kind, text in output.get('data', {}).items() if 'image' not in kind]
    return '\n'.join(map(str, texts))


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path):
    notebook = execute(path, tmp_path)
    # In a pipe a command that fails raises nothing.
    assert not re.search(r'^(error: |Traceback)', shown(notebook), re.M), shown(notebook)
    here = nbformat.read(path, as_version=4)
    for cell, before in zip(notebook.cells, here.cells, strict=True):
        kinds = [
            [output.output_type for output in each.get('outputs', ()) if 'data' in output]
            for each in (cell, before)
        ]
        assert kinds[0] == kinds[1], cell.source  # as many pictures


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_kept_as_it_ran_and_small(path):
    notebook = nbformat.read(path, as_version=4)
    remedy = 'run `python -m tests.execute_notebooks`'
    assert notebook.metadata.get(MADE_FROM) == hash_code(notebook), remedy
    code = [cell for cell in notebook.cells if cell.cell_type == 'code']
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)], remedy
    lines = [line for cell in code for line in cell.source.splitlines() if line.strip()]
    assert len(lines) <= 40
    assert path.stat().st_size < 400_000
    assert not re.search(rf'{re.escape(str(ROOT))}|/tmp/|/home/|/root/', shown(notebook))
    assert not re.search(r'^(error: |Traceback)', shown(notebook), re.M)


def test_there_are_notebooks():
    assert len(NOTEBOOKS) == 5
