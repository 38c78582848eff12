"""Prepared cases on disk, and which subject serves what."""

import dataclasses
import functools
import hashlib
import json
import pathlib
import re
import threading
from collections.abc import Container, Mapping, Sequence

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
        """(D, H, W) uint8 human (or phantom) mask, memory-mapped."""
        return _open(self.folder / 'lesion.npy')

    def read_slice(self, name: str, z: int) -> np.ndarray:
        """(H, W), slice z of 'image' or 'lungs' as it is stored: for feeds, which read single
        slices of all cases in turn, and would parse a header and map a file for each."""
        if name not in self._files:
            self._files[name] = SliceFile(_open(self.folder / f'{name}.npy'))
        return self._files[name][z]

    @functools.cached_property
    def _files(self) -> dict[str, 'SliceFile']:
        return {}


class SliceFile:
    """A stored (D, H, W) array of which single slices are read, each (H, W). Its header is parsed
    once, and the file is not held open: of hundreds, which a mapped array each would be, a process
    may not hold as many."""

    def __init__(self, mapped: np.memmap):
        self._path, self._offset = str(mapped.filename), mapped.offset
        self._dtype, self._shape = mapped.dtype, mapped.shape
        self._is_in_rows = mapped.flags.c_contiguous

    def __getitem__(self, z: int) -> np.ndarray:
        if not self._is_in_rows:
            return _open(self._path)[z]
        count = self._shape[1] * self._shape[2]
        start = self._offset + range(self._shape[0])[z] * count * self._dtype.itemsize
        return np.fromfile(self._path, self._dtype, count, offset=start).reshape(self._shape[1:])


def _open(path: str | pathlib.Path) -> np.ndarray:
    # One at a time: NumPy parses the header with ast, whose count of its depth threads share in
    # Python 3.11 (python/cpython#106905), and a thread of a feed then fails, rarely.
    with _OPENING:
        return np.load(path, mmap_mode='r')


def find_cases(
    prepared: str | pathlib.Path,
    *,
    subject_pattern: str = '(.*)',
    healthy_pattern: str = '',
    only: Container[str] | None = None,
) -> tuple[Case, ...]:
    """All prepared cases of a folder, sorted by study id.

    Args:
      prepared: the folder that the stage `prepare` filled.
      subject_pattern: as `name_subject` takes it; the default makes every study a subject of its
        own.
      healthy_pattern: regular expression; a study whose whole id it matches is healthy, whatever
        its data set says of it or does not say. '' leaves all as their data set has them.
      only: the study ids to look at, where the folder holds cases of other data sets too.

    Raises:
      InputError: the folder is missing or holds no such case, or a pattern is no regular expression
        or names no subject in a study's id.
    """
    prepared = pathlib.Path(prepared)
    healthy = _compile('data.healthy_pattern', healthy_pattern)
    cases = []
    for description_file in sorted(prepared.glob('[!.]*/geometry.json')):
        description = json.loads(description_file.read_text(encoding='utf-8'))
        study_id = description['study_id']
        if only is not None and study_id not in only:
            continue
        is_named_healthy = bool(healthy_pattern and healthy.fullmatch(study_id))
        folder = description_file.parent
        cases.append(
            Case(
                study_id=study_id,
                subject=name_subject(study_id, subject_pattern),
                folder=folder,
                # Not when it is prepared: another pattern holds at once, and no array changes.
                category=HEALTHY if is_named_healthy else description['category'],
                has_lesion_mask=(folder / 'lesion.npy').exists(),
                description=description,
            )
        )
    if not cases:
        raise InputError(f'{prepared}: no prepared cases; run --stages=prepare first')
    return tuple(cases)


def name_subject(study_id: str, subject_pattern: str) -> str:
    """The subject of a study.

    Args:
      study_id: the study's.
      subject_pattern: regular expression whose first group, matched at the start of a study id,
        names the subject.

    Raises:
      InputError: it is no regular expression, or names no subject in this id.
    """
    match = _compile('data.subject_pattern', subject_pattern).match(study_id)
    if match is None or not match.groups() or not match.group(1):
        raise InputError(
            f'data.subject_pattern {subject_pattern!r} does not match study {study_id}; '
            'give a regular expression with one group that names the subject'
        )
    return match.group(1)


def _compile(setting: str, pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise InputError(f'{setting} {pattern!r}: {error}') from error


@dataclasses.dataclass(frozen=True)
class Splits:
    """Which cases serve what. No subject stands in two of these, except that `evaluation` subjects
    get pseudo-masks too, so that those can be measured."""

    healthy_train: tuple[Case, ...]  # the GAN's healthy scans; zero-lesion slices for training
    # Held out: thresholds are found on these, and rounds of painted scans validated.
    healthy_calibration: tuple[Case, ...]
    train: tuple[Case, ...]  # COVID scans that the networks learn from
    validation: tuple[Case, ...]  # COVID scans for the other rounds, by the same targets as train
    evaluation: tuple[Case, ...]  # subjects with a human mask: never trained on


def evaluation_cases(cases: tuple[Case, ...], evaluation_pattern: str = '.*') -> tuple[Case, ...]:
    """The cases that are scored: those with a lesion mask whose subject is kept for evaluation.
    Neither healthy scans nor any other cases are needed.

    Args:
      cases: all prepared cases.
      evaluation_pattern: as in `split_cases`.

    Raises:
      InputError: the pattern is no regular expression; or a scan stands among the other cases too,
        under another name.
    """
    subjects = _evaluation_subjects(cases, evaluation_pattern)
    kept = tuple(c for c in cases if c.subject in subjects)
    others = tuple(c for c in cases if c.subject not in subjects)
    _refuse_leakage({'evaluation': kept, 'training': others})
    return tuple(case for case in kept if case.has_lesion_mask)


def _evaluation_subjects(cases: tuple[Case, ...], evaluation_pattern: str) -> set[str]:
    kept = _compile('data.evaluation_pattern', evaluation_pattern)
    return {c.subject for c in cases if c.has_lesion_mask and kept.fullmatch(c.subject)}


def _held_out(subjects: set[str], fraction: float, seed: int) -> set[str]:
    """The subjects whose hash lies in the lowest `fraction` of all hashes: the side of each depends
    on its name and the seed alone, whoever else is there.

    At least one subject is held out and one is not. Only where the hashes alone would put all on
    one side, the lowest or the highest of them goes to the other, and a subject that comes later
    may take its place.
    """
    if len(subjects) < 2 or fraction <= 0:
        return set()
    hashes = {s: hashlib.sha256(f'{seed}:{s}'.encode()).digest() for s in subjects}
    lowest, *_, highest = sorted(subjects, key=hashes.__getitem__)
    low = {s for s in subjects if int.from_bytes(hashes[s]) < fraction * 2**256}
    return (low | {lowest}) - {highest}


def split_cases(
    cases: tuple[Case, ...],
    *,
    seed: int,
    calibration_fraction: float,
    validation_fraction: float,
    evaluation_pattern: str = '.*',
    needs_covid: bool = True,
) -> Splits:
    """Splits by subject: evaluation = the subjects with a lesion mask, the rest by category.

    Args:
      cases: all prepared cases.
      seed: changes who is held out.
      calibration_fraction: chance of a healthy subject to be held out, in [0, 1).
      validation_fraction: the same of the other COVID subjects, in [0, 1).
      evaluation_pattern: regular expression that the whole name of a subject must match to be kept
        for evaluation; other subjects with a lesion mask may be trained on.
      needs_covid: refuse fewer than two COVID subjects beside those for evaluation.

    Raises:
      InputError: fewer than two healthy, or too few COVID subjects are left: there is nothing to
        learn from; the pattern is no regular expression; or one scan stands in two splits under two
        names.
    """
    evaluation = _evaluation_subjects(cases, evaluation_pattern)
    learnable = [c for c in cases if c.subject not in evaluation]
    # A subject with a healthy and a diseased study counts as diseased.
    covid = {c.subject for c in learnable if not c.is_healthy}
    healthy = {c.subject for c in learnable} - covid
    if len(healthy) < 2:
        raise InputError(
            f'prepared cases: {len(healthy)} healthy subjects to learn from, and training needs at '
            'least two; name the healthy studies with --config.data.healthy_pattern, a regular '
            f'expression on the study id (without it those of category {HEALTHY} are healthy)'
        )
    if needs_covid and len(covid) < 2:
        raise InputError(
            f'prepared cases: {len(covid)} COVID subjects to learn from, and training needs at '
            'least two where it learns from any; subjects with a lesion mask are kept for '
            'evaluation where --config.data.evaluation_pattern matches them; '
            '--config.train.rounds="(\'synthetic\',)" learns from healthy scans alone'
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
    _refuse_leakage(
        {field.name: getattr(splits, field.name) for field in dataclasses.fields(splits)}
    )
    return splits


def _refuse_leakage(sides: Mapping[str, Sequence[Case]]) -> None:
    seen: dict[int, tuple[str, Case]] = {}
    for name, cases in sides.items():
        for case in cases:
            crc32 = case.description.get('voxel_crc32')
            role, other = seen.setdefault(crc32, (name, case))
            if crc32 is not None and role != name:
                raise InputError(
                    f'{case.study_id}: the same scan as {other.study_id}, and they would stand in '
                    f'{name} and {role}; remove one of them from {case.folder.parent}, or '
                    'give both one subject with data.subject_pattern'
                )
