"""Whatever is done to a file, it is read right or refused by name, soon and in little memory."""

import time
import tracemalloc

import nibabel
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from isal import igzip

from covseg_jax.errors import FileFault
from covseg_jax.imaging import nifti
from tests.imaging.chest import write_stored

AFFINE = np.array([[-0.7, 0, 0, 90], [0, 0.7, 0, -120], [0, 0, 8, 33], [0, 0, 0, 1.0]])
DATA = np.random.default_rng(0).integers(-1024, 1500, (23, 19, 11)).astype(np.int16)
SECONDS = 2.0
OVERHEAD = 2**21  # bytes that reading takes whatever the file's size: gzip's buffers


def _read(path, honest_bytes):
    """The volume, or None where the file is refused in the way that people are meant to read."""
    tracemalloc.start()
    began = time.perf_counter()
    try:
        return nifti.read_volume(path)
    except FileFault as error:
        message = str(error)
        assert message.startswith(f'{path.name}: '), message
        assert '; ' in message, message
        assert '\n' not in message, message
        return None
    finally:
        assert time.perf_counter() - began < SECONDS
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak <= 2 * honest_bytes + OVERHEAD


def _spoil_and_read(tmp_path, content, truth, rng, count, honest_bytes):
    """Bit flips, truncations and overwritten runs of a .nii.gz: refused, or read as before."""
    path = tmp_path / 'a.nii.gz'
    refused = 0
    for number in range(count):
        spoilt = bytearray(content)
        kind = number % 3
        place = int(rng.integers(len(spoilt)))
        if kind == 0:
            spoilt[place] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            del spoilt[place:]
        else:
            run = spoilt[place : place + 16]
            spoilt[place : place + 16] = rng.bytes(len(run))
        path.write_bytes(spoilt)
        volume = _read(path, honest_bytes)
        if volume is None:
            refused += 1
        else:
            # A few bits of gzip's own header say nothing of the content.
            np.testing.assert_array_equal(volume.as_stored, truth.as_stored)
            np.testing.assert_array_equal(volume.affine, truth.affine)
    return refused


def test_spoilt_gzip_is_refused_or_read_right(tmp_path):
    write_stored(tmp_path / 'good.nii.gz', DATA, AFFINE)
    content = (tmp_path / 'good.nii.gz').read_bytes()
    truth = nifti.read_volume(tmp_path / 'good.nii.gz')
    rng = np.random.default_rng(1)
    refused = _spoil_and_read(tmp_path, content, truth, rng, 1500, DATA.nbytes)
    assert 1450 < refused <= 1500


def test_spoilt_real_scan_is_refused_or_read_right(tmp_path, shared_data):
    real = shared_data / 'chest_ct_64' / 'image.nii.gz'
    truth = nifti.read_volume(real)
    rng = np.random.default_rng(2)
    refused = _spoil_and_read(tmp_path, real.read_bytes(), truth, rng, 300, truth.as_stored.nbytes)
    assert refused >= 295


HEADER_LIES = st.lists(st.tuples(st.integers(0, 351), st.integers(0, 255)), min_size=1, max_size=4)
# The fields that decide what is read: type, shape, offset, scaling, orientation.
TOLD_LIES = st.lists(
    st.tuples(
        st.sampled_from([*range(40, 56), *range(70, 92), *range(108, 120), *range(252, 328)]),
        st.sampled_from([0, 1, 2, 4, 8, 16, 64, 127, 128, 191, 192, 255]),
    ),
    min_size=1,
    max_size=4,
)


@pytest.fixture(scope='module')
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp('fuzz') / 'good.nii'
    write_stored(path, DATA, AFFINE)
    return path


def _check_lies(good, lies, suffix):
    spoilt = bytearray(good.read_bytes())
    for offset, value in lies:
        spoilt[offset] = value
    path = good.with_name(f'lie{suffix}')
    path.write_bytes(igzip.compress(bytes(spoilt)) if suffix == '.nii.gz' else spoilt)
    volume = _read(path, DATA.nbytes)
    if volume is None:
        return
    # What is believed must be what the header now says, as nibabel understands it.
    with np.errstate(all='ignore'):
        try:
            image = nibabel.load(path)
        except (nibabel.spatialimages.HeaderDataError, ValueError) as error:
            # nibabel refuses these; here a missing intercept is 0, and a qform that is no rotation
            # gives way to the sform.
            if 'invalid intercept' in str(error) or 'w2 should be' in str(error):
                return
            raise
        expected = np.asarray(image.dataobj, np.float64).reshape(volume.as_stored.shape)
        np.testing.assert_allclose(volume.as_stored, expected, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(volume.affine, image.affine, rtol=1e-6, atol=1e-6)


@given(lies=HEADER_LIES)
@settings(max_examples=400, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
def test_changed_header_is_refused_or_believed_as_a_whole(good, lies):
    _check_lies(good, lies, '.nii.gz')
    _check_lies(good, lies, '.nii')


@given(lies=TOLD_LIES)
@settings(max_examples=400, deadline=None, derandomize=True)
def test_lying_header_is_refused_or_believed_as_a_whole(good, lies):
    _check_lies(good, lies, '.nii.gz')


@pytest.mark.parametrize('huge', [True, False])
def test_small_file_cannot_make_large_arrays(tmp_path, huge):
    # 64 MB of zeros in 64 kB, under a header that promises all of it and more, or a little.
    write_stored(tmp_path / 'a.nii', DATA, AFFINE)
    header = bytearray((tmp_path / 'a.nii').read_bytes()[:352])
    shape = (30000, 30000, 30000) if huge else (2, 2, 2)
    header[42:48] = np.array(shape, '<i2').tobytes()
    path = tmp_path / 'bomb.nii.gz'
    path.write_bytes(igzip.compress(bytes(header) + bytes(64 * 2**20)))
    assert _read(path, 2**20) is None


def test_gzip_of_several_members_is_read(tmp_path):
    write_stored(tmp_path / 'a.nii', DATA, AFFINE)
    content = (tmp_path / 'a.nii').read_bytes()
    parts = [content[:5000], content[5000:5001], content[5001:]]
    (tmp_path / 'a.nii.gz').write_bytes(b''.join(igzip.compress(part) for part in parts))
    np.testing.assert_array_equal(nifti.read_volume(tmp_path / 'a.nii.gz').as_stored, DATA)
