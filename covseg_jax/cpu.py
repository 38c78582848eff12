"""What makes XLA quick on a CPU, and how many cores and how much memory there are."""

import contextlib
import functools
import importlib.util
import mmap
import os
import pathlib
import sys

# glibc: freed memory is kept. XLA takes a step's buffers anew each time, and glibc gives blocks
# above 32 MB back to the kernel at once, which then clears every page again: 25,600 faults a step
# of the phantom variant, 0.22 s instead of 0.14 (0.16 with huge pages alone; 2 cores). One arena,
# because the others cannot hold blocks that large. It costs memory: 0.9 GB instead of 0.7, and 4.9
# instead of 3.4 for a step of the published sizes.
_KEPT_MEMORY = ':'.join(
    f'glibc.malloc.{name}={value}'
    for name, value in (('mmap_max', 0), ('trim_threshold', 2**34), ('arena_max', 1))
)
# XLA: convolutions by Eigen. Since jaxlib 0.10 another library has them, which is slower where
# channels are few: 40 → 24 at 32 × 128² took 77 instead of 110 ms, its kernel's gradient 150
# instead of 845 ms (2 cores, float32). Products of matrices stay with that library.
_CONVOLUTIONS = 'xla_cpu_experimental_ynn_fusion_type'
_BY_EIGEN = 'LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT'


def tune_process() -> None:
    """Starts this process over, once, with both settings, which are read when a process starts;
    those that are set already stay. Programs call it first of all; processes that they start
    inherit it."""
    wanted = dict(os.environ)
    if sys.platform == 'linux':
        wanted.setdefault('GLIBC_TUNABLES', _KEPT_MEMORY)
    for name, value in compiler_options().items():
        wanted['XLA_FLAGS'] = f'{wanted.get("XLA_FLAGS", "")} --{name}={value}'.strip()
    if wanted != dict(os.environ):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], wanted)


def compiler_options() -> dict[str, str]:
    """XLA's setting, for `jax.jit(..., compiler_options=...)` on a CPU: the same bits as after
    `tune_process`, and nothing in the environment changes. Empty where XLA_FLAGS has it already, or
    this jaxlib does not know it."""
    if _CONVOLUTIONS in os.environ.get('XLA_FLAGS', '') or not _is_known():
        return {}
    return {_CONVOLUTIONS: _BY_EIGEN}


@functools.cache
def _is_known() -> bool:
    """Whether jaxlib has the setting and its value: XLA ends a process that sets another one.
    Looked up in its libraries, as nothing else tells before XLA starts (4 ms; 0.3 s where it is
    not there)."""
    wanted = {_CONVOLUTIONS.encode(), _BY_EIGEN.encode()}
    for library in _jaxlib_libraries():
        with (
            contextlib.suppress(OSError, ValueError),  # ValueError: an empty file
            library.open('rb') as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            wanted -= {name for name in wanted if content.find(name) >= 0}
        if not wanted:
            return True
    return False


def _jaxlib_libraries() -> list[pathlib.Path]:
    """The largest first."""
    spec = importlib.util.find_spec('jaxlib')
    folders = (spec and spec.submodule_search_locations) or ()
    files = [path for folder in folders for path in pathlib.Path(folder).rglob('*')]
    found = [path for path in files if path.suffix in ('.so', '.dylib', '.pyd', '.dll')]
    return sorted(found, key=lambda path: path.stat().st_size, reverse=True)


def count_cores() -> int:
    """Cores that this process may use, or, where the system does not tell, all."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory(root: pathlib.Path = pathlib.Path('/')) -> int | None:
    """Bytes that new processes may take: the least of what Linux counts as available and what the
    limits of this process's control group leave. None where the system does not tell.

    Args:
        root: of the file system in which /proc and /sys lie.
    """
    found = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = (root / 'proc/meminfo').read_text().splitlines()
        line = next(line for line in lines if line.startswith('MemAvailable:'))
        found.append(int(line.split()[1]) * 1024)
    groups = root / 'sys/fs/cgroup'
    for limit, used in (
        ('memory.max', 'memory.current'),  # of version 2, and of version 1
        ('memory/memory.limit_in_bytes', 'memory/memory.usage_in_bytes'),
    ):
        # 'max', which is no number, is no limit.
        with contextlib.suppress(OSError, ValueError):
            found.append(int((groups / limit).read_text()) - int((groups / used).read_text()))
    return max(0, min(found)) if found else None
