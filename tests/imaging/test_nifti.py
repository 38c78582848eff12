"""Reading verifies everything; writing and reading are inverses."""

import gzip
import re
import struct

import nibabel
import numpy as np
import pytest

from covseg_jax.errors import InputError
from covseg_jax.imaging import nifti
from tests.imaging.chest import write_stored

AFFINE = np.array([[-0.7, 0, 0, 90], [0, 0.7, 0, -120], [0, 0, 8, 33], [0, 0, 0, 1.0]])
DATA = np.random.default_rng(0).integers(-1024, 1500, (13, 11, 7)).astype(np.int16)


@pytest.fixture
def content(tmp_path):
    """The uncompressed bytes of a good file."""
    write_stored(tmp_path / 'good.nii', DATA, AFFINE)
    return bytearray((tmp_path / 'good.nii').read_bytes())


def _put(content, offset, code, *values):
    struct.pack_into('<' + code, content, offset, *values)


@pytest.mark.parametrize('suffix', ['.nii', '.nii.gz'])
@pytest.mark.parametrize('dtype', [np.uint8, np.int16, np.float32])
def test_write_then_read_gives_the_same_volume(tmp_path, dtype, suffix):
    data = DATA.astype(dtype)
    write_stored(tmp_path / f'a{suffix}', data, AFFINE)
    volume = nifti.read_volume(tmp_path / f'a{suffix}')
    assert volume.as_stored.dtype == dtype
    np.testing.assert_array_equal(volume.as_stored, data)
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-6)
    np.testing.assert_allclose(volume.spacing_mm, (8.0, 0.7, 0.7), rtol=1e-6)
    # 0.7 mm · 0.7 mm · 8 mm = 3.92 mm³
    assert volume.voxel_ml == pytest.approx(0.00392, rel=1e-6)
    assert volume.crc32 == nifti.source_crc32(tmp_path / f'a{suffix}')


def test_written_file_says_to_nibabel_what_mosmed_says(tmp_path):
    write_stored(tmp_path / 'a.nii.gz', DATA, AFFINE)
    raw = gzip.decompress((tmp_path / 'a.nii.gz').read_bytes())
    assert np.isnan(struct.unpack_from('<2f', raw, 112)).all()  # scl_slope, scl_inter
    image = nibabel.load(tmp_path / 'a.nii.gz')
    assert (image.header['sform_code'], image.header['qform_code']) == (1, 1)
    assert image.header.get_xyzt_units()[0] == 'mm'
    np.testing.assert_allclose(image.get_qform(), AFFINE, atol=1e-4)
    np.testing.assert_array_equal(np.asarray(image.dataobj), DATA)


@pytest.mark.parametrize(('tilt_degrees', 'qform_code'), [(0.0, 1), (5.0, 0), (25.0, 0)])
def test_a_tilted_grid_is_written_as_an_sform_alone(tmp_path, tilt_degrees, qform_code):
    """A qform is a rotation: what would be left of the tilt lies 6 mm and more away."""
    affine = np.diag([0.7, 0.7, 2.5, 1.0])
    affine[1, 2] = 2.5 * np.tan(np.radians(tilt_degrees))
    nifti.write_volume(tmp_path / 'a.nii', np.zeros((60, 8, 8), np.uint8), affine)
    header = nibabel.load(tmp_path / 'a.nii').header
    assert (int(header['sform_code']), int(header['qform_code'])) == (1, qform_code)
    volume = nifti.read_volume(tmp_path / 'a.nii')
    np.testing.assert_allclose(volume.affine, affine, atol=1e-5)
    assert not any('qform' in note for note in volume.notes)


def test_written_file_is_the_same_each_time(tmp_path):
    for name in ('a.nii.gz', 'b.nii.gz'):
        write_stored(tmp_path / name, DATA, AFFINE)
    assert (tmp_path / 'a.nii.gz').read_bytes() == (tmp_path / 'b.nii.gz').read_bytes()


def test_big_endian_file_reads_as_its_little_endian_twin(tmp_path):
    header = nibabel.Nifti1Header(endianness='>')
    header.set_data_dtype('>i2')
    nibabel.Nifti1Image(DATA.astype('>i2'), AFFINE, header).to_filename(tmp_path / 'big.nii.gz')
    assert gzip.decompress((tmp_path / 'big.nii.gz').read_bytes())[:4] == b'\x00\x00\x01\x5c'
    volume = nifti.read_volume(tmp_path / 'big.nii.gz')
    assert volume.as_stored.dtype == np.dtype(np.int16)
    np.testing.assert_array_equal(volume.as_stored, DATA)


@pytest.mark.parametrize(
    ('slope', 'inter', 'dtype', 'expected'),
    [
        (np.nan, np.nan, np.int16, DATA),
        (0.0, 7.0, np.int16, DATA),  # slope 0: the intercept does not count either
        (1.0, 0.0, np.int16, DATA),
        (2.0, np.nan, np.float32, DATA * 2.0),
        (0.5, -100.0, np.float32, DATA * 0.5 - 100.0),
    ],
)
def test_scaling_is_applied_only_where_the_header_has_one(
    tmp_path, content, slope, inter, dtype, expected
):
    _put(content, 112, '2f', slope, inter)
    (tmp_path / 'a.nii').write_bytes(content)
    volume = nifti.read_volume(tmp_path / 'a.nii')
    assert volume.as_stored.dtype == dtype
    np.testing.assert_array_equal(volume.as_stored, expected)


def test_fourth_axis_of_length_one_is_dropped(tmp_path):
    nibabel.Nifti1Image(DATA[..., None], AFFINE).to_filename(tmp_path / 'a.nii.gz')
    assert nifti.read_volume(tmp_path / 'a.nii.gz').as_stored.shape == DATA.shape


def test_sform_is_preferred_and_qform_taken_without_it(tmp_path, content):
    _put(content, 280, '4f', -0.7, 0, 0, 5)  # srow_x: another origin than the qform's 90
    (tmp_path / 'a.nii').write_bytes(content)
    assert nifti.read_volume(tmp_path / 'a.nii').affine[0, 3] == pytest.approx(5)
    _put(content, 254, 'h', 0)  # sform_code
    (tmp_path / 'a.nii').write_bytes(content)
    assert nifti.read_volume(tmp_path / 'a.nii').affine[0, 3] == pytest.approx(90)


HALF_TURN = np.diag([-0.7, -0.7, 8.0, 1.0])  # about z: quatern_d is 1


@pytest.mark.parametrize(
    ('edits', 'affine', 'note'),
    [
        # sqrt(1 + 1.2e-6), as float32 rounds it: w² is a hair below 0
        ([(264, 'f', 1.0000006)], HALF_TURN, 'quaternion has the length 1.000001, which is taken'),
        ([(264, 'f', 1.004)], HALF_TURN, 'quaternion has the length 1.004, which is taken for 1'),
        ([(76, 'f', 2.0), (264, 'f', 1.0)], HALF_TURN, r'qfac \(pixdim\[0\]\) is 2, .*; 1 is used'),
        ([(76, 'f', -3.0), (264, 'f', 1.0)], HALF_TURN @ np.diag([1, 1, -1, 1]), '; -1 is used'),
        ([(76, 'f', np.nan), (264, 'f', 1.0)], HALF_TURN, r'is nan, not 1 or -1; 1 is used'),
        ([(76, 'f', 0.0), (264, 'f', 1.0)], HALF_TURN, None),  # as the standard has it
        ([(254, 'h', 2), (264, 'f', 1.0)], HALF_TURN, 'its sform is all zeros; the qform is used'),
    ],
)
def test_qform_is_read_as_itk_reads_it_with_a_note(tmp_path, content, edits, affine, note):
    # ITK 5.4 gives these affines: a first part of 0 and the rest divided by its length, qfac's
    # sign, and a qform where the sform is no affine.
    _put(content, 252, '2h', 1, 0)
    _put(content, 76, 'f', 1.0)
    _put(content, 256, '6f', 0, 0, 0, 0, 0, 0)
    _put(content, 280, '12f', *[0] * 12)
    for edit in edits:
        _put(content, *edit)
    (tmp_path / 'a.nii').write_bytes(content)
    volume = nifti.read_volume(tmp_path / 'a.nii')
    np.testing.assert_allclose(volume.affine, affine, atol=1e-6)
    assert len(volume.notes) == (note is not None)
    assert all(re.search(note, found) for found in volume.notes)


def test_quaternion_that_is_no_rotation_stays_refused(tmp_path, content):
    _put(content, 252, '2h', 1, 0)
    _put(content, 256, '3f', 0, 0, 1.1)
    (tmp_path / 'a.nii').write_bytes(content)
    with pytest.raises(InputError, match=r'^a\.nii: qform is no rotation; correct it'):
        nifti.read_volume(tmp_path / 'a.nii')


@pytest.mark.parametrize('name', ['a.nii.gz', 'a.nii'])
def test_content_that_was_not_fetched_is_named(tmp_path, name):
    (tmp_path / name).symlink_to('../.git/annex/objects/MD5-1')
    with pytest.raises(
        InputError, match=r'a link to \.\./\.git/annex.*, which is not there; fetch'
    ):
        nifti.read_volume(tmp_path / name)
    (tmp_path / name).unlink()
    (tmp_path / name).write_text('version https://git-lfs.github.com/spec/v1\noid sha256:0\n')
    with pytest.raises(InputError, match='a pointer of Git LFS, not the file itself; fetch the'):
        nifti.read_volume(tmp_path / name)


HEADER_FAULTS = {
    # name: (offset in the NIfTI-1 header, struct code, values, words of the message)
    '2D': (40, '8h', (2, 13, 11, 1, 1, 1, 1, 1), r'2D image \(13 × 11\)'),
    'one slice': (40, '8h', (3, 13, 77, 1, 1, 1, 1, 1), r'2D image'),
    '4D': (40, '8h', (4, 13, 11, 1, 7, 1, 1, 1), r'4D image \(13 × 11 × 1 × 7\)'),
    'too large': (40, '8h', (3, 30000, 30000, 30000, 1, 1, 1, 1), 'header promises 30000 × 30000'),
    'too small': (40, '8h', (3, 13, 11, 6, 1, 1, 1, 1), 'header promises 13 × 11 × 6'),
    'no shape': (40, '8h', (3, 13, -11, 7, 1, 1, 1, 1), 'gives the shape'),
    'offset': (108, 'f', (1e9,), 'header promises'),
    'type': (70, 'h', (32,), 'voxels of type complex64 are not CT'),
    'unknown type': (70, 'h', (77,), 'unknown voxel type 77'),
    'voxel size': (84, 'f', (0.0,), 'is not positive'),
    'voxel size NaN': (80, 'f', (np.nan,), 'is not positive'),
    'flat affine': (280, '4f', (0, 0, 0, 0), 'cannot be inverted'),
    'affine NaN': (280, '4f', (np.nan, 0, 0, 0), 'cannot be inverted'),
    'no orientation': (252, '2h', (0, 0), 'no orientation'),
    'not NIfTI': (0, 'i', (1234,), 'not a NIfTI file'),
    'no magic': (344, '4s', (b'abcd',), 'not a NIfTI file'),
    'header only': (344, '4s', (b'ni1\0',), 'header without voxels'),
}


@pytest.mark.parametrize('fault', HEADER_FAULTS)
def test_header_that_lies_is_refused_with_the_reason(tmp_path, content, fault):
    offset, code, values, words = HEADER_FAULTS[fault]
    _put(content, offset, code, *values)
    (tmp_path / 'bad.nii').write_bytes(content)
    with pytest.raises(InputError, match=rf'^bad\.nii: .*{words}.*; ') as caught:
        nifti.read_volume(tmp_path / 'bad.nii')
    assert '\n' not in str(caught.value)


def test_flipped_bit_anywhere_in_the_gzip_data_is_refused(tmp_path):
    write_stored(tmp_path / 'a.nii.gz', DATA, AFFINE)
    good = (tmp_path / 'a.nii.gz').read_bytes()
    for position in np.linspace(20, len(good) - 1, 40).astype(int):
        damaged = bytearray(good)
        damaged[position] ^= 0x10
        (tmp_path / 'a.nii.gz').write_bytes(damaged)
        with pytest.raises(InputError, match=r'^a\.nii\.gz: .*download it again$'):
            nifti.read_volume(tmp_path / 'a.nii.gz')


def test_wrong_crc_is_called_by_its_name(tmp_path):
    write_stored(tmp_path / 'a.nii.gz', DATA, AFFINE)
    damaged = bytearray((tmp_path / 'a.nii.gz').read_bytes())
    damaged[-6] ^= 1  # in the trailer's CRC
    (tmp_path / 'a.nii.gz').write_bytes(damaged)
    with pytest.raises(InputError, match='gzip CRC does not match'):
        nifti.read_volume(tmp_path / 'a.nii.gz')


@pytest.mark.parametrize('kept', [0, 1, 5, 100, 400, -9, -1])
@pytest.mark.parametrize('name', ['a.nii', 'a.nii.gz'])
def test_file_cut_short_is_refused(tmp_path, name, kept):
    write_stored(tmp_path / name, DATA, AFFINE)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:kept])
    with pytest.raises(InputError, match=r'^a\.nii(\.gz)?: .*; '):
        nifti.read_volume(tmp_path / name)


def test_voxels_that_are_not_finite_are_refused(tmp_path):
    data = DATA.astype(np.float32)
    data[3, 4, 5] = np.nan
    write_stored(tmp_path / 'a.nii.gz', data, AFFINE)
    with pytest.raises(InputError, match=r'not finite'):
        nifti.read_volume(tmp_path / 'a.nii.gz')


def test_missing_file_folder_and_plain_text_are_refused(tmp_path):
    (tmp_path / 'text.nii').write_text('no NIfTI at all')
    (tmp_path / 'text.nii.gz').write_text('no NIfTI at all')
    for name, words in {
        'absent.nii.gz': 'no such file',
        '.': 'is a folder',
        'text.nii': 'not a NIfTI file',
        'text.nii.gz': 'not gzip data',
    }.items():
        with pytest.raises(InputError, match=words):
            nifti.read_volume(tmp_path / name)


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write_stored(tmp_path / 'a.nii.gz', DATA, AFFINE)
    before = (tmp_path / 'a.nii.gz').read_bytes()

    def fail(*_):
        raise OSError('disk full')

    monkeypatch.setattr('covseg_jax.atomic._sync', fail)
    with pytest.raises(OSError, match='disk full'):
        write_stored(tmp_path / 'a.nii.gz', DATA + 1, AFFINE)
    assert [path.name for path in tmp_path.iterdir()] == ['a.nii.gz']
    assert (tmp_path / 'a.nii.gz').read_bytes() == before
