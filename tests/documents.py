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


def blocks(text: str, kinds: tuple[str, ...] = ('', 'bash', 'sh', 'shell', 'console')) -> list[str]:
    """Fenced blocks of these kinds; one without a kind holds commands."""
    found = re.findall(r'^ *```(\w*)\n(.*?)^ *```$', text, re.DOTALL | re.MULTILINE)
    return [block for kind, block in found if kind in kinds]


def commands(text: str) -> list[str]:
    """The commands of a document, each in one line, without comments."""
    lines = [
        re.split(r'(?:^|  )#', line)[0].strip().removeprefix('$ ')
        for block in blocks(text)
        for line in re.sub(r'\\\n\s*', '', block).splitlines()
    ]
    return [line for line in lines if line]
