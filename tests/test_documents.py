"""The documents say what is there: links, commands, flags, paths, versions and figures."""

import copy
import os
import re
import shlex
import sys

import pytest
from absl import flags
from ml_collections import config_flags
from PIL import Image

import covseg_jax
from configs import transunet
from covseg_jax import main as program
from launch import make_figures, make_reference
from tests.documents import DOCUMENTS, blocks, commands, inline, prose, read
from tests.program import ROOT

# How the commands of the README begin, and the test that really runs them.
FIRST = 'test_commands.py::test_first_commands_of_the_readme_run_in_an_environment_that_is_there'
RUN_BY = {
    'launch/local.sh predict': FIRST,
    'launch/local.sh run': FIRST,
    'python -m covseg_jax.main': 'test_commands.py::test_command_of_the_documents_runs',
    'launch/measure.sh': 'test_measure.py::test_models_are_measured_on_phantoms_and_real_scans'
    '_once',
}
# Programs that are not ours, of which nothing is checked.
FOREIGN = (
    'apt-get', 'cd', 'curl', 'docker', 'export', 'gcloud', 'git', 'gsutil', 'jupyter', 'pip',
    'source',
)  # fmt: skip
OUR_PATHS = re.compile(r'(?<![\w./-])(?:configs|covseg_jax|docs|launch|tests)/[\w./-]*\w')
FIELDS = dict(make_reference.flatten(transunet.get_config('mosmed')))


def find_fault(line, monkeypatch):
    """What is wrong with a command; None where nothing is known to be."""
    words = shlex.split(line)
    while words and (re.fullmatch(r'\w+=.*', words[0]) or words[0] in ('taskset', '-c', '0')):
        words.pop(0)
    name, rest = os.path.basename(words[0]), words[1:]
    if name in ('python', 'python3') and rest[:1] == ['-m']:
        module, rest = rest[1], rest[2:]
        if module == 'covseg_jax.main':
            return fault_of_flags(rest, monkeypatch)
        script = ROOT / f'{module.replace(".", "/")}.py'
    elif name == 'covseg':
        return fault_of_flags(rest, monkeypatch)
    elif words[0].startswith('launch/'):
        script = ROOT / words[0]
    elif words[0].startswith('.venv/bin/') or name in FOREIGN:
        return None
    else:
        return 'neither a program of ours nor one of FOREIGN'
    if not script.exists():
        return f'{script.relative_to(ROOT)} is not there'
    if words[0] == 'launch/local.sh':
        if rest[:1] not in (['predict'], ['run']):  # flags of others are pytest's
            return None
        given = [word for word in rest if word.startswith('--')]
        return fault_of_flags(given, monkeypatch)
    if '--' in rest:
        fault = fault_of_flags(rest[rest.index('--') + 1 :], monkeypatch)
        if fault:
            return fault
        rest = rest[: rest.index('--')]
    # Flags stand in the script, in the Python beside it, or in what scripts share.
    sources = [script, script.with_suffix('.py'), *(ROOT / 'launch').glob('*_flags.sh')]
    known = ''.join(source.read_text(encoding='utf-8') for source in sources if source.exists())
    for word in rest:
        flag = word.partition('=')[0]
        if flag.startswith('--config') and not flag_names_a_field(flag):
            return f'{flag} is no field'
        if re.match('--(?!config)', flag) and not re.search(rf'{flag}(?![\w-])', known):
            return f'{flag} is no flag of {script.relative_to(ROOT)}'
    return None


def fault_of_flags(given, monkeypatch):
    """What the program would say of a flag or a config field that is not there, or of a value of
    the wrong type."""
    values = flags.FlagValues()
    for flag in flags.FLAGS.get_flags_for_module(program):
        if flag.name != 'config':
            values[flag.name] = copy.deepcopy(flag)
    config_flags.DEFINE_config_file('config', flag_values=values)
    monkeypatch.setattr(sys, 'argv', ['main', *given])  # there it looks for --config.FIELD
    try:
        _, *rest = values(sys.argv)
    except Exception as error:
        return f'{type(error).__name__}: {error}'
    return f'{rest[0]} is no flag' if rest else None


def flag_names_a_field(flag):
    path = flag.removeprefix('--config').removeprefix('.').rstrip('.')
    return not path or any(field == path or field.startswith(f'{path}.') for field in FIELDS)


def anchors_of(text):
    """As GitHub makes them of headings, and those that are named."""
    headings = re.findall(r'^#+ +(.*)$', prose(text), re.MULTILINE)
    made = {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}
    return made | set(re.findall(r'<a name="(.*?)">', text))


def test_links_lead_somewhere():
    assert len(DOCUMENTS) >= 10
    wrong = []
    for path in DOCUMENTS:
        for target in re.findall(r'\]\(([^)\s]+)\)', read(path)):
            if target.startswith(('https://', 'http://')):
                continue
            name, _, anchor = target.partition('#')
            file = (path.parent / name).resolve() if name else path
            found = file.exists() and (
                not anchor or anchor in anchors_of(file.read_text(encoding='utf-8'))
            )
            if not found:
                wrong.append(f'{path.relative_to(ROOT)}: {target}')
    assert not wrong


@pytest.mark.parametrize('path', DOCUMENTS, ids=lambda path: path.name)
def test_commands_have_flags_and_paths_that_are_there(path, monkeypatch):
    monkeypatch.chdir(ROOT)  # --config names a file from here
    wrong, text = [], read(path)
    ours = [code for code in inline(text) if re.match(r'launch/\w+\.sh|python -m ', code)]
    for line in commands(text) + ours:
        fault = find_fault(line, monkeypatch)
        if fault:
            wrong.append(f'{line}: {fault}')
    for code in blocks(text) + inline(text):
        wrong += [name for name in OUR_PATHS.findall(code) if not (ROOT / name).exists()]
        names = re.findall(r'--config\.[a-z][\w.]*', code)
        wrong += [f'{name}: no field' for name in names if not flag_names_a_field(name)]
    assert not wrong


@pytest.mark.parametrize(
    ('line', 'part'),
    [
        ('python -m covseg_jax.main --input=a --outputs=b', 'outputs'),
        ('python -m covseg_jax.main --config=configs/transunet.py --config.train.rate=1', 'rate'),
        ('launch/local.sh run --config=configs/transunet.py:huge', 'huge'),
        ('launch/measure.sh FOLDER MODEL --real=DIR', '--real'),
        ('python -m launch.no_such_script', 'not there'),
        ('covseg scan.nii.gz', 'no flag'),
        ('make install', 'neither'),
    ],
)
def test_a_command_that_is_wrong_is_found(line, part, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert part in (find_fault(line, monkeypatch) or '')


def test_every_command_of_the_readme_is_run_by_a_test():
    for line in commands(read('README.md')):
        (by,) = {test for beginning, test in RUN_BY.items() if line.startswith(beginning)}
        file, name = by.split('::')
        assert f'def {name}(' in read(f'tests/{file}'), by


def test_readme_is_a_page():
    assert len(read('README.md').splitlines()) <= 220


def test_figures_of_the_shipped_model_are_those_of_its_card():
    rows = [
        row for row in read('README.md').splitlines() if row.endswith('| [measure](#commands) |')
    ]
    figures = [figure for row in rows for figure in re.findall(r'0\.\d+[^|]*', row)]
    assert len(figures) >= 3
    card = read('covseg_jax/default_model/MODEL_CARD.md')
    assert [figure for figure in figures if figure.strip() not in card] == []


def test_reference_is_what_the_code_says_today():
    assert make_reference.make_reference() == read('docs/reference.md'), (
        'run python -m launch.make_reference'
    )


def test_reference_says_what_every_field_is():
    rows = re.findall(
        r'^\| `([\w.]+)` \| `.*?` \| (.*?) \|', read('docs/reference.md'), re.MULTILINE
    )
    assert {path for path, _ in rows} == set(FIELDS)
    assert [path for path, text in rows if not text] == []


def test_versions_agree():
    assert f'\nversion: {covseg_jax.__version__}\n' in read('CITATION.cff')
    assert re.search(r'^## (.*)$', read('CHANGELOG.md'), re.MULTILINE)[1] == covseg_jax.__version__
    assert '- run: .ci/run\n' in read('.github/workflows/ci.yml')


def test_pictures_are_drawn_with_the_shipped_model(tmp_path, monkeypatch):
    monkeypatch.setattr(make_figures, 'SHAPE', (96, 96, 14))
    monkeypatch.setattr(make_figures, 'SPACING_MM', (3.6, 3.6, 24.0))
    make_figures.main(tmp_path)
    names = sorted(path.name for path in (ROOT / 'docs' / 'figures').glob('*.png'))
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for name in names:
        drawn, shown = Image.open(tmp_path / name), ROOT / 'docs' / 'figures' / name
        assert drawn.width == Image.open(shown).width
        assert shown.stat().st_size <= make_figures.MOST_BYTES
