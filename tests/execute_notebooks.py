"""Executes the notebooks and writes them back with what they show, after a change of their code:
`python -m tests.execute_notebooks`, or of some of them, `python -m tests.execute_notebooks 1 4`."""

import hashlib
import os
import pathlib
import sys
import tempfile

import nbformat
from nbclient import NotebookClient

from covseg_jax import cpu
from tests.program import ROOT, environment

NOTEBOOKS = sorted((ROOT / 'notebooks').glob('*.ipynb'))
MADE_FROM = 'code_sha256'  # in a notebook's metadata


def hash_code(notebook: nbformat.NotebookNode) -> str:
    """SHA-256 of the source of its code cells."""
    sources = [cell.source for cell in notebook.cells if cell.cell_type == 'code']
    return hashlib.sha256('\0'.join(sources).encode()).hexdigest()


def execute(path: pathlib.Path, folder: pathlib.Path) -> nbformat.NotebookNode:
    """The notebook with its outputs, after a run that works in an empty folder.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell has failed.
    """
    notebook = nbformat.read(path, as_version=4)
    options = ' '.join(f'--{name}={value}' for name, value in cpu.compiler_options().items())
    env = environment()
    env |= {
        'COVSEG_NOTEBOOKS': str(folder),
        'IPYTHONDIR': str(folder / 'ipython'),  # not a person's own settings and history
        'JAX_PLATFORMS': 'cpu',
        'PATH': f'{pathlib.Path(sys.executable).parent}:{env["PATH"]}',  # `python` of the commands
        'XLA_FLAGS': f'{env["XLA_FLAGS"]} {options}',
    }
    client = NotebookClient(
        notebook,
        timeout=3600,
        startup_timeout=600,
        resources={'metadata': {'path': str(ROOT / 'notebooks')}},
    )
    client.execute(env=env)
    notebook.metadata[MADE_FROM] = hash_code(notebook)
    tidy_outputs(notebook)
    return notebook


def tidy_outputs(notebook: nbformat.NotebookNode) -> None:
    """Joins what was printed in pieces; leaves out when a cell ran and where the checkout is."""
    for cell in notebook.cells:
        cell.metadata.pop('execution', None)
        joined = []
        for output in cell.get('outputs', ()):
            name = output.get('name')
            if name and joined and joined[-1].get('name') == name:
                joined[-1].text += output.text
            else:
                joined.append(output)
        for output in joined:
            if 'text' in output:
                output.text = output.text.replace(f'{ROOT}/', '')
        if cell.cell_type == 'code':
            cell.outputs = joined


def main() -> None:
    for path in NOTEBOOKS:
        if not sys.argv[1:] or path.name.startswith(tuple(sys.argv[1:])):
            with tempfile.TemporaryDirectory() as folder:
                notebook = execute(path, pathlib.Path(folder))
            nbformat.write(notebook, path)
            print(path.name, os.path.getsize(path), 'bytes', flush=True)


if __name__ == '__main__':
    main()
