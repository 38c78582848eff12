"""A DICOM series is the volume that it was cut from, or its fault is named."""

import numpy as np
import pydicom
import pytest
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from covseg_jax.errors import FileFault
from covseg_jax.imaging import dicom, nifti, studies
from covseg_jax.prepare import prepare_studies
from tests.imaging.chest import AFFINE, draw_chest, write_stored
from tests.settings import prepare_settings

TO_LPS = np.diag([-1.0, -1.0, 1.0])


def write_series(folder, image, affine, *, change=lambda index, data: None, skip=()):
    """Slices of `image` (X, Y, Z), in HU, under names that say nothing of their order."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    series = generate_uid()
    across, down = (TO_LPS @ affine[:3, axis] for axis in (0, 1))
    spacing = np.linalg.norm(affine[:3, :2], axis=0)
    for index in range(image.shape[2]):
        if index in skip:
            continue
        data = pydicom.Dataset()
        data.file_meta = pydicom.dataset.FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = CTImageStorage
        data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = generate_uid()
        data.SeriesInstanceUID, data.Modality = series, 'CT'
        data.Rows, data.Columns = image.shape[1], image.shape[0]
        data.PixelSpacing = [float(spacing[1]), float(spacing[0])]
        data.ImageOrientationPatient = [*(across / spacing[0]), *(down / spacing[1])]
        data.ImagePositionPatient = list(TO_LPS @ (affine @ [0, 0, index, 1])[:3])
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, 'MONOCHROME2'
        data.BitsAllocated, data.BitsStored, data.HighBit = 16, 12, 11
        data.PixelRepresentation = 0
        data.RescaleSlope, data.RescaleIntercept = 1, -1024
        data.PixelData = (image[:, :, index].T + 1024).astype(np.uint16).tobytes()
        change(index, data)
        name = f'{rng.integers(10**9)}.dcm'
        data.save_as(folder / name, enforce_file_format=True)


@pytest.fixture
def image():
    return draw_chest('series')[0]


@pytest.mark.parametrize(
    'affine',
    [AFFINE, AFFINE @ np.diag([-1, 1, -1, 1]), AFFINE[:, [1, 0, 2, 3]]],
    ids=['LAS', 'RAI', 'transposed'],
)
def test_series_is_the_volume_it_was_cut_from(tmp_path, image, affine):
    write_series(tmp_path / 's', image, affine)
    (tmp_path / 's' / 'notes.txt').write_text('not a slice')
    write_stored(tmp_path / 'same.nii.gz', image, affine)
    series, same = dicom.read_series(tmp_path / 's'), nifti.read_volume(tmp_path / 'same.nii.gz')
    assert series.as_stored.dtype == np.int16
    np.testing.assert_array_equal(
        series.array,
        same.array,
    )
    corner = np.linalg.inv(series.affine) @ same.affine  # voxel indices of one in the other
    np.testing.assert_allclose(np.abs(corner[:3, :3]).sum(axis=0), 1, atol=1e-5)
    assert series.crc32 == dicom.series_crc32(tmp_path / 's')


def test_folders_of_series_are_studies_and_can_be_prepared(tmp_path, image):
    write_series(tmp_path / 'data' / 'p1', image, AFFINE)
    write_series(tmp_path / 'data' / 'p2', np.maximum(image, -990), AFFINE)
    found = studies.find_studies(tmp_path / 'data')
    assert [study.study_id for study in found] == ['p1', 'p2']
    assert [study.study_id for study in studies.find_inputs(tmp_path / 'data' / 'p1')] == ['p1']
    case = prepare_studies.prepare_volume(found[0], prepare_settings(grid=(16, 32, 32)))
    assert case.lung_ml > 1000


def _set(**values):
    def change(index, data):
        if index == 9:
            for name, value in values.items():
                setattr(data, name, value)

    return change


def _delete(name):
    return lambda index, data: delattr(data, name) if index == 9 else None


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        ({'skip': (7, 8)}, r'^s: 2 slices are missing between .* \(a gap of 24\.0 mm, 8\.0 mm'),
        ({'skip': range(1, 28)}, r'^s: holds 1 DICOM slices; name the folder of a whole'),
        ({'change': _set(SeriesInstanceUID='1.2.3')}, '^s: holds 2 series; give each a folder'),
        ({'change': _set(ImagePositionPatient=[160, 128, 64])}, r'dcm: lies where .*; remove one'),
        ({'change': _set(PixelSpacing=[4.0, 5.0])}, r'dcm: PixelSpacing is not that of'),
        ({'change': _set(Modality='MR')}, 'modality MR, not CT; give a CT series'),
        ({'change': _set(PixelData=b'1234')}, r'dcm: its pixels cannot be read .*; convert'),
        ({'change': _set(NumberOfFrames=3)}, 'many frames in one DICOM file; convert'),
        ({'change': _delete('RescaleIntercept')}, 'has no RescaleIntercept; export the series'),
        ({'change': _delete('PixelData')}, r'its pixels cannot be read'),
        ({'change': _set(PixelSpacing=[0.0, 4.0])}, r'pixel spacing .*; export the series'),
        ({'change': _set(PixelSpacing=[4.0])}, r'no usable value|is no number'),
        ({'change': _set(BitsStored=[12, 12])}, r'no usable value .*; export the series'),
        ({'change': _set(ImagePositionPatient=[-130, -128, 72])}, r'beside the line of the slices'),
        ({'change': _delete('Rows')}, r'a slice without Rows; export the series'),
    ],
)
def test_fault_of_a_series_is_named(tmp_path, image, options, words):
    affine = AFFINE.copy()
    affine[:3, 3] = -160, -128, 0
    write_series(tmp_path / 's', image, affine, **options)
    with pytest.raises(FileFault, match=words):
        dicom.read_series(tmp_path / 's')


def test_slice_cut_short_is_refused(tmp_path, image):
    # The last slice, whose absence leaves no gap.
    write_series(tmp_path / 's', image, AFFINE)
    path = max((tmp_path / 's').iterdir(), key=lambda p: pydicom.dcmread(p).ImagePositionPatient[2])
    content = path.read_bytes()
    for kept in range(0, len(content), 97):
        path.write_bytes(content[:kept])
        with pytest.raises(FileFault, match=r'; '):
            dicom.read_series(tmp_path / 's')
