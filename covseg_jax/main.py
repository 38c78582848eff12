"""Flags to stages: `python -m covseg_jax.main --config=configs/transunet.py`."""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import re
import sys
import time
from collections.abc import Iterable

from covseg_jax import cpu

if __name__ == '__main__':
    cpu.tune_process()  # first of all: what is imported before is imported twice

from absl import app, flags, logging
from ml_collections import config_flags

from covseg_jax import atomic, bucket, hosts, manifest, mirror
from covseg_jax.environment import describe_environment
from covseg_jax.errors import GO_ON, InputError, Stopped, one_line
from covseg_jax.predict.default import DEFAULT
from covseg_jax.stages import (
    buckets,
    guide,
    initial_model,
    on_request,
    outcome,
    pipeline,
    settings,
    values,
)
from covseg_jax.stages.inputs import Config, Request

_CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'FILE[:VARIANT], such as configs/transunet.py:phantom'
)
_WORKDIR = flags.DEFINE_string(
    'workdir',
    None,
    'the folder of the run, or gs://BUCKET/FOLDER; default: runs/<config>-<variant>',
)
_CACHE = flags.DEFINE_string(
    'bucket_cache', None, 'where this host keeps what is in buckets; default: in ~/.cache'
)
_STAGES = flags.DEFINE_string(
    'stages', None, "comma list of stages; default: the config's; without a config predict"
)
# The fields of Request.
_PATHS = {
    'input': 'predict, verify: scans; evaluate: masks, or with --model a data set; compare: '
    'RUN,RUN; import_weights: a weights file',
    'output': 'predict, verify, export, pseudo_masks, evaluate, compare, lungs: the folder for '
    'what they write',
    'reference': "evaluate: true masks, for --input's masks",
}
_SWITCHES = {
    'resume': 'predict: keep the studies that are done',
    'preview': 'predict: a PNG a study, lesions outlined',
    'per_lung': 'predict: lesions of either lung too',
    'probability': 'predict: probability maps too',
    'disagreement': 'predict: of several networks, maps of where they disagree too',
    'report': 'predict: report.html, a page to look at all results, and methods.txt for a paper',
    'dicom_seg': 'predict: of DICOM series a DICOM Segmentation too',
}
_REQUEST = [
    *(flags.DEFINE_string(name, None, text) for name, text in _PATHS.items()),
    *(flags.DEFINE_bool(name, False, text) for name, text in _SWITCHES.items()),
    flags.DEFINE_string(
        'model',
        None,
        'predict, evaluate: EXPORT[,EXPORT], in place of a config; predict without both: '
        f"'{DEFAULT}', the model that comes with the program",
    ),
    flags.DEFINE_integer(
        'num_workers',
        None,
        'predict, evaluate with --model: processes; default: one a core, as memory allows',
    ),
]
_FLAGS = [_CONFIG, _WORKDIR, _STAGES, *_REQUEST]
# What Python says of a flag's value, and what a person is told.
_PYTHON_SAYS = {
    'invalid literal for int()': 'a whole number',
    'could not convert string to float': 'a number',
    'Non-boolean argument': 'True or False',
}
_HELP = {'--help', '-help', '-h', '-?', '--helpshort', '--helpfull'}


def run_stages(
    config: Config | None, workdir: pathlib.Path, names: Iterable[str], given: Request
) -> None:
    """Runs stages in order; skips one that is done and unchanged, with a line that says so."""
    for name in names:
        alone = on_request.BEFORE | on_request.AFTER
        if given.input or given.model:
            alone |= on_request.ON_INPUT
        if name in alone:
            if name in on_request.AFTER and not given.model:
                hold = functools.partial(settings.refuse_other_settings, config, workdir, name)
                hosts.first_alone(hold, f'{name} uses what was made')
            print(guide.announce(name, config, workdir, given), flush=True)
            alone[name](config, workdir, given)
            continue
        begin = functools.partial(_begin_unless_done, config, workdir, name, given)
        if not hosts.first_decides(begin, f'{name} begins'):
            print(f'{name}: done before with the same settings, skipped')
            continue
        mirror.push()  # that it is begun, before anything that it replaces goes
        began = time.monotonic()
        done = pipeline.PIPELINE[name][0](config, workdir)
        seconds = time.monotonic() - began
        mirror.share()
        finish = functools.partial(_finish, config, workdir, name, done.outputs, seconds)
        hosts.first_alone(finish, f'{name} is done')
        mirror.push()
        print(f'{name}: done in {seconds:.0f} s')
        outcome.show_table(done.rows, done.head)


def _begin_unless_done(config: Config, workdir: pathlib.Path, name: str, given: Request) -> bool:
    """Says and records that a stage begins; False if it is done. Changes nothing if the stage is
    refused."""
    settings.refuse_foreign_workdir(workdir)
    initial_model.refuse_misfit(config)
    made_with = settings.stage_settings(config, workdir)[name]
    is_done = manifest.is_done(workdir, name, manifest.fingerprint(made_with))
    if not is_done:
        settings.refuse_other_settings(config, workdir, name)
    (workdir / on_request.STOPPED).unlink(missing_ok=True)
    if is_done:
        return False
    seconds = manifest.read_seconds(workdir, name)  # what begins forgets it
    print(guide.announce(name, config, workdir, given, seconds), flush=True)
    manifest.begin(workdir, name, made_with)  # first: from here on the folder is a run's
    texts = {
        'config.json': config.to_json_best_effort(indent=2),
        'environment.json': json.dumps(describe_environment(), indent=2),
    }
    folders = [workdir]
    if name in pipeline.TRAINED:
        folder = workdir / pipeline.TRAINED[name]
        # A training that goes on keeps the records of its beginning.
        if not (settings.newest_step(workdir, name) and (folder / 'config.json').exists()):
            folders.append(folder)
    for folder in folders:
        for file, text in texts.items():
            atomic.write_text(folder / file, text)
    return True


def _finish(
    config: Config, workdir: pathlib.Path, name: str, outputs: list[pathlib.Path], seconds: float
) -> None:
    if name == 'prepare' and config.phantom.make:  # only now are the studies there to describe
        made_with = settings.stage_settings(config, workdir)[name]
    else:  # files may have changed since
        made_with = manifest.read_begun(workdir, name)
    manifest.finish(workdir, name, made_with, outputs, seconds)


def _check_stages(text: str) -> list[str]:
    # the order in which they run
    known = [*on_request.BEFORE, *pipeline.PIPELINE, *on_request.AFTER]
    names = [name.strip() for name in text.split(',') if name.strip()]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        named = ', '.join(unknown) or 'none'
        meant = ''.join(guide.suggest(name, known) for name in unknown)
        raise InputError(f'--stages: {named} is not known{meant}; choose from {", ".join(known)}')
    return sorted(names, key=known.index)


def _read_request() -> Request:
    given = {flag.name: flag.value for flag in _REQUEST}
    given |= {name: buckets.local_paths(given[name]) for name in (*_PATHS, 'model')}
    paths = {name: pathlib.Path(given[name]) if given[name] else None for name in _PATHS}
    request = Request(**given | paths)
    if request.num_workers is not None and request.num_workers < 0:
        raise InputError(f'--num_workers={request.num_workers}: must be 0 or more')
    if _CONFIG.value is not None or request.model:
        return request
    if not request.input or _STAGES.value not in (None, 'predict'):
        raise InputError(
            '--input=SCANS --output=FOLDER segments scans; for all else --config is missing, for '
            'example --config=configs/transunet.py:phantom'
        )
    return dataclasses.replace(request, model=DEFAULT)


def _run(arguments: list[str]) -> None:
    if len(arguments) > 1:
        meant = f' (did you mean --stages={arguments[1]}?)' if arguments[1] in guide.STAGES else ''
        raise InputError(f'{arguments[1]}: not a flag{meant}; flags begin with --, see --help')
    if _CACHE.value:
        bucket.use_cache(_CACHE.value)
    config, given = _CONFIG.value, _read_request()
    try:
        names = _check_stages(_STAGES.value or ('predict' if given.model else config.stages))
    except OSError as error:  # config_flags misses a file only when the config is first used
        raise InputError(f'--config: {_one_line(error)}') from error
    if config is not None:
        values.refuse_unusable(config, names)
    if given.model and names not in (['predict'], ['evaluate']):
        raise InputError('--model is for --stages=predict or --stages=evaluate alone')
    place = ''
    if config is None:
        workdir, cache = pathlib.Path(), pathlib.Path.home() / '.cache' / 'covseg_jax'
    else:
        place = _WORKDIR.value or f'runs/{config.name}-{config.variant}'
        workdir = bucket.local_path(place)
        cache = workdir / 'compile_cache'
    # JAX reads it when a stage imports it: what was compiled once is there for the next run.
    os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(cache.absolute()))
    hosts.connect(config.distributed if config else {'coordinator': ''})
    with contextlib.ExitStack() as stack:
        if not hosts.is_first():  # only the first host prints
            os.environ['TQDM_DISABLE'] = '1'
            nowhere = stack.enter_context(open(os.devnull, 'w'))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        flags_given = {flag.name: flag.value for flag in _REQUEST}
        stack.enter_context(buckets.opened(config, place, names, flags_given))
        in_workdir = not given.model and any(name in pipeline.PIPELINE for name in names)
        if in_workdir:
            atomic.remove_leftovers(workdir)  # each host its own
        try:
            run_stages(config, workdir, names, given)
        except Stopped as stop:
            if hosts.is_first() and in_workdir:
                atomic.write_text(workdir / on_request.STOPPED, f'{stop}\n')
            raise


def main(arguments: list[str]) -> int:
    """Runs, and turns what a person can mend into one line and an exit code."""
    logging.set_verbosity(logging.ERROR)  # Orbax logs each file that it opens and closes
    try:
        _run(arguments)
    except (InputError, OSError) as error:  # a full or read-only disk, no file that can be read
        print(f'error: {one_line(error)}', file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if str(error.name).startswith(__package__):
            raise
        print(
            f'error: {error.name} is not installed, which training and evaluation need; '
            "pip install '.[train]' in the checkout",
            file=sys.stderr,
        )
        return 1
    except Stopped as stop:
        print(stop, file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        print(f'stopped; {GO_ON}', file=sys.stderr)
        return 130  # a stage's result is not there, and a script must not go on as if it were
    return 0


def _parse_flags(arguments: list[str]) -> list[str]:
    if asked := _HELP.intersection(arguments):
        config = _read_config(arguments) if '--helpfull' in asked else None
        print(guide.help_text({each.name: flags.FLAGS[each.name].help for each in _FLAGS}, config))
        sys.exit(0)
    try:
        return flags.FLAGS(arguments)
    except (
        flags.Error, AttributeError, ImportError, KeyError, TypeError, ValueError, OSError
    ) as error:  # fmt: skip
        # A misspelt field, a value of the wrong type, a variant that is not there.
        what, text = '', _one_line(error)
        if isinstance(error, flags.UnrecognizedFlagError):
            meant = guide.suggest(error.flagname, [flag.name for flag in _FLAGS], '--')
            text = f'--{error.flagname} is not a flag{meant}; --help lists them'
        elif text.startswith("'"):  # the bare name of a field that is not there
            what, text = 'the config has no field ', _name_field(arguments) or text
        if isinstance(error, ImportError):
            what, text = '--config: ', f'{text}; run it in the folder above configs/'
        print(f'error: {what}{text}', file=sys.stderr)
        sys.exit(2)


def _name_field(arguments: list[str]) -> str:
    """The first field that is set and that the config has not, and which it may have meant."""
    config = _read_config(arguments)
    known = {} if config is None else guide.config_fields(config)
    given = (each.lstrip('-').partition('=')[0] for each in arguments)
    unknown = [name for name in given if name.startswith('config.') and name not in known]
    if not unknown:
        return ''
    meant = guide.suggest(unknown[0], known, '--')
    return f'{unknown[0].removeprefix("config.")}{meant}; --helpfull lists its fields'


def _read_config(arguments: list[str]) -> Config | None:
    """The config that is named, or that of configs/transunet.py, as it is without the fields that
    are set beside it; None where there is none. For a program that ends afterwards: flags are lost.
    """
    named = [each for each in arguments[1:] if each.startswith(('--config=', '-config='))]
    sys.argv = [arguments[0], *(named or ['--config=configs/transunet.py'])]
    flags.FLAGS.unparse_flags()
    try:
        flags.FLAGS(sys.argv)
        _CONFIG.value.lock()  # a file that is not there is only now missed
    except Exception:  # of a config, which is a program
        return None
    return _CONFIG.value


def _one_line(error: Exception) -> str:
    # config_flags wraps errors in errors, and puts whole tracebacks into its messages: their last
    # line says what was wrong.
    while error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    for said, expected in _PYTHON_SAYS.items():
        if said in str(error):
            return f'{str(error).split(": ")[0]}: must be {expected}'
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if 'Traceback' in text:
        return re.sub(r'^\w+Error: ', '', lines[-1])  # its type means nothing to a person
    return lines[-1] if isinstance(error, OSError) else '; '.join(lines)


if __name__ == '__main__':
    app.run(main, flags_parser=_parse_flags)
