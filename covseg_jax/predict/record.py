"""What a study's result is and what it was made from: `<study_id>_results.json`."""

import dataclasses
import datetime
import functools
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

import covseg_jax
from covseg_jax import written
from covseg_jax.checksums import sha256
from covseg_jax.environment import describe_environment
from covseg_jax.imaging import formats
from covseg_jax.imaging.study import Study
from covseg_jax.predict.model import Model
from covseg_jax.prepare.prepare_studies import PreparedCase

FORMAT, VERSION = 'covseg_jax result', 1


def describe_run(model: Model) -> dict[str, Any]:
    """What the studies of a run have in common, as JSON values: model, settings, software."""
    return {
        'model': {
            'identity': model.identity,
            'networks': [dataclasses.asdict(origin) for origin in model.origins],
        },
        'settings': {
            'preparation': dataclasses.asdict(model.preparation),
            'masks': dataclasses.asdict(model.masks),
        },
        'software': _describe_software(),
    }


@functools.cache
def _describe_software() -> dict[str, Any]:
    import jax  # here alone: processes that write masks do without it

    found = {'covseg_jax': covseg_jax.__version__, **describe_environment()}
    return found | {'device': jax.devices()[0].device_kind}


def write_record(
    path: pathlib.Path,
    study: Study,
    case: PreparedCase,
    row: Mapping[str, Any],
    run: Mapping[str, Any],
) -> None:
    """Writes a study's record, once its other files are there.

    Args:
      path: the file; the study's mask lies beside it.
      study, case: the study, and what was made of it.
      row: its row of results.csv.
      run: from `describe_run`.
    """
    files = formats.source_files(study.image, study.files)
    content = {
        'format': FORMAT,
        'version': VERSION,
        'study_id': study.study_id,
        'finished': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
        'results': {
            name: value for name, value in row.items() if name not in ('study_id', 'notes')
        },
        'warnings': list(case.notes),
        'scan': {
            'name': study.image.name,
            'index': study.index,
            'files': len(files),
            'sha256': _describe_content(tuple(files)),
            'shape': list(case.geometry.source_shape),
            'spacing_mm': [round(float(each), 6) for each in _file_spacing(case)],
        },
        'mask_sha256': sha256(path.parent / str(row['mask'])),
        **run,
    }
    written.write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + '\n')


def _file_spacing(case: PreparedCase) -> np.ndarray:
    """Voxel size along the axes of the scan's own array, mm."""
    return np.linalg.norm(np.asarray(case.geometry.affine)[:3, :3], axis=0)


def _describe_content(files: tuple[pathlib.Path, ...]) -> str:
    """The SHA-256 of a scan's file; of a series, that of what `sha256sum` prints of its files."""
    if len(files) == 1:
        # One array has many studies: it is read once a process.
        return _sha256_of(files[0], files[0].stat().st_mtime_ns)
    lines = ''.join(f'{sha256(path)}  {path.name}\n' for path in files)
    return hashlib.sha256(lines.encode()).hexdigest()


@functools.lru_cache(maxsize=4)
def _sha256_of(path: pathlib.Path, mtime_ns: int) -> str:
    del mtime_ns  # what tells a file from another that takes its name later
    return sha256(path)
