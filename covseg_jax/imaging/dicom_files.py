"""Which files of a folder are slices of a CT series, and which series there are.

A file is passed over only if it says that it is something else: a damaged slice at either end of a
series leaves no gap.
"""

import contextlib
import itertools
import logging
import pathlib
import re
import struct
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pydicom

from covseg_jax import written
from covseg_jax.errors import FileFault
from covseg_jax.imaging.absent import find_absence, is_dangling

EXPORT_AGAIN = 'export the series again'
CONVERT = 'convert it with dcm2niix'
_CT_CLASSES = (
    '1.2.840.10008.5.1.4.1.1.2',
    '1.2.840.10008.5.1.4.1.1.2.1',  # Enhanced
    '1.2.840.10008.5.1.4.1.1.2.2',  # Legacy Converted Enhanced
)
_DICOM_ROOT = '1.2.840.10008.'  # of the identifiers that the standard itself gives
_DICOM_SUFFIXES = ('.dcm', '.dicom', '.ima')
# What may tell phases or reconstructions apart that share a series and their slices' places.
_PHASE_KEYS = (
    'AcquisitionNumber',
    'TemporalPositionIdentifier',
    'NominalPercentageOfCardiacPhase',
    'TriggerTime',
    'ConvolutionKernel',
    'KVP',
    'SliceThickness',
    'ImageType',
    'AcquisitionDateTime',
    'AcquisitionTime',
)
_HEAD_BYTES = 2**15  # of a file, in which the elements lie by which series are told apart
_CLASS, _SERIES, _PLACE = b'\x08\x00\x16\x00', b'\x20\x00\x0e\x00', b'\x20\x00\x32\x00'
_SCOUT, _PIXELS = b'LOCALIZER', b'\xe0\x7f\x10\x00'
# SOPClassUID, SeriesInstanceUID and ImagePositionPatient, of explicit type or without: four bytes.
_HEAD_ELEMENTS = re.compile(
    rb'(%s|%s).{4}([0-9.]{1,64})|(%s).{4}([-+0-9.eE\\ ]{5,52})|(%s)'
    % (*map(re.escape, (_CLASS, _SERIES, _PLACE)), _SCOUT),
    re.DOTALL,
)
_MOST_SCOUTS = 3  # images of a series that may be scouts, beside one of many times as many


@dataclass(frozen=True)
class Slice:
    """One slice of a series.

    Attributes:
        path: its file.
        frame: its place among the file's frames.
        header: the elements that belong to it, without pixels.
    """

    path: pathlib.Path
    frame: int
    header: pydicom.Dataset

    @property
    def name(self) -> str:
        """As messages call it."""
        many = num_frames(self.header) > 1
        return f'{self.path.name} (frame {self.frame + 1})' if many else self.path.name


@dataclass(frozen=True)
class Series:
    """A series, or one phase of it, beside others in a folder.

    Attributes:
        name: tells it from the others, such as 'series3' or 'series3_phase2'; '' if it is alone.
        files: None if it is alone; else its files.
    """

    name: str
    files: tuple[pathlib.Path, ...] | None


@contextlib.contextmanager
def quiet_pydicom() -> Iterator[None]:
    """Within the block pydicom logs and warns of nothing: what cannot be read is raised anyway."""
    logger = logging.getLogger('pydicom')
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        logger.setLevel(logging.CRITICAL + 1)
        try:
            yield
        finally:
            logger.setLevel(level)


def list_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files and dangling links of a folder, by name, without hidden ones and predictions.

    Raises:
        FileFault: it cannot be listed.
    """
    try:
        files = [
            path
            for path in folder.iterdir()
            if not path.name.startswith('.') and (path.is_file() or is_dangling(path))
        ]
    except OSError as error:
        fault = f'cannot be listed ({error.strerror})'
        raise FileFault(folder, fault, 'name the folder of a DICOM series') from error
    return sorted(path for path in files if not written.is_output(path))


def is_dicom(path: pathlib.Path) -> bool:
    """Whether a file begins as DICOM does, with its preamble or, as old archives keep it, without.
    DICOMDIR, which only lists others, does not count."""
    if path.name.upper() == 'DICOMDIR':
        return False
    try:
        with path.open('rb') as file:
            head = file.read(132)
    except OSError:
        return False
    return head[128:] == b'DICM' or _begins_without_preamble(head)


def _begins_without_preamble(head: bytes) -> bool:
    # With a low element of group 2 or 8: of explicit type, or with a length that is no type.
    if len(head) < 132:
        return False
    group, element, length = struct.unpack_from('<HHI', head)
    is_typed = head[4:6] in (b'UL', b'OB', b'UI', b'CS', b'DA', b'TM', b'SH', b'DT')
    return group in (2, 8) and element <= 0x70 and (is_typed or length <= 256)


def looks_like_series(folder: pathlib.Path) -> bool:
    """Whether a folder holds a DICOM file, or links to such whose content is not there.

    Raises:
        FileFault: it cannot be listed.
    """
    files = list_files(folder)
    return any(is_dicom(path) for path in files) or _are_links_to_slices(files)


def _are_links_to_slices(files: Sequence[pathlib.Path]) -> bool:
    dangling = [path for path in files if is_dangling(path)]
    named = [path for path in dangling if path.suffix.lower() in _DICOM_SUFFIXES]
    return bool(named) or (len(dangling) == len(files) > 1)


@quiet_pydicom()
def find_series(folder: pathlib.Path) -> tuple[list[Series], list[FileFault]]:
    """The CT series of a folder, and of what is passed over what it is.

    A file that cannot be read belongs to every series: reading any of them tells of it. A folder
    without DICOM files has none.

    Raises:
        FileFault: the folder cannot be listed.
    """
    files = list_files(folder)
    dicoms = [path for path in files if is_dicom(path)]
    if not dicoms and not _are_links_to_slices(files):
        return [], []
    if dicoms and _are_one_series(dicoms):
        return [Series('', None)], []
    groups: dict[str, list[tuple[pathlib.Path, pydicom.Dataset]]] = {}
    unreadable, others = [path for path in files if path not in set(dicoms)], Counter()
    for path in dicoms:
        try:
            header = read_header(path)
            other = _other_object(header)
            if other is None and 'Rows' not in header:
                raise FileFault(path, 'a slice without Rows', EXPORT_AGAIN)
        except FileFault:
            unreadable.append(path)
            continue
        if other is None and not _is_scout(header):
            groups.setdefault(str(header.get('SeriesInstanceUID', '')), []).append((path, header))
        others[other or 'scout'] += 1
    if not groups:
        if any(is_dicom(path) or is_dangling(path) for path in unreadable):
            return [Series('', None)], []  # and reading it tells of the fault
        fault = f'holds no CT slices but {list_counts(others)}'
        return [], [FileFault(folder, fault, 'it is passed over')]
    return _name_series(folder, groups, unreadable)


def num_frames(header: pydicom.Dataset) -> int:
    """As many as a header says, and 1 where it says nothing that can be used."""
    try:
        return int(header.get('NumberOfFrames', None) or 1)
    except (TypeError, ValueError):
        return 1


def list_counts(counts: Counter) -> str:
    return ', '.join(f'{number} × {name}' for name, number in sorted(counts.items()))


def _are_one_series(dicoms: Sequence[pathlib.Path]) -> bool:
    """Whether all files are CT slices of the same series, none a scout, and no two at the same
    place. Cheap: reading all headers of a large archive would take minutes."""
    places, series = set(), set()
    for path in dicoms:
        try:
            with path.open('rb') as file:
                head = file.read(_HEAD_BYTES)
        except OSError:
            return False
        found = {key: set() for key in (_CLASS, _SERIES, _PLACE, _SCOUT)}
        for match in _HEAD_ELEMENTS.finditer(head.partition(_PIXELS)[0]):
            key, value, place_key, place, scout = match.groups()
            found[key or place_key or scout].add(value or place or b'')
        series.add(frozenset(found[_SERIES]))
        place = frozenset(found[_PLACE])
        is_ct = _CT_CLASSES[0].encode() in found[_CLASS]
        if len(series) > 1 or found[_SCOUT] or not is_ct or not place or place in places:
            return False
        places.add(place)
    return True


def _name_series(
    folder: pathlib.Path,
    groups: dict[str, list[tuple[pathlib.Path, pydicom.Dataset]]],
    unreadable: Sequence[pathlib.Path],
) -> tuple[list[Series], list[FileFault]]:
    strays = []
    longest = max(map(_count_frames, groups.values()))
    for uid, members in list(groups.items()):
        number = _count_frames(members)
        if number <= min(_MOST_SCOUTS, longest // 4):
            fault = f'{number} × image of another series, beside one of {longest}: passed over'
            strays.append(FileFault(members[0][0], fault, 'give it a folder of its own to read it'))
            del groups[uid]
    numbers = [str(members[0][1].get('SeriesNumber', None) or '') for members in groups.values()]
    if '' in numbers or len(set(numbers)) < len(numbers):
        numbers = [str(index + 1) for index in range(len(groups))]
    found = []
    for number, members in zip(numbers, groups.values(), strict=True):
        phases = _split_phases(members)
        for index, phase in enumerate(phases):
            name = f'series{number}' if len(groups) > 1 else ''
            if len(phases) > 1:
                name = f'{name}_phase{index + 1}'.lstrip('_')
            # In the folder's order, with what may be a damaged slice of this series.
            paths = sorted([*(path for path, _ in phase), *unreadable])
            found.append(Series(name, tuple(paths)))
    if len(found) == 1 and not strays:
        return [Series('', None)], []
    return found, strays


def _count_frames(members: Sequence[tuple[pathlib.Path, pydicom.Dataset]]) -> int:
    return sum(num_frames(header) for _, header in members)


def _split_phases(
    members: list[tuple[pathlib.Path, pydicom.Dataset]],
) -> list[list[tuple[pathlib.Path, pydicom.Dataset]]]:
    """Several stacks at the same places, where an element of their headers tells them apart, or
    their numbers, one stack after the other."""
    at_place: dict[str, list[pathlib.Path]] = {}
    for path, header in members:
        at_place.setdefault(str(header.get('ImagePositionPatient', '')), []).append(path)
    most = max(map(len, at_place.values()))
    # In the middle, where there is more than air.
    doubled = [paths for _, paths in sorted(at_place.items()) if len(paths) == most]
    if most == 1 or '' in at_place or _are_copies(doubled[len(doubled) // 2]):
        return [members]
    for key in _PHASE_KEYS:
        values = sorted({str(header.get(key, '')) for _, header in members}, key=_by_number)
        phases = [[m for m in members if str(m[1].get(key, '')) == value] for value in values]
        if 1 < len(phases) <= most and all(map(_is_stack, phases)):
            return phases
    numbered = {str(header.get('InstanceNumber', '')): (path, header) for path, header in members}
    if len(numbered) < len(members):
        return [members]
    in_order = [numbered[number] for number in sorted(numbered, key=_by_number)]
    length = len(members) // most
    phases = [in_order[start : start + length] for start in range(0, len(members), length)]
    return phases if len(phases) == most and all(map(_is_stack, phases)) else [members]


def _is_stack(members: Sequence[tuple[pathlib.Path, pydicom.Dataset]]) -> bool:
    places = {str(header.ImagePositionPatient) for _, header in members}
    return len(places) == len(members) > 1


def _are_copies(paths: Sequence[pathlib.Path]) -> bool:
    """Whether slices at one place hold the same pixels, as stored."""
    try:
        first, *others = (pydicom.dcmread(path, force=True).get('PixelData') for path in paths)
    except Exception:  # whatever pydicom stumbles over; reading the series tells of it
        return False
    return all(other == first for other in others)


def _by_number(text: str) -> tuple[int, str]:
    return len(text), text  # 2 before 10


def find_slices(
    folder: pathlib.Path, files: Sequence[pathlib.Path]
) -> tuple[list[Slice], Counter[str]]:
    """The slices among a series' files, and how many of what else were passed over.

    Raises:
        FileFault: a file cannot be read, or is no slice though it is named as one.
    """
    for path in files:
        absence = find_absence(path)
        if absence is not None:
            raise absence
    readable = [path for path in files if is_dicom(path)]
    suffixes = {path.suffix.lower() for path in readable}
    slices, scouts, others = [], [], Counter()
    for path in files:
        if path not in readable:
            if path.suffix.lower() in suffixes and path.name.upper() != 'DICOMDIR':
                fault = 'not a DICOM file, though it is named as the slices beside it'
                raise FileFault(path, fault, f'{EXPORT_AGAIN}, or remove it')
            continue
        header = read_header(path)
        other = _other_object(header)
        if other is not None:
            others[other] += 1
        elif 'Rows' not in header:
            raise FileFault(path, 'a slice without Rows', EXPORT_AGAIN)
        else:
            (scouts if _is_scout(header) else slices).extend(_frames(path, header))
    if not slices and others and not scouts:
        fault = f'holds no CT slices but {list_counts(others)}'
        raise FileFault(folder, fault, 'name the folder of a whole CT series')
    if scouts:
        others['scout'] = len(scouts)
    return _leave_out_other_planes(slices, others), others


def _leave_out_other_planes(slices: list[Slice], others: Counter[str]) -> list[Slice]:
    """Without a few images that lie across all others: scouts that do not say so."""
    try:
        sides = [np.asarray(each.header.ImageOrientationPatient, np.float64) for each in slices]
        across, down = np.moveaxis(np.reshape(sides, (-1, 2, 3)), 1, 0)
    except (AttributeError, TypeError, ValueError):
        return slices  # to be told by whoever checks the slices
    normals = np.cross(across, down)
    is_alike = np.abs(normals @ np.median(normals, axis=0)) > 0.8 if slices else np.ones(0, bool)
    rest = int((~is_alike).sum())
    if not 0 < rest <= min(_MOST_SCOUTS, len(slices) // 4):
        return slices
    others['image in another plane'] += rest
    return [each for each, alike in zip(slices, is_alike, strict=True) if alike]


def read_header(path: pathlib.Path) -> pydicom.Dataset:
    """The elements of a DICOM file before its pixels, each decoded.

    Raises:
        FileFault: it is damaged.
    """
    try:
        data = pydicom.dcmread(path, stop_before_pixels=True, force=True)
        # pydicom decodes an element at its first use: here, so that the fault is told once.
        for element in data:
            _ = element.value
    except Exception as error:  # pydicom raises whatever its parser stumbles over
        fault = f'not a readable DICOM file ({one_line(error)})'
        raise FileFault(path, fault, EXPORT_AGAIN) from error
    return data


def _other_object(header: pydicom.Dataset) -> str | None:
    """What a DICOM object is that is no CT slice; None of a slice, whole or damaged."""
    uid = str(header.get('SOPClassUID', ''))
    if uid in _CT_CLASSES:
        return None
    has_place = all(
        name in header for name in ('Rows', 'ImagePositionPatient', 'ImageOrientationPatient')
    )
    if has_place and header.get('Modality', 'CT') == 'CT':
        return None  # such as CT that was kept as Secondary Capture
    name = pydicom.uid.UID(uid).name
    if name != uid:
        return name
    # No class of the standard: a maker's own, or a header that damage has run together.
    is_private = pydicom.uid.UID(uid).is_valid and not uid.startswith(_DICOM_ROOT)
    return 'private object' if uid and is_private and not has_place else None


def _is_scout(header: pydicom.Dataset) -> bool:
    kinds = header.get('ImageType', None) or ()
    return 'LOCALIZER' in ([kinds] if isinstance(kinds, str) else list(kinds))


def _frames(path: pathlib.Path, header: pydicom.Dataset) -> list[Slice]:
    """One slice of a classic file; of an enhanced multi-frame one, a slice a frame."""
    frames = header.get('PerFrameFunctionalGroupsSequence', None)
    if not frames:
        if num_frames(header) > 1:
            raise FileFault(path, 'many frames in one DICOM file', CONVERT)
        return [Slice(path, 0, header)]
    shared = header.get('SharedFunctionalGroupsSequence', None) or [pydicom.Dataset()]
    common = pydicom.Dataset()
    common.update({e.tag: e for e in header if e.VR != 'SQ'})
    return [
        Slice(path, index, _merge(common, shared[0], frame)) for index, frame in enumerate(frames)
    ]


def _merge(common: pydicom.Dataset, *groups: pydicom.Dataset) -> pydicom.Dataset:
    """An image's elements, and over them those of the functional groups, as if of one slice."""
    merged = pydicom.Dataset()
    merged.update(common)
    for element in itertools.chain(*groups):
        if element.VR == 'SQ' and element.value:
            merged.update({e.tag: e for e in element.value[0] if e.VR != 'SQ'})
    return merged


def one_line(error: Exception) -> str:
    """What an exception of a library says, in one line of at most 200 characters."""
    return ' '.join(str(error).split())[:200] or type(error).__name__
