"""Every file of a data set checked, and every fault named, without preparing anything."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np
import tqdm

from covseg_jax.errors import FileFault
from covseg_jax.imaging import formats
from covseg_jax.imaging.study import Study
from covseg_jax.imaging.workers import map_in_processes
from covseg_jax.prepare import study_files
from covseg_jax.prepare.lung_report import describe_lungs
from covseg_jax.prepare.prepare_studies import PrepareSettings, copy_fault, find_copies

COLUMNS = (
    'study', 'file', 'status', 'fault', 'what_to_do', 'right_lung_ml', 'left_lung_ml'
)  # fmt: skip
OK, NOTE, UNUSABLE = 'ok', 'note', 'unusable'


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of verify.csv.

    Attributes:
        study: its id; '' of a file that is no study's.
        file: path of the file that the line is about.
        status: 'ok' for a study without fault, in one line; 'note' for what a rule decided, or
            what is doubtful about the lungs; 'unusable' for a fault.
        fault: what is wrong, or was decided; empty for 'ok'.
        what_to_do: empty for 'ok', and where a rule decided or lungs are doubtful.
        right_lung_ml, left_lung_ml: of the study, rounded, in each of its lines; None where no
            lungs were found.
    """

    study: str
    file: str
    status: str
    fault: str = ''
    what_to_do: str = ''
    right_lung_ml: float | None = None
    left_lung_ml: float | None = None


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
    voxels, volumes = {}, {}
    with tqdm.tqdm(total=len(studies), desc='verify', unit='study', disable=None) as bar:
        outcomes = map_in_processes(check, studies, num_workers, 'verify')
        for study_id, found, of_image, of_lungs in outcomes:
            bar.update()
            findings[study_id], volumes[study_id] = found, of_lungs
            if of_image is not None:
                voxels[study_id] = of_image
    for first, other in find_copies(studies, voxels):
        findings[other.study_id].append(_unusable(other, copy_fault(first, other)))
    lines = []
    for study in studies:
        found = findings[study.study_id] or [Finding(study.study_id, str(study.image), OK)]
        lines += [dataclasses.replace(each, **volumes[study.study_id]) for each in found]
    return lines


def _unusable(study: Study, error: FileFault) -> Finding:
    return Finding(study.study_id, str(error.file), UNUSABLE, error.fault, error.remedy)


def _verify_study(
    study: Study, settings: PrepareSettings
) -> tuple[str, list[Finding], tuple | None, dict[str, float]]:
    """The study's id, its faults and notes, what identifies its voxels, and the volumes of its
    lungs by column."""
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
        return study.study_id, findings, None, {}
    notes, volumes = image.notes, {}
    found_by = (settings.lungs_source, settings.lung_network)
    lungs = attempt(lambda: study_files.find_study_lungs(study, image, *found_by))
    if lungs is not None:
        report = describe_lungs(lungs, image.array, image.spacing_mm, image.voxel_ml)
        notes += report.notes
        volumes = {
            'right_lung_ml': round(report.right_ml, 1), 'left_lung_ml': round(report.left_ml, 1)
        }  # fmt: skip
    findings += [Finding(study.study_id, str(study.image), NOTE, note) for note in notes]
    if study.lesion_mask is not None:
        attempt(lambda: study_files.read_mask(study, 'lesion_mask', image, settings.lesion_labels))
    if study.lung_mask is not None and not study_files.uses_lung_mask(study, settings.lungs_source):
        attempt(lambda: study_files.read_mask(study, 'lung_mask', image, labels=None))
    # Not the checksum alone: its 32 bits are few.
    mean = float(image.array.mean(dtype=np.float64))
    identity = (study_files.voxel_crc32(image), image.array.shape, mean)
    return study.study_id, findings, identity, volumes
