"""Compressed frames are decoded to the numbers that were stored, or refused."""

import imagecodecs
import numpy as np
import pytest
from pydicom import uid

from covseg_jax.imaging import codecs

SHAPE = (37, 29)
Y, X = np.mgrid[: SHAPE[0], : SHAPE[1]]
NOISE = np.random.default_rng(0).integers(-90, 90, SHAPE)
FRAME = (1500 + 1200 * np.sin(X / 5) * np.cos(Y / 7) + NOISE).astype(np.uint16)  # 12 bits

# Where there is one, by another library than decodes it.
ENCODERS = {
    uid.JPEGLosslessSV1: lambda a: imagecodecs.jpeg8_encode(
        a, lossless=True, predictor=1, bitspersample=12
    ),
    uid.JPEGLossless: lambda a: imagecodecs.jpeg8_encode(
        a, lossless=True, predictor=4, bitspersample=12
    ),
    uid.JPEGLSLossless: imagecodecs.jpegls_encode,
    uid.HTJ2KLossless: imagecodecs.htj2k_encode,
}


@pytest.mark.parametrize('syntax', ENCODERS)
def test_frame_is_decoded_to_what_was_encoded(syntax):
    code = ENCODERS[syntax](FRAME)
    np.testing.assert_array_equal(codecs.decode_frame(code, syntax, SHAPE, 12, False), FRAME)


@pytest.mark.parametrize('syntax', [uid.JPEGLosslessSV1, uid.JPEGLSLossless])
def test_sign_of_a_codec_without_signs_is_the_uppermost_stored_bit(syntax):
    frame = FRAME.astype(np.int16) - 2000  # as 12 bits of two's complement
    code = ENCODERS[syntax](frame.view(np.uint16) & 0xFFF)
    found = codecs.decode_frame(code, syntax, SHAPE, 12, True)
    assert frame.min() < 0 < frame.max()
    np.testing.assert_array_equal(found, frame)


def test_lossy_jpeg_of_twelve_bits_is_decoded():
    code = imagecodecs.jpeg8_encode(FRAME, level=99, bitspersample=12)
    found = codecs.decode_frame(code, uid.JPEGExtended12Bit, SHAPE, 12, False)
    assert np.abs(found.astype(int) - FRAME).max() < 20


@pytest.mark.parametrize('syntax', ENCODERS)
def test_stream_that_is_cut_or_of_another_shape_is_refused(syntax):
    code = ENCODERS[syntax](FRAME)
    for kept in (0, 1, 30, len(code) // 2, len(code) - 3):
        # Of a JPEG-LS stream without end the decoder itself would never come back.
        with pytest.raises((ValueError, RuntimeError)):
            codecs.decode_frame(code[:kept], syntax, SHAPE, 12, False)
    with pytest.raises(ValueError, match=r'has \(37, 29\) rows and columns, not \(37, 30\)'):
        codecs.decode_frame(code, syntax, (37, 30), 12, False)


def test_lossless_jpeg_with_a_restart_interval_is_decoded():
    code = ENCODERS[uid.JPEGLosslessSV1](FRAME)
    code = code[:2] + b'\xff\xdd\x00\x04\x00\x00' + code[2:]  # an interval of 0: no restarts
    found = codecs.decode_frame(code, uid.JPEGLosslessSV1, SHAPE, 12, False)
    np.testing.assert_array_equal(found, FRAME)
