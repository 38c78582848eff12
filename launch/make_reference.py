"""Writes docs/reference.md, the reference of stages, flags and settings, from the code:
`python -m launch.make_reference`.
"""

import ast
import importlib
import inspect
import io
import pathlib
import re
import tokenize
from collections.abc import Iterator
from typing import Any

from absl import flags

from configs import base, transunet
from covseg_jax import main as program
from covseg_jax.stages import on_request, pipeline

ROOT = pathlib.Path(__file__).parents[1]
FILE = ROOT / 'docs' / 'reference.md'
_COMMAND = 'python -m launch.make_reference'


def read_comments(source: str) -> dict[str, str]:
    """Path of a field or group of configs/base.py -> what the comments beside it say, in the file's
    order; '' where there are none.

    Followed are the file's own habits: a group is made by a function of its name, or by
    `ConfigDict()` under a local name; a comment stands above a statement or behind it.
    """
    tree, comments = ast.parse(source), _comment_lines(source)
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    found: dict[str, str] = {}

    def follow(function: str, names: dict[str, str], group: str = '') -> None:
        for statement in functions[function].body:
            call = getattr(statement, 'value', None)
            called = ast.unparse(call.func) if isinstance(call, ast.Call) else ''
            if isinstance(statement, ast.Expr) and called in functions:  # fills a group
                parameter = functions[called].args.args[0].arg
                follow(called, {parameter: names[ast.unparse(call.args[0])]})
            if not isinstance(statement, ast.Assign):
                continue
            targets = [ast.unparse(target) for target in statement.targets]
            first, _, rest = targets[0].partition('.')
            path = '.'.join(part for part in (names.get(first), rest) if part) if rest else group
            if called in functions:  # makes a group
                follow(called, {}, path)
                continue
            if called.endswith('ConfigDict'):
                names |= {name: path for name in targets if '.' not in name}
            found[path] = _comment_of(statement, comments)

    follow('get_base', {})
    found.pop('')
    return found


def _comment_lines(source: str) -> dict[int, tuple[str, bool]]:
    """Line number -> the comment on it, and whether the line has nothing else."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {
        token.start[0]: (token.string.lstrip('# '), token.line.lstrip().startswith('#'))
        for token in tokens
        if token.type == tokenize.COMMENT and not token.string.startswith('# ---')
    }


def _comment_of(statement: ast.stmt, comments: dict[int, tuple[str, bool]]) -> str:
    first = statement.lineno
    while comments.get(first - 1, ('', False))[1]:
        first -= 1
    lines = range(first, statement.end_lineno + 1)
    return ' '.join(comments[line][0] for line in lines if line in comments)


def _said_elsewhere(path: str, comments: dict[str, str]) -> str:
    """What the group's dataclass says of a field without a comment, or the group that it is as."""
    group, _, name = path.rpartition('.')
    module, _, dataclass = comments.get(group, '').partition('.py: ')
    if dataclass:
        module = importlib.import_module(f'covseg_jax.{module.replace("/", ".")}')
        text = inspect.getdoc(getattr(module, re.match(r'\w+', dataclass)[0]))
        attributes = re.findall(
            r'^ +([\w, ]+): (.*(?:\n {4,}.*)*)', text.partition('Attributes:')[2], re.MULTILINE
        )
        for names, says in attributes:
            if name in names.split(', '):
                return ' '.join(says.split())
    # lungs.opacities is as opacities, and another group where its comment begins so.
    said = re.match(r'as (\w+),', comments.get(group, ''))
    twin = f'{said[1] if said else group.rpartition(".")[2]}.{name}'
    return f'as `{twin}`' if twin != path and twin in comments else ''


def flatten(config: Any, prefix: str = '') -> Iterator[tuple[str, Any]]:
    """Path and value of every field, those of groups within groups included."""
    for name in config:
        value = config[name]
        if hasattr(value, 'keys'):
            yield from flatten(value, f'{prefix}{name}.')
        else:
            yield prefix + name, value


def _cell(text: str) -> str:
    return text.replace('|', '\\|').replace('<', '&lt;').replace('\n', ' ')


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    lines = ['| ' + ' | '.join(head) + ' |', '|' + '---|' * len(head)]
    return lines + ['| ' + ' | '.join(map(_cell, row)) + ' |' for row in rows]


def _first_paragraph(function: Any) -> str:
    return ' '.join(inspect.getdoc(function).split('\n\n')[0].split())


def _stage_rows() -> list[tuple[str, str, str]]:
    rows = [
        (f'`{name}`', 'pipeline', _first_paragraph(function))
        for name, (function, _) in pipeline.PIPELINE.items()
    ]
    on_input = {name: _first_paragraph(f) for name, f in on_request.ON_INPUT.items()}
    rows += [(f'`{name}`', 'with `--input` or `--model`', text) for name, text in on_input.items()]
    return rows + [
        (f'`{name}`', 'on request', _first_paragraph(function))
        for name, function in (on_request.BEFORE | on_request.AFTER).items()
    ]


def _flag_rows() -> list[tuple[str, str]]:
    rows = []
    for flag in flags.FLAGS.get_flags_for_module(program):
        value = '' if flag.flag_type() == 'bool' else '=…'
        rows.append((f'`--{flag.name}{value}`', flag.help))
    return sorted(rows)


def _setting_tables(comments: dict[str, str]) -> Iterator[str]:
    """A heading, what the group is, and a table of its fields, group by group."""
    values = dict(flatten(base.get_base()))
    order = {path: number for number, path in enumerate(comments)}
    values = {path: values[path] for path in sorted(values, key=order.__getitem__)}
    variants = {
        name: dict(flatten(transunet.get_config(name)))
        for name in transunet.VARIANTS
        if name not in ('mosmed', 'tiny')
    }
    groups: dict[str, list[str]] = {}
    for path in values:
        groups.setdefault(path.rpartition('.')[0], []).append(path)
    for group, paths in groups.items():
        yield f'\n### {f"`{group}`" if group else "the run"}\n'
        if comments.get(group):
            yield _sentence(comments[group]) + '\n'
        rows = []
        for path in paths:
            names: dict[str, list[str]] = {}  # of the variants that have another value
            for name, fields in variants.items():
                if fields[path] != values[path] and path != 'variant':
                    names.setdefault(repr(fields[path]), []).append(name)
            others = [f'{", ".join(each)}: `{value}`' for value, each in names.items()]
            text = comments[path] or _said_elsewhere(path, comments)
            rows.append((f'`{path}`', f'`{values[path]!r}`', text, '; '.join(others)))
        yield from _table(('field', 'default', 'what it is', 'in other variants'), rows)


def _sentence(text: str) -> str:
    text = re.sub(r'^(\w+/\w+\.py): (\w+)', r'`\2` in `covseg_jax/\1`', text)
    return text[:1].upper() + text[1:] + ('' if text.endswith('.') else '.')


def make_reference() -> str:
    """The text of docs/reference.md."""
    comments = read_comments(inspect.getsource(base))
    lines = [
        '# Reference',
        '',
        f'Made from the code by `{_COMMAND}`; a test holds it to the code.',
        '',
        '## Stages',
        '',
        '[training.md](training.md#stages) says what each makes and from what.',
        '',
        *_table(('stage', 'runs', 'what it does'), _stage_rows()),
        '',
        '## Flags',
        '',
        *_table(('flag', 'of which stages, and what it is'), _flag_rows()),
        '',
        '## Settings',
        '',
        'Every field of `configs/base.py`, in its order; `--config.FIELD=VALUE` sets one. The',
        'default is the variant `mosmed`; what `tiny`, which is for tests, has is left out.',
        *_setting_tables(comments),
    ]
    return '\n'.join(lines) + '\n'


if __name__ == '__main__':
    FILE.write_text(make_reference(), encoding='utf-8')
    print(FILE.relative_to(ROOT))
