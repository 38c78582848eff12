"""What launch/measure.sh does: phantoms that no training saw, models, their scores, one table."""

import argparse
import dataclasses
import json
import os
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from covseg_jax import cpu

if __name__ == '__main__':
    cpu.tune_process()  # first of all: what is imported before is imported twice

from absl import logging

from configs import transunet
from covseg_jax import atomic, manifest, written
from covseg_jax.errors import GO_ON, InputError, one_line
from covseg_jax.evaluation import model_table
from covseg_jax.evaluation.model_scores import Row, score_studies
from covseg_jax.evaluation.model_table import Recipe
from covseg_jax.imaging.studies import find_inputs, find_studies
from covseg_jax.imaging.study import Study
from covseg_jax.phantom.studies import write_phantom_data_set
from covseg_jax.predict import default
from covseg_jax.predict.model import Model, average_models

# No training saw phantoms of this seed. Choices were made on them: the rule of cuts, the factor of
# the lungs' outermost pixels, and what the variant `phantom` learns from (docs/results.md).
SEED = 777001
NUM_PHANTOMS = 60
# Of the phantoms with lesions, those in CT-2, CT-3 and CT-4: about MosMedData's shares, but with a
# study of CT-4 among 60.
SEVERE_SHARES = (0.15, 0.05, 0.02)
TABLE, SCORES = 'table.md', 'scores.csv'
_RUN_CONFIG, _SUMS = 'transunet/config.json', 'SHA256SUMS'


def make_phantoms(
    folder: pathlib.Path, num: int, seed: int = SEED, **grid: Any
) -> dict[str, tuple[Study, ...]]:
    """Set → its studies: phantoms with lesions and true masks, and as many healthy ones, which are
    the same chests. Those that are there are kept. `grid` is shape and spacing_mm."""
    makes = {
        'phantoms': {'num_covid': num, 'num_healthy': 0, 'num_masked': num},
        'healthy_phantoms': {'num_covid': 0, 'num_healthy': num, 'num_masked': 0},
    }
    studies = {}
    for name, counts in makes.items():
        write_phantom_data_set(
            folder / name, **counts, **grid, seed=seed, severe_shares=SEVERE_SHARES,
            num_workers=cpu.count_cores(),
        )  # fmt: skip
        studies[name] = find_studies(folder / name, 'mosmed')
    return studies


def find_real(
    real_slices: pathlib.Path | None, healthy: pathlib.Path | None
) -> dict[str, tuple[Study, ...]]:
    """Set → its studies, of the folders that are given.

    Raises:
      InputError: a folder has no studies, or none with a lesion mask.
    """
    from covseg_jax.stages import inputs

    studies, tell = {}, inputs.tell_stray('measure')
    if real_slices:
        masked = tuple(each for each in find_inputs(real_slices, on_stray=tell) if each.lesion_mask)
        if not masked:
            raise InputError(
                f'{real_slices}: none of its studies has a lesion mask; give scans without lesions '
                'as --healthy'
            )
        studies['real_slices'] = masked
    if healthy:
        found = find_inputs(healthy, on_stray=tell)
        studies['healthy_scans'] = tuple(
            dataclasses.replace(each, lesion_mask=None) for each in found
        )
    return studies


def load_model(path: pathlib.Path) -> Model:
    """An export, or the trained network of a work directory, as its training was set.

    Raises:
      InputError: it is neither, is damaged, or was made by an older version whose settings had
        other names.
    """
    from covseg_jax.predict import export
    from covseg_jax.stages import inputs, settings

    made_with = path / _RUN_CONFIG
    if not made_with.is_file():
        return export.load(default.DEFAULT if path == default.FOLDER else path)
    manifest.refuse_other_settings(path, 'train', {}, '')  # by its names alone, for now
    # What an older run's config lacks is as it is today.
    config = transunet.get_config().unlock()
    with config.ignore_type():
        config.update(_with_tuples(json.loads(made_with.read_text(encoding='utf-8'))))
    settings.refuse_other_settings(config, path, 'predict')
    model, _ = inputs.load_model(config, path)
    return model


def _with_tuples(value: Any) -> Any:
    """JSON values, with tuples where JSON has lists, as configs have them."""
    if isinstance(value, Mapping):
        return {key: _with_tuples(each) for key, each in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


Run = tuple[pathlib.Path, ...]  # the folder of a model, or of several that are averaged


def _find_run(text: str) -> Run:
    """Models that are averaged are joined by '+', unless that is in the name of a folder."""
    names = [text] if os.path.exists(text) else text.split('+')
    # Beside others the default model is its networks, which weigh as much as they.
    of_default = (default.FOLDER,) if len(names) == 1 else default.MEMBERS
    return tuple(
        folder
        for name in names
        for folder in (
            of_default if name == default.DEFAULT else (pathlib.Path(os.path.abspath(name)),)
        )
    )


def name_models(arguments: Sequence[str]) -> dict[str, dict[str, Run]]:
    """Row of the table → run → its folders. Names are paths without what all have in common.

    Raises:
      InputError: a model is named twice, or is neither a run nor an export.
    """
    recipes = [[_find_run(each) for each in text.split(',')] for text in arguments]
    named = [run for recipe in recipes for run in recipe]
    in_runs = [[str(folder) for folder in run] for run in named]
    for names in (['+'.join(each) for each in in_runs], *in_runs):
        for name in names:
            if names.count(name) > 1:
                raise InputError(f'{name}: is named twice; name each model once')
    folders = [folder for run in named for folder in run]
    for folder in folders:
        is_default = folder == default.FOLDER
        if not (is_default or any((folder / name).is_file() for name in (_RUN_CONFIG, _SUMS))):
            raise InputError(
                f'{folder}: neither a work directory with a trained network (no {_RUN_CONFIG} in '
                'it) nor an export; --stages=export makes one'
            )
    common = os.path.commonpath([folder.parent for folder in folders])
    rows = {}
    for recipe in recipes:
        runs = {'+'.join(os.path.relpath(each, common) for each in run): run for run in recipe}
        rows[','.join(runs)] = runs
    return rows


def measure(
    folder: pathlib.Path,
    models: Mapping[str, Mapping[str, Run]],
    sets: Mapping[str, Sequence[Study]],
    num_workers: int | None = None,
) -> list[Recipe]:
    """Scores the models, as `name_models` gives them, on each set; writes table.md and scores.csv
    into `folder`, and keeps in it what is done.

    Raises:
      InputError: a model cannot be loaded, a scan or mask cannot be read, or `folder` holds one of
        the files and this program did not write it.
    """
    from covseg_jax.stages import inputs

    recipes = []
    for name, runs in models.items():
        rows_of = {}
        for run, folders in runs.items():
            model, rows_of[run] = average_models([load_model(each) for each in folders]), {}
            for set_name, studies in sets.items():
                workers = num_workers
                if workers is None:
                    workers = inputs.num_workers(None, studies)
                rows_of[run][set_name] = _score(model, studies, folder, workers, run, set_name)
        recipes.append(Recipe(name, rows_of))
    written.write_text(folder / TABLE, model_table.make_table(recipes))
    written.write_text(folder / SCORES, model_table.write_rows(recipes))
    return recipes


def _score(
    model: Model, studies: Sequence[Study], folder: pathlib.Path, workers: int, run: str, name: str
) -> list[Row]:
    began, title = time.monotonic(), f'{run}: {name}'
    rows = score_studies(model, studies, folder / 'done' / name, workers, title)
    for row in rows:
        if row['status'] != 'ok':
            print(f'measure: {title}: note: finds nothing in {row["study_id"]}: {row["status"]}')
    print(f'measure: {title}: {len(rows)} studies, {time.monotonic() - began:.0f} s', flush=True)
    return rows


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f'{text!r}: must be 0 or more')
    return int(text)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser('launch/measure.sh', description=__doc__)
    parser.add_argument('folder', type=pathlib.Path, help='for phantoms, scores and the table')
    parser.add_argument(
        'models', nargs='+', metavar='MODEL', help='RUN,RUN: of one recipe; RUN+RUN: averaged'
    )
    for name, text in (
        ('real_slices', 'a data set with lesion masks'),
        ('healthy', 'healthy scans'),
    ):
        parser.add_argument(f'--{name}', type=pathlib.Path, metavar='DIR', help=text)
    parser.add_argument('--phantoms', type=int, default=NUM_PHANTOMS, metavar='N')
    parser.add_argument('--seed', type=int, default=SEED, metavar='N', help='of the phantoms')
    parser.add_argument('--num_workers', type=_count, metavar='N')
    return parser.parse_intermixed_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Measures, and prints the table."""
    given = _parse(arguments)
    logging.set_verbosity(logging.ERROR)  # Orbax logs each file that it opens and closes
    # JAX reads it when it is imported: what was compiled once is there for the next run.
    cache = pathlib.Path.home() / '.cache' / 'covseg_jax'
    os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(cache))
    phantom = transunet.get_config('phantom').phantom
    try:
        models = name_models(given.models)
        sets = find_real(given.real_slices, given.healthy)
        if not sets and given.phantoms < 1:
            raise InputError('--phantoms: without any, give --real_slices or --healthy')
        written.refuse_foreign([given.folder / TABLE, given.folder / SCORES])
        given.folder.mkdir(parents=True, exist_ok=True)
        atomic.remove_leftovers(given.folder)
        grid = {'shape': tuple(phantom.shape), 'spacing_mm': tuple(phantom.spacing_mm)}
        if given.phantoms > 0:
            sets = make_phantoms(given.folder, given.phantoms, given.seed, **grid) | sets
        measure(given.folder, models, sets, given.num_workers)
    except (InputError, OSError) as error:
        print(f'error: {one_line(error)}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f'stopped; {GO_ON}', file=sys.stderr)
        return 130
    print((given.folder / TABLE).read_text(encoding='utf-8'))
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
