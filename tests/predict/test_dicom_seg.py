"""A DICOM Segmentation is the mask, voxel for voxel, on the series' own slices, or is refused."""

import dataclasses
import sys

import highdicom
import numpy as np
import pydicom
import pytest
from pydicom.uid import generate_uid

from covseg_jax import written
from covseg_jax.errors import FileFault, InputError
from covseg_jax.imaging import dicom, nifti
from covseg_jax.imaging.studies import find_inputs
from covseg_jax.predict import dicom_seg
from covseg_jax.predict.studies import Extras, predict_studies
from covseg_jax.stages.inputs import Request
from covseg_jax.stages.on_request import run_predict
from tests.imaging.chest import AFFINE, draw_chest, write_study
from tests.imaging.test_dicom import write_series
from tests.imaging.test_dicom_archives import to_enhanced
from tests.predict.test_studies import MODEL, count_done, read_all

REFERENCES = {
    'StudyInstanceUID': generate_uid(), 'FrameOfReferenceUID': generate_uid(), 'PatientID': '7'
}  # fmt: skip


def refer(index, data, **values):
    for name, value in (REFERENCES | values).items():
        setattr(data, name, value)


def turn(degrees):
    """The affine of a series that is turned about the patient's long axis and then tipped."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turned = AFFINE.copy()
    turned[:3, :3] = [[c, -s, 0], [c * s, c * c, -s], [s * s, s * c, c]] @ AFFINE[:3, :3]
    turned[:3, 3] = 10, 20, 30
    return turned


def tilt():
    affine = AFFINE.copy()
    affine[1, 2] = 2.0  # a gantry: each slice 2 mm further to Anterior
    return affine


def double(folder):
    """Every slice of a folder twice, as two exports of a series into one folder leave it."""
    for path in list(folder.iterdir()):
        data = pydicom.dcmread(path)
        data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        data.save_as(path.with_name(f'copy of {path.name}'))


def twist(folder):
    """Orientations that differ in the last digit, and no two slices as far apart."""
    for number, path in enumerate(folder.iterdir()):
        data = pydicom.dcmread(path)
        data.ImageOrientationPatient = [1, number * 1e-7, 0, 0, 1, 0]
        data.ImagePositionPatient[2] += 0.1 * (number % 2)
        data.save_as(path)


SERIES = {
    'standard': (AFFINE, None),
    'reversed': (AFFINE @ np.diag([-1, 1, -1, 1]), None),
    'transposed': (AFFINE[:, [1, 0, 2, 3]], None),
    'oblique': (turn(20), None),
    'tilted': (tilt(), None),
    'doubled': (AFFINE, double),
    'uneven': (AFFINE, twist),
    'enhanced': (AFFINE, to_enhanced),
    'enhanced and oblique': (turn(20), to_enhanced),
}


def put_frames_by_position(segmentation, volume):
    """(lesion, lungs), as stored: each pixel of each frame at the voxel of the volume where the
    frame's own header has it. Written from PS3.3 C.7.6.2.1.1, without highdicom."""
    found = np.zeros((2, *volume.as_stored.shape), bool)
    shared = segmentation.SharedFunctionalGroupsSequence[0]
    sides = np.reshape(shared.PlaneOrientationSequence[0].ImageOrientationPatient, (2, 3))
    row_mm, column_mm = shared.PixelMeasuresSequence[0].PixelSpacing
    y, x = np.indices((segmentation.Rows, segmentation.Columns))
    frames = zip(
        segmentation.pixel_array, segmentation.PerFrameFunctionalGroupsSequence, strict=True
    )
    for pixels, frame in frames:
        position = np.asarray(frame.PlanePositionSequence[0].ImagePositionPatient, float)
        mm = position + x[..., None] * column_mm * sides[0] + y[..., None] * row_mm * sides[1]
        there = np.linalg.inv(volume.affine) @ np.stack(
            [-mm[..., 0], -mm[..., 1], mm[..., 2], np.ones(x.shape)], axis=-1
        ).reshape(-1, 4).T  # fmt: skip
        voxels = np.rint(there[:3]).astype(int)
        assert np.abs(there[:3] - voxels).max() < 0.02  # as uneven slices are off the even grid
        segment = frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber - 1
        assert not found[segment][tuple(voxels)].any()
        found[segment][tuple(voxels)] = pixels.ravel()
    return found


def draw_masks(shape):
    """(lesion, lungs): noise, with slices of neither, and slices of lungs alone."""
    rng = np.random.default_rng(0)
    lungs = rng.random(shape) < 0.6
    lungs[:, :, 0] = False
    lesion = lungs & (rng.random(shape) < 0.5)
    lesion[:, :, :3] = False
    return lesion, lungs


@pytest.mark.parametrize('kind', SERIES)
def test_segmentation_is_the_mask_on_the_slices_of_its_series(tmp_path, kind):
    affine, change = SERIES[kind]
    image = np.random.default_rng(1).integers(-1000, 400, (20, 13, 8)).astype(np.int16)
    write_series(tmp_path / 's', image, affine, change=refer)
    if change:
        change(tmp_path / 's')
    (study,) = find_inputs(tmp_path / 's')
    volume = dicom.read_series(study.image, study.files)
    masks = draw_masks(volume.as_stored.shape)
    path = tmp_path / 's_seg.dcm'
    dicom_seg.write_dicom_seg(path, study, *masks, 'a model')

    segmentation = pydicom.dcmread(path)
    np.testing.assert_array_equal(put_frames_by_position(segmentation, volume), masks)
    assert segmentation.FrameOfReferenceUID == REFERENCES['FrameOfReferenceUID']
    slices, _ = dicom.order_slices(study.image, study.files)
    read = highdicom.seg.segread(path)
    asked = {
        'segment_numbers': [1, 2], 'assert_missing_frames_are_empty': True,
        'ignore_spatial_locations': False,
    }  # fmt: skip
    if change is to_enhanced:
        frames = read.get_pixels_by_source_frame(
            slices[0].header.SOPInstanceUID, [each.frame + 1 for each in slices], **asked
        )
    else:
        frames = read.get_pixels_by_source_instance(
            [each.header.SOPInstanceUID for each in slices], **asked
        )
    np.testing.assert_array_equal(np.moveaxis(frames, -1, 0).transpose(0, 3, 2, 1), masks)


def test_segmentation_says_what_it_shows_and_what_made_it(tmp_path):
    image = np.zeros((8, 8, 3), np.int16)
    write_series(
        tmp_path / 's', image, AFFINE, change=lambda index, data: refer(index, data, SeriesNumber=4)
    )
    (study,) = find_inputs(tmp_path / 's')
    lungs = np.ones(image.shape, bool)
    dicom_seg.write_dicom_seg(tmp_path / 'seg.dcm', study, ~lungs, lungs, 'a model')
    found = pydicom.dcmread(tmp_path / 'seg.dcm')
    lesion, lung = found.SegmentSequence
    codes = {'49755003': (lesion, '52988006'), '91723000': (lung, '39607008')}
    for category, (segment, kind) in codes.items():
        assert segment.SegmentedPropertyCategoryCodeSequence[0].CodeValue == category
        assert segment.SegmentedPropertyTypeCodeSequence[0].CodeValue == kind
        assert segment.AnatomicRegionSequence[0].CodeValue == '39607008'
        assert segment.SegmentAlgorithmType == 'AUTOMATIC'
        algorithm = segment.SegmentationAlgorithmIdentificationSequence[0]
        assert algorithm.AlgorithmParameters == 'model=a model'
    assert (found.Modality, found.SegmentationType, found.SeriesNumber) == ('SEG', 'BINARY', 1004)
    # No lesion: a segment without frames.
    assert found.NumberOfFrames == 3
    # A copy of it among the slices is none of them.
    (tmp_path / 'seg.dcm').rename(tmp_path / 's' / 'seg.dcm')
    (tmp_path / written.RECORD).unlink()
    assert dicom.order_slices(tmp_path / 's')[1] == [
        'passed over beside the slices: 1 × Segmentation Storage'
    ]


def test_prediction_of_a_series_has_it_and_resume_knows_it(tmp_path):
    image, _ = draw_chest('a')
    write_series(tmp_path / 'scans' / 'a', image, turn(10), change=refer)
    output, wanted = tmp_path / 'masks', Extras(dicom_seg=True)

    def predict():
        (row,), faults = predict_studies(
            find_inputs(tmp_path / 'scans'), MODEL, output, wanted=wanted, resume=True
        )
        assert not faults
        return row

    assert predict()['lesion_ml'] > 0
    path = output / 'a_seg.dcm'
    mask = nifti.read_volume(output / 'a_mask.nii.gz')
    lesion, lungs = put_frames_by_position(pydicom.dcmread(path), mask)
    np.testing.assert_array_equal(lesion, mask.as_stored)
    assert (lesion <= lungs).all()
    predict()
    assert count_done(output)[0] == 1
    # The same in Python.
    MODEL.predict(tmp_path / 'scans').write_dicom_seg(tmp_path / 'own.dcm')
    own = put_frames_by_position(pydicom.dcmread(tmp_path / 'own.dcm'), mask)
    np.testing.assert_array_equal(own, (lesion, lungs))
    path.write_bytes(path.read_bytes()[:-2] + b'xx')  # as somebody's who corrected it
    with pytest.raises(InputError, match=r'a_seg\.dcm: is in the way.* changed since'):
        predict()


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        ({'FrameOfReferenceUID': ''}, 'dcm: has no FrameOfReferenceUID, which a DICOM Seg'),
        ({'StudyInstanceUID': generate_uid()}, 'its slices have 2 different StudyInstanceUIDs'),
    ],
)
def test_series_that_cannot_be_referred_to_is_set_aside_before_the_network(tmp_path, change, words):
    def change_one(index, data):
        refer(index, data, **(change if index == 3 else {}))

    image, _ = draw_chest('a')
    write_series(tmp_path / 'scans' / 'a', image, AFFINE, change=change_one)
    model = dataclasses.replace(MODEL, probabilities=(never_asked,))
    _, faults = predict_studies(
        find_inputs(tmp_path / 'scans'), model, tmp_path / 'masks', wanted=Extras(dicom_seg=True)
    )
    assert len(faults) == 1
    assert words in faults[0]
    assert faults[0].endswith('export the series again, or leave --dicom_seg out')
    assert not list((tmp_path / 'masks').glob('a_*'))


def never_asked(image, lungs):
    raise AssertionError('the network saw the study')


def test_headers_that_the_standard_forbids_are_told_in_one_line_and_leave_nothing(tmp_path):
    image, _ = draw_chest('a')
    write_series(
        tmp_path / 'scans' / 'a', image, AFFINE,
        change=lambda index, data: refer(index, data, PatientSex='X'),
    )  # fmt: skip
    _, (fault,) = predict_studies(
        find_inputs(tmp_path / 'scans'), MODEL, tmp_path / 'masks', wanted=Extras(dicom_seg=True)
    )
    assert fault.startswith("a: its headers cannot be taken into a DICOM Segmentation ('X' is not")
    assert not list((tmp_path / 'masks').glob('a_*'))


def test_several_multi_frame_files_are_refused(tmp_path):
    image = np.zeros((8, 8, 4), np.int16)
    write_series(tmp_path / 's', image, AFFINE, change=refer)
    to_enhanced(tmp_path / 's')
    whole = pydicom.dcmread(tmp_path / 's' / 'enhanced.dcm')
    frames, pixels = list(whole.PerFrameFunctionalGroupsSequence), whole.PixelData
    half = len(pixels) // 2
    for number, (part, code) in enumerate(
        ((frames[:2], pixels[:half]), (frames[2:], pixels[half:]))
    ):
        whole.PerFrameFunctionalGroupsSequence, whole.PixelData = part, code
        whole.NumberOfFrames = 2
        whole.SOPInstanceUID = whole.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        whole.save_as(tmp_path / 's' / f'{number}.dcm')
    (tmp_path / 's' / 'enhanced.dcm').unlink()
    with pytest.raises(FileFault, match='2 multi-frame files, and a DICOM Segmentation refers to'):
        dicom_seg.read_slices(find_inputs(tmp_path / 's')[0])


def test_scan_that_is_no_series_is_named_before_any_work(tmp_path):
    write_study(tmp_path / 'scans', 'b', lesion=False)
    before = read_all(tmp_path)
    request = Request(
        input=tmp_path / 'scans', output=tmp_path / 'masks', model='no such model', dicom_seg=True
    )
    with pytest.raises(InputError, match=r'b\.nii\.gz: --dicom_seg is for DICOM series, and this'):
        run_predict(None, tmp_path, request)
    assert read_all(tmp_path) == before


def test_what_brings_highdicom_is_named_where_it_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, 'highdicom', None)
    with pytest.raises(InputError, match=r"needs highdicom.*pip install '\.\[dicom\]'"):
        dicom_seg.refuse_impossible([])
