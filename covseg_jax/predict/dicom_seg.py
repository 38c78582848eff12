"""A DICOM series' lesions and lungs as a DICOM Segmentation object (PS3.3 A.51), which viewers and
archives lay over the series itself.

Its frames lie on the series' own slices, pixel for pixel: nothing is resampled. Each frame names
the slice that it belongs to.
"""

import importlib.util
import pathlib
from collections.abc import Sequence

import numpy as np
import pydicom
from pydicom import uid

import covseg_jax
from covseg_jax import written
from covseg_jax.errors import FileFault, InputError
from covseg_jax.imaging import formats
from covseg_jax.imaging.dicom import order_slices
from covseg_jax.imaging.dicom_files import (
    EXPORT_AGAIN,
    Slice,
    one_line,
    quiet_pydicom,
    read_header,
)
from covseg_jax.imaging.study import Study

SEGMENTS = ('Lesion', 'Lung')  # segment 1 and 2, by their labels
_NAME = 'covseg_jax'
_DESCRIPTION = 'Lesions and lungs; research only, not a medical device'  # at most 64 characters
_LEAVE_OUT = 'leave --dicom_seg out'
# What the object takes over from the series: these must be there, ...
_NEEDED = (
    'StudyInstanceUID', 'SeriesInstanceUID', 'FrameOfReferenceUID', 'SOPClassUID', 'SOPInstanceUID',
)  # fmt: skip
# ... and these may be empty (type 2 in PS3.3 C.7), where highdicom wants them to be there.
_MAY_BE_EMPTY = (
    'PatientID', 'PatientName', 'PatientBirthDate', 'PatientSex', 'StudyID', 'StudyDate',
    'StudyTime', 'AccessionNumber',
)  # fmt: skip
_ENHANCED = (uid.EnhancedCTImageStorage, uid.LegacyConvertedEnhancedCTImageStorage)
_SERIES_NUMBERS_FROM = 1000  # the series' own number and this
_LARGEST_SERIES_NUMBER = 2**31 - 1  # of value representation IS


def refuse_impossible(studies: Sequence[Study]) -> None:
    """To be called before any work.

    Raises:
        InputError: highdicom is not installed, or a study is no DICOM series; names the first.
    """
    if importlib.util.find_spec('highdicom') is None:
        raise InputError(
            "--dicom_seg needs highdicom, which is not installed; pip install '.[dicom]' in the "
            f'checkout, or {_LEAVE_OUT}'
        )
    for study in studies:
        is_file = formats.is_nifti(study.image) and not study.image.is_dir()
        if study.index is not None or is_file:
            raise InputError(
                f'{study.image}: --dicom_seg is for DICOM series, and this is none; {_LEAVE_OUT}, '
                'or name a folder of DICOM series'
            )


@quiet_pydicom()
def read_slices(study: Study) -> list[Slice]:
    """A series' slices in the order of its volume, with what a Segmentation object takes from them.

    Raises:
        FileFault: the series cannot be read, or such an object cannot refer to it.
    """
    slices, _ = order_slices(study.image, study.files)
    for each in slices:
        missing = [name for name in _NEEDED if not each.header.get(name)]
        if missing:
            fault = f'has no {" and no ".join(missing)}, which a DICOM Segmentation refers to'
            raise FileFault(each.path, fault, f'{EXPORT_AGAIN}, or {_LEAVE_OUT}')
    for name in ('StudyInstanceUID', 'FrameOfReferenceUID'):
        number = len({each.header[name].value for each in slices})
        if number > 1:
            fault = f'its slices have {number} different {name}s, a DICOM Segmentation has one'
            raise FileFault(study.image, fault, f'{EXPORT_AGAIN}, or {_LEAVE_OUT}')
    number = len({each.header.SOPInstanceUID for each in slices})
    if _is_enhanced(slices) and number > 1:
        fault = f'{number} multi-frame files, and a DICOM Segmentation refers to one'
        raise FileFault(study.image, fault, _LEAVE_OUT)
    if not _is_enhanced(slices) and number < len(slices):
        fault = (
            'some of its slices share a SOPInstanceUID, by which a DICOM Segmentation names them'
        )
        raise FileFault(study.image, fault, f'{EXPORT_AGAIN}, or {_LEAVE_OUT}')
    return slices


def write_dicom_seg(
    path: pathlib.Path, study: Study, mask: np.ndarray, lungs: np.ndarray, model_identity: str
) -> None:
    """Writes the object atomically, as a new series of the series' own study.

    Args:
        path: the file.
        study: a DICOM series.
        mask: bool (X, Y, Z), voxel for voxel as `read_series` gives the series.
        lungs: the same.
        model_identity: at most 64 characters that tell one model from another.

    Raises:
        FileFault: such an object cannot refer to the series, or highdicom refuses what its headers
            say.
        InputError: something that this program did not write lies at `path`.
    """
    slices = read_slices(study)
    frames = np.stack([mask.T, lungs.T], axis=-1)  # (slices, rows, columns, segments)
    # pydicom warns of values that it takes from the series as they are.
    with quiet_pydicom(), written.new_file(path) as temporary:
        try:
            segmentation = _make_segmentation(slices, frames, model_identity)
        except Exception as error:  # of highdicom and pydicom, each with its own
            fault = f'its headers cannot be taken into a DICOM Segmentation ({one_line(error)})'
            raise FileFault(study.image, fault, f'{EXPORT_AGAIN}, or {_LEAVE_OUT}') from error
        segmentation.save_as(temporary, enforce_file_format=True)


def _is_enhanced(slices: Sequence[Slice]) -> bool:
    """Whether frames of a file are slices."""
    return slices[0].header.SOPClassUID in _ENHANCED


def _make_segmentation(
    slices: Sequence[Slice], frames: np.ndarray, model_identity: str
) -> pydicom.Dataset:
    import highdicom as hd  # here: it takes a second

    first = slices[0].header
    sources, positions = _describe_sources(slices), None
    if len(sources) < len(slices):  # the frames of one file, in whatever order
        positions = [
            hd.PlanePositionSequence(
                hd.CoordinateSystemNames.PATIENT, each.header.ImagePositionPatient
            )
            for each in slices
        ]
    number = int(first.get('SeriesNumber', None) or 0) + _SERIES_NUMBERS_FROM
    return hd.seg.Segmentation(
        source_images=sources,
        pixel_array=frames,
        plane_positions=positions,
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=_describe_segments(model_identity),
        series_instance_uid=hd.UID(),
        series_number=min(max(1, number), _LARGEST_SERIES_NUMBER),
        series_description=f'{_NAME}: lesions and lungs',
        sop_instance_uid=hd.UID(),
        instance_number=1,
        manufacturer=_NAME,
        manufacturer_model_name=_NAME,
        software_versions=covseg_jax.__version__,
        device_serial_number=model_identity,
        content_label='LESIONS_LUNGS',
        content_description=_DESCRIPTION,
        content_creator_name=f'{_NAME}^',  # a family name alone, as PS3.5 6.2.1 writes it
    )


def _describe_sources(slices: Sequence[Slice]) -> list[pydicom.Dataset]:
    """What highdicom reads the series from: a header a slice, or that of the one file.

    They say, exactly alike, what was verified to be alike, and how far the slices are apart.
    """
    is_enhanced = _is_enhanced(slices)
    sources = [read_header(slices[0].path)] if is_enhanced else [each.header for each in slices]
    first = slices[0].header
    for name in _MAY_BE_EMPTY:
        if name not in sources[0]:
            setattr(sources[0], name, None)
    spacing_mm = pydicom.valuerep.DS(_normal_spacing_mm(slices), auto_format=True)
    if not first.get('SliceThickness'):  # highdicom does not read what has none
        first.SliceThickness = spacing_mm
    if not is_enhanced:
        for each in sources:
            each.ImageOrientationPatient = first.ImageOrientationPatient
        first.SpacingBetweenSlices = spacing_mm
        return sources
    shared, orientation, measures = (pydicom.Dataset() for _ in range(3))
    orientation.ImageOrientationPatient = first.ImageOrientationPatient
    measures.PixelSpacing, measures.SpacingBetweenSlices = first.PixelSpacing, spacing_mm
    measures.SliceThickness = first.SliceThickness
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = [orientation], [measures]
    sources[0].SharedFunctionalGroupsSequence = [shared]
    return sources


def _normal_spacing_mm(slices: Sequence[Slice]) -> float:
    """Between slices, at right angles to them: of the outer ones, as `read_series` has it."""
    ends = [slices[place].header for place in (0, -1)]
    across, down = np.reshape(np.asarray(ends[0].ImageOrientationPatient, np.float64), (2, 3))
    begin, end = (np.asarray(each.ImagePositionPatient, np.float64) for each in ends)
    return float((end - begin) @ np.cross(across, down)) / (len(slices) - 1)


def _describe_segments(model_identity: str) -> list[pydicom.Dataset]:
    """The segments, in the order of `SEGMENTS`.

    Their codes are SNOMED CT's in DICOM's context groups (PS3.16): categories of CID 7150, 'Lesion'
    of CID 7159 (Lesion Segmentation Type) in the anatomic region 'Lung', and 'Lung' of CID 7155
    (Chest Segmentation Type). 'Lesion', for the masks do not tell ground glass from consolidation.
    """
    import highdicom as hd
    from pydicom.sr.codedict import codes

    algorithm = hd.AlgorithmIdentificationSequence(
        name=_NAME,
        family=codes.cid7162.ArtificialIntelligence,
        version=covseg_jax.__version__,
        parameters={'model': model_identity},
    )
    lesion, lung = (
        hd.seg.SegmentDescription(
            segment_number=number,
            segment_label=SEGMENTS[number - 1],
            segmented_property_category=category,
            segmented_property_type=kind,
            algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
            anatomic_regions=[codes.cid7155.Lung],
            display_color=hd.color.CIELabColor.from_string(colour),
        )
        for number, category, kind, colour in (
            (1, codes.cid7150.MorphologicallyAbnormalStructure, codes.cid7159.Lesion, 'red'),
            (2, codes.cid7150.AnatomicalStructure, codes.cid7155.Lung, 'cyan'),
        )
    )
    return [lesion, lung]
