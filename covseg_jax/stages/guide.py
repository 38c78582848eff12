"""What a person is told of the stages: --help, a line before each begins, and what a misspelt name
may have meant."""

import difflib
import pathlib
import textwrap
from collections.abc import Iterable, Mapping

from covseg_jax.stages import inputs, on_request
from covseg_jax.stages.inputs import Config, Request
from covseg_jax.stages.pipeline import PIPELINE, TRAINED

# Each stage after its name: what it does.
STAGES = {
    'prepare': "finds the lungs in every study, and brings it to the model's grid",
    'gan': 'trains the GAN that turns scans into healthy-looking ones',
    'synthesize': 'makes a pseudo-mask of every COVID scan; by default what the GAN took away',
    'train': 'trains the segmentation network, on painted opacities, pseudo-masks or both',
    'evaluate': "scores masks against human ones; a network's on a page with figures too",
    'verify': 'reads every file of a data set, and says which cannot be used and why',
    'compile_check': 'compiles the training steps for a TPU that need not be there',
    'import_weights': 'makes published TransUNet weights the start of a training',
    'lungs': 'trains a network that finds lungs, on phantoms',
    'export': 'writes the trained network as one folder that predicts on any machine',
    'predict': 'marks the lesions of scans, and writes a mask for each study',
    'pseudo_masks': "writes pseudo-masks as NIfTI, and nnU-Net's raw layout",
    'compare': 'compares two evaluated runs, study by study',
    'status': 'says where a work directory stands',
}
# Where those on request write without --output, in the work directory.
_PLACES = {
    'verify': 'verify.csv', 'compile_check': 'compile_check.json', 'import_weights': 'transunet',
    'lungs': 'lungs', 'export': 'export', 'evaluate': 'evaluation_of_folder',
}  # fmt: skip
_WITHOUT_OUTPUT = ('compile_check', 'import_weights', 'status')

_HEAD = """\
covseg_jax segments COVID-19 lesions in chest CT without human masks: a network learns from
opacities painted into healthy scans, and from pseudo-masks, which are what a GAN takes away where
it turns a scan into a healthy-looking one. It is research software and not a medical device.

  python -m covseg_jax.main --input=SCANS --output=FOLDER [FLAGS]
      marks the lesions of scans with the model that comes with it
  python -m covseg_jax.main --config=configs/NAME.py[:VARIANT] [--config.GROUP.FIELD=VALUE] [FLAGS]
      runs the stages of a configuration"""
_EXAMPLES = """\
Examples:
  python -m covseg_jax.main --input=scan.nii.gz --output=lesions/ --preview
  python -m covseg_jax.main --config=configs/transunet.py:phantom
  python -m covseg_jax.main --config=configs/transunet.py --config.data.folder=DATA --stages=verify

--helpfull lists every field of the configuration too; configs/base.py says what each is."""


def help_text(flags: Mapping[str, str], config: Config | None = None) -> str:
    """What --help prints: the program, its stages, `flags` by name with what each does, examples;
    with a config all of its fields, with their values."""
    on_demand = {**on_request.BEFORE, **on_request.AFTER}
    parts = [
        _HEAD,
        'The stages, in this order; one that is done is skipped:',
        _columns({name: STAGES[name] for name in PIPELINE}),
        'On request, with --stages=NAME:',
        _columns({name: STAGES[name] for name in on_demand}),
        'Flags:',
        _columns({f'--{name}': text for name, text in flags.items()}),
    ]
    if config is not None:
        fields = [f'  --{name}={value!r}' for name, value in config_fields(config).items()]
        parts += ['Fields of the configuration, and their values:', '\n'.join(fields)]
    text = '\n\n'.join([*parts, _EXAMPLES])
    return text.replace(':\n\n  ', ':\n  ')


def _columns(texts: Mapping[str, str]) -> str:
    indent = ' ' * 18
    wrapped = (textwrap.wrap(text, 100 - len(indent)) for text in texts.values())
    return '\n'.join(
        f'  {name:16}' + f'\n{indent}'.join(lines)
        for name, lines in zip(texts, wrapped, strict=True)
    )


def config_fields(config: Config) -> dict[str, object]:
    """Every field's value by the name of its flag, such as config.train.batch_size."""
    found: dict[str, object] = {}

    def add(values: Mapping, prefix: str) -> None:
        for name, value in values.items():
            if isinstance(value, Mapping):
                add(value, f'{prefix}{name}.')
            else:
                found[prefix + name] = value

    add(config.to_dict(), 'config.')
    return found


def suggest(name: str, known: Iterable[str], before: str = '') -> str:
    """' (did you mean ...?)' with the nearest of the known names, each after `before`; '' where
    none is near. What follows a name's last dot counts most: config.batch_size has near ones in
    every group."""
    last_of = {each: each.rpartition('.')[2] for each in known}
    last = difflib.get_close_matches(name.rpartition('.')[2], set(last_of.values()), 1, cutoff=0.7)
    near = [each for each in last_of if last_of[each] in last]
    near = difflib.get_close_matches(name, near, 1, cutoff=0.9) or near
    return f' (did you mean {" or ".join(before + each for each in near)}?)' if near else ''


def announce(
    name: str, config: Config | None, workdir: pathlib.Path, given: Request,
    seconds: float | None = None,
) -> str:  # fmt: skip
    """The line before a stage begins: what it does, where it writes, and how many seconds it took
    the last time, where that is known."""
    place = _place(name, config, workdir, given)
    text = f'{name}: {STAGES[name]}'
    text += f'; writes {place}' if place else ''
    return text + (f'; took {seconds:.0f} s the last time' if seconds is not None else '')


def _place(
    name: str, config: Config | None, workdir: pathlib.Path, given: Request
) -> pathlib.Path | None:
    on_input = name in on_request.ON_INPUT and (given.input or given.model)
    in_pipeline = name in PIPELINE and not on_input
    if in_pipeline and name == 'prepare':
        return inputs.prepared_folder(config, workdir)
    if in_pipeline and name == 'synthesize':
        return inputs.pseudo_mask_folder(config, workdir)
    if in_pipeline and name == 'evaluate':
        return workdir / 'evaluation'
    if in_pipeline:
        return workdir / TRAINED.get(name, name)
    if given.output and name not in _WITHOUT_OUTPUT:
        return given.output
    return workdir / _PLACES[name] if name in _PLACES else None
