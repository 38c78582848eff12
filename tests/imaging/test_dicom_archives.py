"""DICOM as scanners and archives make it: read as the volume that it was cut from, with a note of
what was decided, or refused for the true reason."""

import logging
import shutil

import imagecodecs
import numpy as np
import pydicom
import pytest
from pydicom import uid
from pydicom.encaps import encapsulate

from covseg_jax.errors import FileFault, InputError
from covseg_jax.imaging import dicom, studies
from covseg_jax.imaging.geometry import to_canonical
from tests.imaging.chest import AFFINE, draw_chest
from tests.imaging.test_dicom import write_series

IMAGE = draw_chest('series')[0]
SERIES = uid.generate_uid()


def _canonical(image=IMAGE):
    return to_canonical(image, AFFINE)


def _set(**values):
    """Sets elements in every slice; a function gives its value by the slice's index."""

    def change(index, data):
        for name, value in values.items():
            setattr(data, name, value(index) if callable(value) else value)

    return change


def _compress(syntax, encode):
    def change(index, data):
        pixels = np.frombuffer(data.PixelData, np.uint16).reshape(data.Rows, data.Columns)
        data.file_meta.TransferSyntaxUID = syntax
        data.PixelData = encapsulate([encode(pixels)])
        data['PixelData'].VR = 'OB'

    return change


def to_enhanced(folder):
    """One enhanced multi-frame file in place of a folder's slices, the last slice first."""
    slices = [pydicom.dcmread(path) for path in folder.iterdir()]
    slices.sort(key=lambda data: -data.ImagePositionPatient[2])
    whole = slices[0]
    shared, orientation, measures = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
    orientation.ImageOrientationPatient = whole.ImageOrientationPatient
    measures.PixelSpacing = whole.PixelSpacing
    shared.PlaneOrientationSequence = [orientation]
    shared.PixelMeasuresSequence = [measures]
    frames = []
    for data in slices:
        frame, position, rescaling = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
        position.ImagePositionPatient = data.ImagePositionPatient
        rescaling.RescaleSlope, rescaling.RescaleIntercept = 1, -1024
        frame.PlanePositionSequence = [position]
        frame.PixelValueTransformationSequence = [rescaling]
        frames.append(frame)
    pixels = b''.join(data.PixelData for data in slices)
    for name in ('ImageOrientationPatient', 'ImagePositionPatient', 'PixelSpacing', 'RescaleSlope',
                 'RescaleIntercept'):  # fmt: skip
        delattr(whole, name)
    whole.SOPClassUID = uid.EnhancedCTImageStorage
    whole.file_meta.MediaStorageSOPClassUID = uid.EnhancedCTImageStorage
    whole.NumberOfFrames = len(frames)
    whole.SharedFunctionalGroupsSequence = [shared]
    whole.PerFrameFunctionalGroupsSequence = frames
    whole.PixelData = pixels
    shutil.rmtree(folder)
    folder.mkdir()
    whole.save_as(folder / 'enhanced.dcm', enforce_file_format=True)


def _find(folder):
    strays = []
    return {s.study_id: s for s in studies.find_inputs(folder, 'auto', strays.append)}, strays


CODECS = {
    'lossless JPEG': (uid.JPEGLosslessSV1, lambda a: imagecodecs.ljpeg_encode(a, bitspersample=12)),
    'JPEG-LS': (uid.JPEGLSLossless, imagecodecs.jpegls_encode),
    'high-throughput JPEG 2000': (uid.HTJ2KLossless, imagecodecs.htj2k_encode),
    'JPEG 2000': (
        uid.JPEG2000Lossless,
        lambda a: imagecodecs.jpeg2k_encode(a, level=0, codecformat='j2k', reversible=True),
    ),
}


@pytest.mark.parametrize('codec', CODECS)
def test_compressed_series_is_the_volume(tmp_path, codec):
    write_series(tmp_path / 's', IMAGE, AFFINE, change=_compress(*CODECS[codec]))
    volume = dicom.read_series(tmp_path / 's')
    np.testing.assert_array_equal(volume.array, _canonical())
    assert volume.array.dtype == np.int16


@pytest.mark.parametrize('syntax', [uid.JPEGLosslessSV1, uid.JPEG2000, uid.RLELossless])
def test_stream_that_cannot_be_decoded_is_one_line_and_no_log(tmp_path, caplog, capfd, syntax):
    write_series(tmp_path / 's', IMAGE, AFFINE, change=_compress(syntax, lambda a: b'abcd' * 50))
    with caplog.at_level(logging.DEBUG), pytest.raises(FileFault) as error:
        dicom.read_series(tmp_path / 's')
    assert 'its pixels cannot be read' in str(error.value)
    assert '\n' not in str(error.value)
    assert (caplog.text, *capfd.readouterr()) == ('', '', '')


@pytest.mark.parametrize(('step_mm', 'digits'), [(0.625, 1), (1.25, 1), (2.5, 0)])
def test_rounded_positions_are_taken_with_a_note(tmp_path, step_mm, digits):
    affine = AFFINE.copy()
    affine[2, 2:] = step_mm, 0.0

    def change(index, data):
        data.ImagePositionPatient = [round(float(v), digits) for v in data.ImagePositionPatient]

    write_series(tmp_path / 's', IMAGE, affine, change=change)
    volume = dicom.read_series(tmp_path / 's')
    last_mm = round(27 * step_mm, digits)
    assert volume.spacing_mm[0] == pytest.approx(last_mm / 27)
    assert 'positions that were rounded in the header' in volume.notes[0]


@pytest.mark.parametrize('missing', [1, 13, 26])
def test_missing_slice_is_not_taken_for_rounding(tmp_path, missing):
    affine = AFFINE.copy()
    affine[2, 2:] = 2.0, 0.0  # whole mm, as rounded positions are
    write_series(tmp_path / 's', IMAGE, affine, skip=(missing,))
    with pytest.raises(FileFault, match='1 slices are missing between'):
        dicom.read_series(tmp_path / 's')


def test_enhanced_multi_frame_file_is_the_volume(tmp_path):
    write_series(tmp_path / 's', IMAGE, AFFINE)
    to_enhanced(tmp_path / 's')
    (study,) = studies.find_inputs(tmp_path)
    volume = dicom.read_series(study.image, study.files)
    np.testing.assert_array_equal(volume.array, _canonical())
    np.testing.assert_allclose(volume.spacing_mm, (8, 4, 4))


@pytest.mark.parametrize('is_implicit', [True, False])
def test_files_without_preamble_are_read(tmp_path, is_implicit):
    write_series(tmp_path / 's', IMAGE, AFFINE)
    for path in (tmp_path / 's').iterdir():
        data = pydicom.dcmread(path)
        del data.file_meta
        data.preamble = None
        data.save_as(path, implicit_vr=is_implicit, little_endian=True)
        assert path.read_bytes()[128:132] != b'DICM'
    (study,) = studies.find_inputs(tmp_path)
    np.testing.assert_array_equal(dicom.read_series(study.image).array, _canonical())


def test_what_lies_beside_the_slices_is_passed_over_and_noted(tmp_path):
    folder = tmp_path / 's'
    write_series(folder, IMAGE, AFFINE, change=_set(SeriesInstanceUID=SERIES))

    def write_other(name, change, count=1):
        write_series(tmp_path / 'other', IMAGE[:, :, :count], AFFINE, change=change)
        for number, path in enumerate((tmp_path / 'other').iterdir()):
            path.rename(folder / f'{name}{number}.dcm')

    def make_private(index, data):
        data.SOPClassUID = '1.3.46.670589.5.0.11'
        for name in ('Rows', 'ImagePositionPatient', 'PixelData'):
            delattr(data, name)

    def make_capture(index, data):
        data.SOPClassUID = uid.SecondaryCaptureImageStorage
        del data.ImagePositionPatient

    across = {'ImageOrientationPatient': [1, 0, 0, 0, 0, -1], 'SeriesInstanceUID': SERIES}
    write_other('private', make_private)
    write_other('capture', make_capture)
    write_other('scout', _set(**across, ImageType=['ORIGINAL', 'PRIMARY', 'LOCALIZER']))
    write_other('unnamed_scout', _set(**across), count=2)
    found, strays = _find(tmp_path)
    assert (list(found), strays) == (['s'], [])
    volume = dicom.read_series(folder, found['s'].files)
    np.testing.assert_array_equal(volume.array, _canonical())
    assert volume.notes == (
        'passed over beside the slices: 1 × Secondary Capture Image Storage, 2 × image in another '
        'plane, 1 × private object, 1 × scout',
    )


def test_slices_that_are_there_twice_are_read_once(tmp_path):
    write_series(tmp_path / 's', IMAGE, AFFINE, change=_set(SeriesInstanceUID=SERIES))
    for path in list((tmp_path / 's').iterdir()):
        data = pydicom.dcmread(path)
        data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = uid.generate_uid()
        data.AcquisitionNumber = 2  # and yet no second phase
        data.save_as(path.with_name(f'copy of {path.name}'))
    (study,) = studies.find_inputs(tmp_path)
    volume = dicom.read_series(study.image, study.files)
    np.testing.assert_array_equal(volume.array, _canonical())
    assert '28 slices are there twice, with the same pixels' in volume.notes[0]


def test_frames_of_two_phases_in_one_file_are_refused(tmp_path):
    for image in (IMAGE, np.maximum(IMAGE, -900)):
        write_series(tmp_path / 's', image, AFFINE)
        for path in list((tmp_path / 's').iterdir()):
            path.rename(path.with_name(f'{image.min()}_{path.name}'))
    to_enhanced(tmp_path / 's')
    with pytest.raises(
        FileFault, match=r'^enhanced\.dcm: frame \d+ lies where .*; convert it with'
    ):
        dicom.read_series(tmp_path / 's')


@pytest.mark.parametrize(
    ('elements', 'names'),
    [
        (({'SeriesNumber': 3}, {'SeriesNumber': 7}), ['s_series3', 's_series7']),
        (({}, {}), ['s_series1', 's_series2']),
        (
            (
                {'SeriesInstanceUID': SERIES, 'AcquisitionNumber': 1},
                {'SeriesInstanceUID': SERIES, 'AcquisitionNumber': 2},
            ),
            ['s_phase1', 's_phase2'],
        ),
        (
            (
                {'SeriesInstanceUID': SERIES, 'InstanceNumber': lambda index: index + 1},
                {'SeriesInstanceUID': SERIES, 'InstanceNumber': lambda index: index + 29},
            ),
            ['s_phase1', 's_phase2'],
        ),
    ],
    ids=['two series', 'without numbers', 'two acquisitions', 'one after the other'],
)
def test_series_and_phases_of_one_folder_are_studies(tmp_path, elements, names):
    images = [IMAGE, np.maximum(IMAGE, -900)]
    for number, (image, values) in enumerate(zip(images, elements, strict=True)):
        write_series(tmp_path / str(number), image, AFFINE, change=_set(**values))
        (tmp_path / 's').mkdir(exist_ok=True)
        for path in (tmp_path / str(number)).iterdir():
            path.rename(tmp_path / 's' / f'{number}_{path.name}')
    found, strays = _find(tmp_path / 's')
    assert (list(found), strays) == (names, [])
    read = [dicom.read_series(study.image, study.files) for study in found.values()]
    arrays = {volume.array.tobytes() for volume in read}
    assert arrays == {np.ascontiguousarray(_canonical(image)).tobytes() for image in images}
    for volume, study in zip(read, found.values(), strict=True):
        assert (
            f'several series or phases in its folder; its first file is {min(study.files).name}'
            in (volume.notes[0])
        )
        assert volume.crc32 == dicom.series_crc32(study.image, study.files)


def test_phases_that_nothing_tells_apart_are_refused(tmp_path):
    for image in (IMAGE, np.maximum(IMAGE, -900)):
        write_series(tmp_path / 'part', image, AFFINE, change=_set(SeriesInstanceUID=SERIES))
        (tmp_path / 's').mkdir(exist_ok=True)
        for path in (tmp_path / 'part').iterdir():
            path.rename(tmp_path / 's' / f'{image.min()}{path.name}')
    (study,) = studies.find_inputs(tmp_path / 's')
    with pytest.raises(FileFault, match=r'lies where .* with other pixels \(two phases'):
        dicom.read_series(study.image, study.files)


def test_tree_of_any_depth_and_links_are_studies(tmp_path):
    root = tmp_path / 'root'
    write_series(root / 'p1' / 'day 1' / 'thin', IMAGE, AFFINE)
    write_series(root / 'p1' / 'day 1' / 'thick', np.maximum(IMAGE, -900), AFFINE)
    write_series(tmp_path / 'store' / 'a8f7', np.maximum(IMAGE, -950), AFFINE)
    write_series(root / 'mr', IMAGE, AFFINE, change=_set(SOPClassUID=uid.MRImageStorage,
                                                         Modality='MR'))  # fmt: skip
    (root / 'p2').symlink_to(tmp_path / 'store' / 'a8f7')
    (root / 'p2' / 'up').symlink_to(root)  # a circle
    (root / 'p3').symlink_to('/no/such/archive')
    for name in ('p1_day 1_thin_mask.nii.gz', 'p1/day 1/thick_mask.nii', 'p1/day 1/thik_mask.nii'):
        (root / name).touch()
    found, strays = _find(root)
    assert list(found) == ['p1_day 1_thick', 'p1_day 1_thin', 'p2', 'p3']
    assert [study.lesion_mask for study in found.values()] == [
        root / 'p1/day 1/thick_mask.nii', root / 'p1_day 1_thin_mask.nii.gz', None, None
    ]  # fmt: skip
    assert str(strays[0]) == 'mr: holds no CT slices but 28 × MR Image Storage; it is passed over'
    assert str(strays[1]).startswith("thik_mask.nii: a mask without its scan: no study 'thik' is")
    assert len(strays) == 2
    thin = found['p1_day 1_thin']
    np.testing.assert_array_equal(dicom.read_series(thin.image).array, _canonical())
    with pytest.raises(
        FileFault, match=r'^p3: a link to /no/such/archive, which is not there; fet'
    ):
        studies.formats.read_volume(found['p3'].image)
    with pytest.raises(InputError, match='no studies; mr: holds no CT slices but 28'):
        studies.find_inputs(root / 'mr')


@pytest.mark.parametrize('count', [1, 28])
def test_slices_whose_content_is_absent_are_named(tmp_path, count):
    write_series(tmp_path / 's', IMAGE, AFFINE)
    for path in sorted((tmp_path / 's').iterdir())[:count]:
        path.unlink()
        path.symlink_to(f'../.git/annex/objects/{path.name}')
    (study,) = studies.find_inputs(tmp_path)
    with pytest.raises(FileFault, match=r'dcm: a link to \.\./\.git/annex/.* not there; fetch'):
        dicom.read_series(study.image, study.files)


def test_tilted_gantry_is_noted(tmp_path):
    affine = AFFINE.copy()
    affine[1, 2] = 2.0  # each slice 2 mm further to Anterior: 14 degrees
    write_series(tmp_path / 's', IMAGE, affine)
    volume = dicom.read_series(tmp_path / 's')
    assert volume.notes == (
        'its axes are not at right angles (gantry tilt); distances follow the grid',
    )
    write_series(tmp_path / 'straight', IMAGE, AFFINE)
    assert dicom.read_series(tmp_path / 'straight').notes == ()
