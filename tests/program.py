"""The program as a person starts it."""

import multiprocessing
import os
import pathlib
import runpy
import subprocess
import sys
import tempfile

from covseg_jax import cpu

ROOT = pathlib.Path(__file__).parents[1]

# Tests compile more than they compute. (Level 0 is quicker for small programs, and slow for the
# published sizes; without fusion emitters it computed wrong numbers in jaxlib 0.10.2.)
COMPILED_QUICKLY = '--xla_backend_optimization_level=1'


# A command imports 2.5 s of libraries before it begins. This server has them, and forks for each.
_SERVER = multiprocessing.get_context('forkserver')
_SERVER.set_forkserver_preload([
    'covseg_jax.gan.train', 'covseg_jax.lungs.train', 'covseg_jax.segmentation.train',
    'covseg_jax.stages.on_request', 'covseg_jax.stages.pipeline', 'matplotlib.figure',
])  # fmt: skip


def command(*flags):
    return [sys.executable, '-m', 'covseg_jax.main', *map(str, flags)]


def environment():
    # One device, as a person's CPU has; conftest.py simulates eight for the other tests.
    return os.environ | {'XLA_FLAGS': COMPILED_QUICKLY, 'PYTHONPATH': str(ROOT)}


def run(*flags, cwd=ROOT, timeout=900, variables=None, kill_at=None, module='covseg_jax.main'):
    """`command(*flags)`, or another module's, to its end, or until an event, at which it is
    killed."""
    with tempfile.TemporaryDirectory() as folder:
        files = [pathlib.Path(folder) / name for name in ('out', 'err')]
        arguments = module, list(map(str, flags)), cwd, files, variables or {}
        process = _SERVER.Process(target=_run_module, args=arguments)
        process.start()
        if kill_at is not None:
            kill_at.wait(timeout)
            process.kill()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(flags, timeout)
        out, err = (file.read_text() for file in files)
    return subprocess.CompletedProcess(flags, process.exitcode, out, err)


def _run_module(module, flags, cwd, files, variables):
    for stream, file in zip((sys.stdout, sys.stderr), files, strict=True):
        with file.open('w') as target:
            os.dup2(target.fileno(), stream.fileno())
    os.chdir(cwd)
    os.environ |= environment() | variables
    os.environ.setdefault('GLIBC_TUNABLES', '')  # or `cpu.tune_process` would start it over
    for name, value in cpu.compiler_options().items():
        os.environ['XLA_FLAGS'] += f' --{name}={value}'
    sys.argv = [module, *flags]
    runpy.run_module(module, run_name='__main__', alter_sys=True)


def assert_one_line_error(done, *parts):
    """An exit code that is not 0, one line that says what is wrong, no traceback."""
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
    assert len(lines) == 1, done.stderr
    assert 'Traceback' not in done.stderr
    for part in parts:
        assert part in lines[0]
