"""Every fault of a study is found, and its message names the file, the fault and the remedy."""

import re
import struct

import nibabel
import numpy as np
import pytest

from covseg_jax.errors import InputError
from covseg_jax.imaging import nifti, studies
from covseg_jax.prepare import prepare_studies, study_files, verify
from tests.imaging.chest import AFFINE, draw_chest, write_stored, write_study
from tests.settings import prepare_settings

SETTINGS = prepare_settings(grid=(16, 32, 32))
IMAGE, MASK = 'a.nii.gz', 'a_mask.nii.gz'


def _edit(change):
    def spoil(folder):
        content = bytearray((folder / IMAGE).read_bytes())
        change(content)
        (folder / IMAGE).write_bytes(content)

    return spoil


def _flip_crc(content):
    content[-6] ^= 1


def _flip_middle(content):
    content[len(content) // 2] ^= 16


def _cut(content):
    del content[-40:]


def _clear(content):
    content.clear()


def _header(offset, code, *values):
    """Writes values into the uncompressed header of the image."""

    def spoil(folder):
        image, _ = draw_chest('a')
        write_stored(folder / 'a.nii', image, AFFINE)
        content = bytearray((folder / 'a.nii').read_bytes())
        struct.pack_into('<' + code, content, offset, *values)
        (folder / 'a.nii').unlink()
        (folder / IMAGE).write_bytes(nifti.igzip.compress(bytes(content)))

    return spoil


def _image(change):
    def spoil(folder):
        image, _ = draw_chest('a')
        write_stored(folder / IMAGE, change(image.astype(np.float32)), AFFINE)

    return spoil


def _mask(change, affine=AFFINE):
    def spoil(folder):
        _, opacity = draw_chest('a')
        write_stored(folder / MASK, change(opacity.astype(np.uint8)), affine)

    return spoil


def _without_lungs(image):
    image[10:-10, 10:-10] = 40
    return image


def _with_nan(image):
    image[3, 4, 5] = np.nan
    return image


def _doubled(folder):
    image, _ = draw_chest('a')
    header = nibabel.Nifti1Header()
    header['descrip'] = b'a copy with another header'
    nibabel.Nifti1Image(image, AFFINE, header).to_filename(folder / 'b.nii.gz')


AGAIN = 'download it again'
# name: (what spoils the study, file, fault, what to do)
FAULTS = {
    'flipped bit in the trailer': (_edit(_flip_crc), IMAGE, 'gzip CRC does not match', AGAIN),
    'flipped bit': (_edit(_flip_middle), IMAGE, 'gzip', AGAIN),
    'cut short': (_edit(_cut), IMAGE, 'cut short', AGAIN),
    'empty': (_edit(_clear), IMAGE, 'the file is empty', AGAIN),
    'text': (lambda f: (f / IMAGE).write_text('no scan'), IMAGE, 'not gzip data', 'rename'),
    'shape lie': (_header(42, 'h', 900), IMAGE, 'header promises 900 × 64 × 28', AGAIN),
    'two axes': (_header(40, '8h', 2, 80, 64, 1, 1, 1, 1, 1), IMAGE, '2D image', 'one 3D volume'),
    'voxel size 0': (_header(80, 'f', 0.0), IMAGE, 'is not positive', 'correct pixdim'),
    'voxel size below 0': (_header(84, 'f', -4.0), IMAGE, 'is not positive', 'correct pixdim'),
    'metres': (
        _header(280, '12f', -0.004, 0, 0, 0, 0, 0.004, 0, 0, 0, 0, 0.008, 0),
        IMAGE,
        'voxels of 0.004 × 0.004 × 0.008 mm cannot be CT',
        'it is in mm',
    ),
    'no orientation': (_header(252, '2h', 0, 0), IMAGE, 'no orientation', 'from DICOM again'),
    'flat affine': (
        _header(280, '4f', 0, 0, 0, 0),
        IMAGE,
        'cannot be inverted',
        'correct the sform',
    ),
    'complex': (_header(70, '2h', 32, 64), IMAGE, 'complex64 are not CT', 'save int16'),
    'NaN': (_image(_with_nan), IMAGE, 'not finite', 'replace them'),
    '0 to 255': (
        _image(lambda v: np.clip((v + 1000) / 1400, 0, 1) * 255),
        IMAGE,
        'a windowed image, not HU',
        'original CT in HU',
    ),
    '0 to 1': (
        _image(lambda v: np.clip((v + 1000) / 1400, 0, 1)),
        IMAGE,
        'a normalised image, not HU',
        'original CT in HU',
    ),
    'no offset': (_image(lambda v: v + 1024), IMAGE, 'offset of -1024', 'original CT in HU'),
    'constant': (_image(lambda v: v * 0 + 7), IMAGE, 'every voxel is 7', 'original CT in HU'),
    'no lungs': (_image(_without_lungs), IMAGE, 'no lungs found', 'give a chest CT'),
    'mask of another shape': (
        _mask(lambda m: m[:, :, 1:]),
        MASK,
        r'shape \(80, 64, 27\), but its image has \(80, 64, 28\)',
        'the mask of this image',
    ),
    'mask elsewhere': (
        _mask(lambda m: m, AFFINE + 0.01 * np.eye(4)),
        MASK,
        # 0.01 mm a voxel over 79 × 63 × 27 of them: 0.79, 0.63 and 0.27 mm along the axes
        r'its affine is not that of its image: voxels lie up to 1\.05 mm from where',
        'on the image grid',
    ),
    'mask of 0 and 255': (
        _mask(lambda m: m * 255),
        MASK,
        'labels 0, 255; only 0 and 1',
        r'--config\.prepare\.lesion_labels="\(255,\)"',
    ),
    'mask between labels': (
        _mask(lambda m: m * np.float32(0.75)),
        MASK,
        r'labels 0, 0\.75; only 0 and 1 are',
        'give a mask of whole numbers',
    ),
    'mask that is not quite whole': (
        _mask(lambda m: m * np.float32(1.002)),
        MASK,
        r'labels 0, 1\.00199997; only 0 and 1 are',
        'give a mask of whole numbers',
    ),
    'mask in place of a scan': (
        _image(lambda v: (v > -900) * np.float32(1.0000001)),
        IMAGE,
        r'only the values 0, 1: a mask and no scan; .* named after its scan',
        'original CT in HU',
    ),
    'damaged mask': (
        lambda f: (f / MASK).write_bytes((f / MASK).read_bytes()[:-3]),
        MASK,
        'cut short',
        AGAIN,
    ),
    'the same voxels twice': (_doubled, 'b.nii.gz', 'the same image as study a', 'remove one'),
}


@pytest.mark.parametrize('name', FAULTS)
def test_fault_is_named_with_its_file_and_remedy(tmp_path, name):
    spoil, file, fault, remedy = FAULTS[name]
    write_study(tmp_path, 'a')
    spoil(tmp_path)
    found = studies.find_studies(tmp_path)
    bad = [
        finding
        for finding in verify.verify_studies(found, SETTINGS, num_workers=0)
        if finding.status == verify.UNUSABLE
    ]
    assert len(bad) == 1
    assert bad[0].file == str(tmp_path / file)
    assert re.search(fault, bad[0].fault)
    assert re.search(remedy, bad[0].what_to_do)
    if name == 'the same voxels twice':  # the files differ, and the split refuses what is left
        return
    with pytest.raises(InputError) as error:
        prepare_studies.prepare_volume(found[0], SETTINGS)
    message = str(error.value)
    assert message == f'{file}: {bad[0].fault}; {bad[0].what_to_do}'
    assert '\n' not in message


def test_all_faults_of_a_study_are_told_and_a_good_one_is_ok(tmp_path):
    write_study(tmp_path, 'a')
    write_study(tmp_path, 'good')
    (tmp_path / IMAGE).write_bytes(b'')
    (tmp_path / MASK).write_bytes(b'')
    findings = verify.verify_studies(studies.find_studies(tmp_path), SETTINGS, num_workers=2)
    assert [(f.study, f.status) for f in findings] == [
        ('a', verify.UNUSABLE),
        ('a', verify.UNUSABLE),
        ('good', verify.OK),
    ]
    assert {findings[0].file, findings[1].file} == {str(tmp_path / IMAGE), str(tmp_path / MASK)}


def test_volumes_of_both_lungs_and_doubts_are_told(tmp_path):
    write_study(tmp_path, 'a', lesion=False)
    image, _ = draw_chest('b')
    write_stored(tmp_path / 'b.nii.gz', image[:, :, 8:], AFFINE)  # begins in the lungs
    whole, cut = verify.verify_studies(studies.find_studies(tmp_path), SETTINGS, num_workers=0)
    # Ellipsoids of 4/3 π · 50 · 75 · 95 mm³
    assert whole.status == verify.OK
    assert whole.right_lung_ml == pytest.approx(1492, rel=0.03)
    assert whole.left_lung_ml == pytest.approx(1492, rel=0.03)
    assert cut.status == verify.NOTE
    assert cut.fault.startswith('the lungs reach the lowest slice; ')
    assert cut.right_lung_ml < whole.right_lung_ml


@pytest.mark.parametrize(
    ('offset', 'values', 'note'),
    [
        (268, (77.0,), r'sform and qform are up to [\d.]+ mm apart; the sform is used'),
        (256, (2.0,), r'its qform is no rotation; the sform is used'),
        (80, (2.0,), r'pixdim says 2 × 4 × 8 mm a voxel, the affine 4 × 4 × 8 mm'),
    ],
)
def test_what_is_settled_by_rule_is_noted(tmp_path, offset, values, note):
    write_study(tmp_path, 'a')
    _header(offset, f'{len(values)}f', *values)(tmp_path)
    findings = verify.verify_studies(studies.find_studies(tmp_path), SETTINGS, num_workers=0)
    assert {finding.status for finding in findings} == {verify.NOTE}
    assert any(re.search(note, finding.fault) for finding in findings)
    assert nifti.read_volume(tmp_path / IMAGE).affine == pytest.approx(AFFINE)


def test_stated_labels_are_lesion(tmp_path):
    write_study(tmp_path, 'a')
    wanted = prepare_studies.prepare_volume(studies.find_studies(tmp_path)[0], SETTINGS).lesion
    _mask(lambda m: m * 255)(tmp_path)
    settings = prepare_settings(grid=(16, 32, 32), lesion_labels=(255,))
    case = prepare_studies.prepare_volume(studies.find_studies(tmp_path)[0], settings)
    np.testing.assert_array_equal(case.lesion, wanted)


@pytest.mark.parametrize(
    'change',
    [
        lambda m: m * np.float32(0.99999),
        lambda m: m * np.float32(1.0000001),
        lambda m: m + np.float32(1e-7),
    ],
)
def test_labels_that_are_whole_but_for_rounding_are_taken(tmp_path, change):
    write_study(tmp_path, 'a')
    (study,) = studies.find_studies(tmp_path)
    image = study_files.read_image(study)
    wanted = study_files.read_mask(study, 'lesion_mask', image, labels=(1,))
    _mask(change)(tmp_path)
    for labels in ((1,), None):
        found = study_files.read_mask(study, 'lesion_mask', image, labels)
        np.testing.assert_array_equal(found, wanted)
    assert wanted.any()


def test_origin_a_hundredth_of_a_voxel_off_is_taken_and_more_refused_in_mm(tmp_path):
    write_study(tmp_path, 'a')
    (study,) = studies.find_studies(tmp_path)
    image = study_files.read_image(study)
    for shift_mm, is_taken in ((0.039, True), (0.041, False)):  # voxels are 4 mm wide
        affine = AFFINE.copy()
        affine[0, 3] += shift_mm
        _mask(lambda m: m, affine)(tmp_path)
        if is_taken:
            assert study_files.read_mask(study, 'lesion_mask', image, (1,)).any()
        else:
            with pytest.raises(InputError, match=r'voxels lie up to 0\.041 mm from where'):
                study_files.read_mask(study, 'lesion_mask', image, (1,))


def test_published_arrays_are_studies(tmp_path):
    write_study(tmp_path, 'a')
    case = prepare_studies.prepare_volume(studies.find_studies(tmp_path)[0], SETTINGS)
    folder = tmp_path / 'arrays'
    folder.mkdir()
    images = np.stack([case.image, case.image[::-1]]).astype(np.float32)
    images[1, 0, 0, 0] = 1.4  # the published resampling overshoots its window
    np.save(folder / 'LungImages.npy', images)
    np.save(folder / 'LungMask.npy', np.stack([case.lungs, case.lungs[::-1]]))
    np.save(folder / 'InfectionMasks.npy', np.stack([case.lesion, 0 * case.lesion]))
    first, second = studies.find_studies(folder)
    assert (first.study_id, second.study_id) == ('case_0000', 'case_0001')
    assert second.lesion_mask is None
    settings = prepare_settings(grid=(16, 32, 32), margin_mm=0.0)
    again = prepare_studies.prepare_volume(first, settings)
    assert again.lesion.sum() > 0
    inside = (again.lungs == 1) & (again.lesion == 0)
    assert np.median(again.image[inside]) == pytest.approx(150 / 1400, abs=2e-3)
    findings = verify.verify_studies((first, second), settings, num_workers=0)
    assert {finding.status for finding in findings} == {verify.NOTE}
    assert 'no geometry' in findings[0].fault
    content = bytearray((folder / 'LungImages.npy').read_bytes())
    content[content.index(b'(2, 16') + 1] = ord('1')  # the header now says one study of two
    (folder / 'LungImages.npy').write_bytes(content)
    with pytest.raises(InputError, match=r'^LungImages\.npy: header and length .* disagree'):
        studies.find_studies(folder)
    np.save(folder / 'LungImages.npy', images)
    np.save(folder / 'LungMask.npy', np.zeros((3, 16, 32, 32), np.uint8))
    with pytest.raises(InputError, match=r'^LungMask\.npy: shape \(3, .*give the arrays of one'):
        studies.find_studies(folder)


def test_known_windowed_data_set_is_mapped_to_hu(tmp_path):
    image, opacity = draw_chest('radiopaedia_1')
    for folder in ('COVID-19-CT-Seg_20cases', 'Infection_Mask', 'Lung_Mask'):
        (tmp_path / folder).mkdir()
    windowed = np.rint((np.clip(image, -1250.0, 250.0) + 1250) / 1500 * 255).astype(np.uint8)
    name = 'radiopaedia_1.nii.gz'
    write_stored(tmp_path / 'COVID-19-CT-Seg_20cases' / name, windowed, AFFINE)
    write_stored(tmp_path / 'Infection_Mask' / name, opacity, AFFINE)
    write_stored(tmp_path / 'Lung_Mask' / name, (image < -300).astype(np.uint8) * 2, AFFINE)
    (study,) = studies.find_studies(tmp_path)
    case = prepare_studies.prepare_volume(study, SETTINGS)
    inside = (case.lungs == 1) & (case.lesion == 0)
    # 1500 HU in 255 steps: to 3 HU of -850
    assert np.median(case.image[inside]) * 1400 - 1000 == pytest.approx(-850, abs=5)
    (finding, *_) = verify.verify_studies((study,), SETTINGS, num_workers=0)
    assert finding.fault == 'windowed: 0 to 255 stand for -1250 to 250 HU'
