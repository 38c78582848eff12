"""The documents of the repository, and the commands in them."""

import pathlib
import re

from tests.program import ROOT

DOCUMENTS = sorted(
    path
    for folder in ('', 'docs', 'notebooks', 'covseg_jax/default_model')
    for path in (ROOT / folder).glob('*.md')
)
PROGRAM = 'python -m covseg_jax.main '


def read(name: str | pathlib.Path) -> str:
    return (ROOT / name).read_text(encoding='utf-8')


_FENCED = re.compile(r'^ *```(\w*)\n(.*?)^ *```$', re.DOTALL | re.MULTILINE)


def prose(text: str) -> str:
    """A document without its fenced blocks."""
    return _FENCED.sub('', text)


def inline(text: str) -> list[str]:
    """What stands in single backticks, each in one line."""
    return [' '.join(code.split()) for code in re.findall(r'`([^`]+)`', prose(text))]


def blocks(text: str, kinds: tuple[str, ...] = ('', 'bash', 'sh', 'shell', 'console')) -> list[str]:
    """Fenced blocks of these kinds; one without a kind holds commands."""
    return [block for kind, block in _FENCED.findall(text) if kind in kinds]


def commands(text: str) -> list[str]:
    """The commands of a document, each in one line, without comments. Blocks may show folders of
    scans in their place."""
    lines = [
        re.split(r'(?:^|  )#', line)[0].strip().removeprefix('$ ')
        for block in blocks(text)
        for line in re.sub(r'\\\n\s*', '', block).splitlines()
    ]
    return [line for line in lines if line and not re.match(r'\S+\.nii\.gz\b', line)]
