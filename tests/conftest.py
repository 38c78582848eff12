"""Tests run on the CPU, on eight simulated devices, whatever the machine has."""

import os
import pathlib

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = (
    os.environ.get('XLA_FLAGS', '')
    + ' --xla_force_host_platform_device_count=8'
    + ' --xla_backend_optimization_level=1'  # tests compile more than they compute
).strip()

import pytest

SHARED = pathlib.Path(__file__).resolve().parents[2] / 'shared'


@pytest.fixture(scope='session')
def shared_data() -> pathlib.Path:
    """The folder with real CT scans; tests that want it are skipped where it is not there."""
    folder = SHARED / 'data'
    if not folder.is_dir():
        pytest.skip(f'no folder {folder}')
    return folder


@pytest.fixture(scope='session')
def reference() -> pathlib.Path:
    """The folder with numbers of other implementations; skipped where it is not there."""
    folder = SHARED / 'reference'
    if not folder.is_dir():
        pytest.skip(f'no folder {folder}')
    return folder
