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


def write_system(root, limits):
    (root / 'proc').mkdir(parents=True)
    (root / 'proc/meminfo').write_text('MemTotal: 9000 kB\nMemAvailable:    8000 kB\n')
    for name, content in limits.items():
        path = root / 'sys/fs/cgroup' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


@pytest.mark.parametrize(
    ('limits', 'expected'),
    [
        ({}, 8000 * 1024),
        ({'memory.max': 'max\n', 'memory.current': '5\n'}, 8000 * 1024),
        ({'memory.max': '7000\n', 'memory.current': '5000\n'}, 2000),
        (
            {
                'memory/memory.limit_in_bytes': '7000\n',
                'memory/memory.usage_in_bytes': '7500\n',
            },
            0,
        ),
    ],
)
def test_available_memory_is_the_least_that_any_limit_leaves(limits, expected, tmp_path):
    assert cpu.available_memory(write_system(tmp_path, limits)) == expected


def test_available_memory_is_unknown_where_the_system_does_not_tell(tmp_path):
    assert cpu.available_memory(tmp_path) is None
