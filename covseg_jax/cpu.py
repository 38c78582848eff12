"""What makes XLA quick on a CPU, and is read when a process starts, at no other time."""

import os
import sys
from collections.abc import MutableMapping

# glibc: memory in huge pages. XLA takes a step's buffers anew each time, and the faults of small
# pages were a sixth of a step of the phantom variant.
_HUGE_PAGES = 'glibc.malloc.hugetlb=1'
# XLA: convolutions by Eigen. Since jaxlib 0.10 another library has them, which is slower where
# channels are few: 40 → 24 at 32 × 128² took 77 instead of 110 ms, its kernel's gradient 150
# instead of 845 ms (2 cores, float32). Products of matrices stay with that library.
_CONVOLUTIONS = '--xla_cpu_experimental_ynn_fusion_type'
_BY_EIGEN = f'{_CONVOLUTIONS}=LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT'


def tune_process() -> None:
    """Starts this process over, once, with both settings; those that are set already stay.

    For programs to call first of all. Processes that they start inherit it.
    """
    wanted = dict(os.environ)
    if sys.platform == 'linux':
        wanted.setdefault('GLIBC_TUNABLES', _HUGE_PAGES)
    _choose_convolutions(wanted)
    if wanted != dict(os.environ):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], wanted)


def tune_xla() -> None:
    """XLA's setting for this process, which must not have computed anything by JAX yet."""
    _choose_convolutions(os.environ)


def _choose_convolutions(environment: MutableMapping[str, str]) -> None:
    if _CONVOLUTIONS not in environment.get('XLA_FLAGS', ''):
        environment['XLA_FLAGS'] = f'{environment.get("XLA_FLAGS", "")} {_BY_EIGEN}'.strip()
