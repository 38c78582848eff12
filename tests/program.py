"""The program as a person starts it."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]

# Tests compile more than they compute. (Level 0 is quicker for small programs, and slow for the
# published sizes; without fusion emitters it computed wrong numbers in jaxlib 0.10.2.)
COMPILED_QUICKLY = '--xla_backend_optimization_level=1'


def command(*flags):
    return [sys.executable, '-m', 'covseg_jax.main', *map(str, flags)]


def environment():
    # One device, as a person's CPU has; conftest.py simulates eight for the other tests.
    return os.environ | {'XLA_FLAGS': COMPILED_QUICKLY, 'PYTHONPATH': str(ROOT)}


def run(*flags, cwd=ROOT, timeout=900):
    return subprocess.run(
        command(*flags),
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def assert_one_line_error(done, *parts):
    """An exit code that is not 0, one line that says what is wrong, no traceback."""
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
    assert len(lines) == 1, done.stderr
    assert 'Traceback' not in done.stderr
    for part in parts:
        assert part in lines[0]
