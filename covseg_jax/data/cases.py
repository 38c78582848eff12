"""Prepared cases on disk, and which subject serves what."""

import dataclasses
import functools
import hashlib
import json
import pathlib
import re
import threading

import numpy as np

from covseg_jax.errors import InputError
from covseg_jax.imaging.geometry import Geometry

HEALTHY = 'CT-0'
_OPENING = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Case:
    """One prepared case: a folder that holds its arrays, and what its geometry.json says of it."""

    study_id: str
    subject: str
    folder: pathlib.Path
    category: str | None
    has_lesion_mask: bool
    description: dict

    @property
    def is_healthy(self) -> bool:
        """True for a study that its data set calls free of COVID-19 signs."""
        return self.category == HEALTHY

    @functools.cached_property
    def geometry(self) -> Geometry:
        """How the arrays lie in the study's own grid."""
        return Geometry.from_json(self.description['geometry'])

    def image(self) -> np.ndarray:
        """(D, H, W) float16 in [0, 1], 0 outside the lungs, memory-mapped."""
        return _open(self.folder / 'image.npy')

    def lungs(self) -> np.ndarray:
        """(D, H, W) uint8, memory-mapped."""
        return _open(self.folder / 'lungs.npy')

    def lesion(self) -> np.ndarray:
        """(D, H, W) uint8 human (or phantom) mask, memory-mapped; for evaluation only."""
        return _open(self.folder / 'lesion.npy')


def _open(path: pathlib.Path) -> np.ndarray:
    # One at a time: NumPy parses the header with ast, whose count of its depth threads share in
    # Python 3.11 (python/cpython#106905), and a thread of a feed then fails, rarely.
    with _OPENING:
        return np.load(path, mmap_mode='r')


def find_cases(prepared: str | pathlib.Path, *, subject_pattern: str = '(.*)') -> tuple[Case, ...]:
    """All prepared cases of a folder, sorted by study id.

    Args:
      prepared: the folder that the stage `prepare` filled.
      subject_pattern: regular expression whose first group, matched at the start of a study id,
        names the subject; the default makes every study a subject of its own.

    Raises:
      InputError: the folder is missing or holds no case, or the pattern fits no study.
    """
    prepared = pathlib.Path(prepared)
    cases = []
    for description_file in sorted(prepared.glob('[!.]*/geometry.json')):
        description = json.loads(description_file.read_text(encoding='utf-8'))
        study_id = description['study_id']
        match = re.match(subject_pattern, study_id)
        if match is None or not match.groups():
            raise InputError(
                f'data.subject_pattern {subject_pattern!r} does not match study {study_id}; '
                'give a regular expression with one group that names the subject'
            )
        folder = description_file.parent
        cases.append(
            Case(
                study_id=study_id,
                subject=match.group(1),
                folder=folder,
                category=description['category'],
                has_lesion_mask=(folder / 'lesion.npy').exists(),
                description=description,
            )
        )
    if not cases:
        raise InputError(f'{prepared}: no prepared cases; run --stages=prepare first')
    return tuple(cases)


@dataclasses.dataclass(frozen=True)
class Splits:
    """Which cases serve what. No subject stands in two of these, except that `evaluation` subjects
    get pseudo-masks too, so that those can be measured."""

    healthy_train: tuple[Case, ...]  # the GAN's healthy scans; zero-lesion slices for training
    healthy_calibration: tuple[Case, ...]  # held out: thresholds are found on these
    train: tuple[Case, ...]  # COVID scans that the networks learn from
    validation: tuple[Case, ...]  # COVID scans for schedules, by the same targets as train
    evaluation: tuple[Case, ...]  # subjects with a human mask: never trained on


def _by_hash(subjects: set[str], seed: int) -> list[str]:
    # A subject's place depends on its name and the seed alone: studies that come later do not
    # move the others to another side.
    return sorted(subjects, key=lambda s: hashlib.sha256(f'{seed}:{s}'.encode()).hexdigest())


def _held_out(subjects: set[str], fraction: float, seed: int) -> set[str]:
    if len(subjects) < 2 or fraction <= 0:
        return set()
    number = min(max(1, round(len(subjects) * fraction)), len(subjects) - 1)
    return set(_by_hash(subjects, seed)[:number])


def split_cases(
    cases: tuple[Case, ...],
    *,
    seed: int,
    calibration_fraction: float,
    validation_fraction: float,
    evaluation_pattern: str = '.*',
) -> Splits:
    """Splits by subject: evaluation = the subjects with a lesion mask, the rest by category.

    Args:
      cases: all prepared cases.
      seed: changes who is held out.
      calibration_fraction: share of the healthy subjects held out, in [0, 1).
      validation_fraction: share of the other COVID subjects held out, in [0, 1).
      evaluation_pattern: regular expression that the whole name of a subject must match to be kept
        for evaluation; other subjects with a lesion mask may be trained on.

    Raises:
      InputError: no healthy or no COVID subject is left: there is nothing to learn from; the
        pattern is no regular expression; or one scan stands in two splits under two names.
    """
    try:
        kept = re.compile(evaluation_pattern)
    except re.error as error:
        raise InputError(f'data.evaluation_pattern {evaluation_pattern!r}: {error}') from error
    evaluation = {c.subject for c in cases if c.has_lesion_mask and kept.fullmatch(c.subject)}
    learnable = [c for c in cases if c.subject not in evaluation]
    # A subject with a healthy and a diseased study counts as diseased.
    covid = {c.subject for c in learnable if not c.is_healthy}
    healthy = {c.subject for c in learnable} - covid
    if len(healthy) < 2 or len(covid) < 2:
        raise InputError(
            f'prepared cases: {len(healthy)} healthy ({HEALTHY}) and {len(covid)} COVID subjects '
            'to learn from; the method needs at least two of each (subjects with a lesion mask are '
            'kept for evaluation where data.evaluation_pattern matches them)'
        )
    calibration = _held_out(healthy, calibration_fraction, seed)
    validation = _held_out(covid, validation_fraction, seed)

    def pick(subjects: set[str]) -> tuple[Case, ...]:
        return tuple(c for c in cases if c.subject in subjects)

    splits = Splits(
        healthy_train=pick(healthy - calibration),
        healthy_calibration=pick(calibration),
        train=pick(covid - validation),
        validation=pick(validation),
        evaluation=pick(evaluation),
    )
    _refuse_leakage(splits)
    return splits


def _refuse_leakage(splits: Splits) -> None:
    seen: dict[int, tuple[str, Case]] = {}
    for field in dataclasses.fields(splits):
        for case in getattr(splits, field.name):
            crc32 = case.description.get('voxel_crc32')
            role, other = seen.setdefault(crc32, (field.name, case))
            if crc32 is not None and role != field.name:
                raise InputError(
                    f'{case.study_id}: the same scan as {other.study_id}, and they would stand in '
                    f'{field.name} and {role}; remove one of them from {case.folder.parent}, or '
                    'give both one subject with data.subject_pattern'
                )
