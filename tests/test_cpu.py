"""XLA's setting: known or not, it ends no process and stays out of the caller's environment."""

import os
import subprocess
import sys

import pytest

from covseg_jax import cpu
from tests.program import ROOT

FLAG = 'xla_cpu_experimental_ynn_fusion_type'
PROGRAM = """
import os, sys
from covseg_jax import cpu
cpu._CONVOLUTIONS = sys.argv[1]
cpu.tune_process()
import jax
jax.numpy.zeros(1)
print(os.environ.get('XLA_FLAGS', ''))
"""


def run(code, *arguments):
    environment = {name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'}
    return subprocess.run(
        [sys.executable, '-c', code, *map(str, arguments)], cwd=ROOT, env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize('known', [True, False])
def test_process_starts_over_with_the_settings_that_its_jaxlib_knows(known):
    done = run(PROGRAM, FLAG if known else 'xla_cpu_of_another_jaxlib')
    assert done.returncode == 0, done.stderr
    expected = f'--{FLAG}=LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT' if known else ''
    assert done.stdout.strip() == expected


def test_setting_of_the_person_stays(monkeypatch):
    monkeypatch.delenv('XLA_FLAGS', raising=False)
    assert cpu.compiler_options() == {FLAG: 'LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT'}
    monkeypatch.setenv('XLA_FLAGS', f'--{FLAG}=LIBRARY_FUSION_TYPE_DOT')
    assert cpu.compiler_options() == {}


def test_setting_is_left_out_where_a_library_does_not_have_it(monkeypatch, tmp_path):
    monkeypatch.delenv('XLA_FLAGS', raising=False)
    (tmp_path / 'empty.so').write_bytes(b'')
    (tmp_path / 'a.so').write_bytes(f'...{FLAG}...'.encode())  # of another type, without the value
    monkeypatch.setattr(cpu, '_jaxlib_libraries', lambda: sorted(tmp_path.iterdir()))
    cpu._is_known.cache_clear()
    try:
        assert cpu.compiler_options() == {}
    finally:
        cpu._is_known.cache_clear()
