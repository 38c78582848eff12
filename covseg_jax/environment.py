"""What a run is made with beside its settings: versions, machine, and this code's revision."""

import pathlib
import platform
import re
import subprocess
from importlib import metadata

_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy', 'nibabel')
_HERE = pathlib.Path(__file__).parent


def describe_environment() -> dict:
    """JSON values: python, platform, packages (those that are installed), git_revision (None where
    nothing tells it)."""
    return {
        'python': platform.python_version(),
        'platform': platform.platform(),
        'packages': {name: version for name in _PACKAGES if (version := _find_version(name))},
        'git_revision': find_revision(),
    }


def _find_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # what trains is not there where only predict is
        return None


def find_revision() -> str | None:
    """The revision of this code: `git archive` writes it into revision.txt, elsewhere git knows it.

    None without either, and for a copy that lies in another project's repository.
    """
    archived = (_HERE / 'revision.txt').read_text(encoding='utf-8').strip()
    if re.fullmatch('[0-9a-f]{40,64}', archived):
        return archived
    if _ask_git('ls-files', '--error-unmatch', pathlib.Path(__file__).name) is None:
        return None
    return _ask_git('rev-parse', 'HEAD')


def _ask_git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ['git', *arguments], capture_output=True, text=True, check=False, cwd=_HERE
        )
    except OSError:  # no git on this machine
        return None
    return done.stdout.strip() if done.returncode == 0 else None
