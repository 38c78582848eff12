"""Every file of a data set checked, and every fault named, without preparing anything."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np
import tqdm

from covseg_jax.errors import FileFault
from covseg_jax.imaging import formats
from covseg_jax.imaging.studies import Study
from covseg_jax.imaging.workers import map_in_processes
from covseg_jax.prepare import study_files
from covseg_jax.prepare.prepare_studies import PrepareSettings, copy_fault, find_copies

COLUMNS = ('study', 'file', 'status', 'fault', 'what_to_do')
OK, NOTE, UNUSABLE = 'ok', 'note', 'unusable'


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of verify.csv.

    Attributes:
        study: its id; '' of a file that is no study's.
        file: path of the file that the line is about.
        status: 'ok' for a study without fault, in one line; 'note' for what a rule decided;
            'unusable' for a fault.
        fault: what is wrong, or was decided; empty for 'ok'.
        what_to_do: empty for 'ok' and where a rule decided.
    """

    study: str
    file: str
    status: str
    fault: str = ''
    what_to_do: str = ''


def verify_studies(
    studies: Sequence[Study], settings: PrepareSettings, *, num_workers: int
) -> list[Finding]:
    """Reads everything that `prepare` would read, and the lung masks too, in parallel.

    All faults of a study are reported: of each of its files, lungs that are not found, and an image
    that another study has too, voxel for voxel.

    Args:
        studies: from studies.find_studies or find_inputs.
        settings: of `prepare`.
        num_workers: processes; 0 or 1 works in this one.

    Returns:
        In the order of the studies; one line or more each.

    Raises:
        InputError: a process was killed.
    """
    check = functools.partial(_verify_study, settings=settings)
    findings: dict[str, list[Finding]] = {}
    voxels = {}
    with tqdm.tqdm(total=len(studies), desc='verify', unit='study', disable=None) as bar:
        for study_id, found, of_image in map_in_processes(check, studies, num_workers, 'verify'):
            bar.update()
            findings[study_id] = found
            if of_image is not None:
                voxels[study_id] = of_image
    for first, other in find_copies(studies, voxels):
        findings[other.study_id].append(_unusable(other, copy_fault(first, other)))
    lines = []
    for study in studies:
        found = findings[study.study_id]
        lines += found or [Finding(study.study_id, str(study.image), OK)]
    return lines


def _unusable(study: Study, error: FileFault) -> Finding:
    return Finding(study.study_id, str(error.file), UNUSABLE, error.fault, error.remedy)


def _verify_study(
    study: Study, settings: PrepareSettings
) -> tuple[str, list[Finding], tuple | None]:
    """The study's id, its faults and notes, and what identifies its voxels."""
    findings: list[Finding] = []

    def attempt(read: Callable):
        try:
            return read()
        except FileFault as error:
            findings.append(_unusable(study, error))
        return None

    image = attempt(lambda: study_files.read_image(study))
    if image is None:
        # Their grids cannot be compared to the image's, but damage can be found.
        for path in (study.lesion_mask, study.lung_mask):
            if path is not None:
                attempt(functools.partial(formats.read_volume, path, study.index))
        return study.study_id, findings, None
    findings += [Finding(study.study_id, str(study.image), NOTE, note) for note in image.notes]
    attempt(lambda: study_files.find_study_lungs(study, image, settings.lungs_source))
    if study.lesion_mask is not None:
        attempt(lambda: study_files.read_mask(study, 'lesion_mask', image, settings.lesion_labels))
    if study.lung_mask is not None and not study_files.uses_lung_mask(study, settings.lungs_source):
        attempt(lambda: study_files.read_mask(study, 'lung_mask', image, labels=None))
    # Not the checksum alone: its 32 bits are few.
    mean = float(image.array.mean(dtype=np.float64))
    return study.study_id, findings, (study_files.voxel_crc32(image), image.array.shape, mean)
