"""NIfTI in -> NIfTI out on the same grid, with lesion ml, lung ml and infection %."""

import csv
import functools
import pathlib
from collections import deque
from collections.abc import Sequence
from concurrent import futures

import numpy as np
from tqdm import tqdm

from covseg_jax import atomic, hosts
from covseg_jax.errors import InputError
from covseg_jax.imaging import geometry as geometries
from covseg_jax.imaging.nifti import write_volume
from covseg_jax.imaging.prepare import PreparedCase, PrepareSettings, prepare_volume
from covseg_jax.imaging.studies import Study
from covseg_jax.imaging.workers import process_pool
from covseg_jax.inference.masks import MaskSettings, Probability, mask_on_study_grid

Row = dict[str, str | float]

COLUMNS = ('study_id', 'status', 'lesion_ml', 'lung_ml', 'infection_percent', 'mask')


def write_prediction(
    case: PreparedCase,
    probability: np.ndarray,
    settings: MaskSettings,
    output: pathlib.Path,
    *,
    write_probability: bool = False,
) -> Row:
    """Brings a case's lesion probability (D, H, W) back onto the study's grid and writes
    `<study_id>_mask.nii.gz` (uint8, the study's shape and affine) and, if asked,
    `<study_id>_probability.nii.gz` (float32).

    Returns:
      A row of results.csv.
    """
    found = mask_on_study_grid(probability, case.lungs, case.geometry, settings)
    affine = np.asarray(case.geometry.affine)
    path = output / f'{case.study_id}_mask.nii.gz'
    if write_probability:
        native = geometries.to_study_grid(probability, case.geometry) * found.lungs
        write_volume(
            output / f'{case.study_id}_probability.nii.gz',
            geometries.from_canonical(native.astype(np.float32), affine),
            affine,
        )
    write_volume(path, geometries.from_canonical(found.mask.astype(np.uint8), affine), affine)
    lesion_ml = float(found.mask.sum()) * case.geometry.study_voxel_ml
    lung_ml = float(found.lungs.sum()) * case.geometry.study_voxel_ml
    return {
        'study_id': case.study_id,
        'status': 'ok',
        'lesion_ml': lesion_ml,
        'lung_ml': lung_ml,
        'infection_percent': 100 * lesion_ml / lung_ml,
        'mask': path.name,
    }


def _write_results(path: pathlib.Path, rows: Sequence[Row]) -> None:
    with atomic.new_file(path) as temporary, temporary.open('w', newline='') as file:
        writer = csv.DictWriter(file, COLUMNS, restval='')
        writer.writeheader()
        writer.writerows(rows)


def predict_studies(
    studies: Sequence[Study],
    probability: Probability,
    preparation: PrepareSettings,
    settings: MaskSettings,
    output: pathlib.Path,
    *,
    num_workers: int = 1,
    write_probability: bool = False,
) -> tuple[list[Row], list[str]]:
    """Segments studies and writes results.csv; a study that cannot be used is named in it and
    passed over. Of several hosts each takes its share of them.

    While the network is at one study, other processes prepare the next ones and write those before:
    of each kind at most `num_workers` + 1 are under way, so that memory does not grow with their
    number.

    Args:
      studies: in the order of results.csv.
      probability: the network.
      preparation, settings: how studies become cases, and probabilities masks.
      output: gets the masks; it is made where it is not there.
      num_workers: processes beside this one. One study alone is done without them.
      write_probability: write the probability maps too.

    Returns:
      The rows of results.csv, and the messages of the studies passed over.

    Raises:
      InputError: a process was killed.
    """
    write = functools.partial(
        write_prediction, settings=settings, output=output, write_probability=write_probability
    )
    rows: list[Row | futures.Future] = []
    own = hosts.share(studies)
    with process_pool(min(num_workers, len(own) - 1), 'predict') as pool:
        to_prepare, preparing, writing = deque(own), deque(), deque()
        for study in tqdm(own, desc='predict', unit='study', disable=None):
            while to_prepare and len(preparing) <= num_workers:
                preparing.append(pool.submit(prepare_volume, to_prepare.popleft(), preparation))
            try:
                case = preparing.popleft().result()
            except InputError as error:
                rows.append({'study_id': study.study_id, 'status': str(error)})
                continue
            writing.append(pool.submit(write, case, probability(case.image, case.lungs)))
            rows.append(writing[-1])
            if len(writing) > num_workers:
                writing.popleft().result()
        rows = [row.result() if isinstance(row, futures.Future) else row for row in rows]
    rows = hosts.gather(rows, len(studies))
    if hosts.is_first():
        _write_results(output / 'results.csv', rows)
    return rows, [str(row['status']) for row in rows if row['status'] != 'ok']
