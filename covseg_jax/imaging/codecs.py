"""Compressed frames of DICOM pixels -> the numbers that were stored.

Lossless and 12-bit JPEG, JPEG-LS and high-throughput JPEG 2000, by imagecodecs. Of the decoders of
these that pydicom knows, GDCM ends the whole process at some damaged streams, pylibjpeg-libjpeg is
under the GPL, and pyjpegls never returns from a stream that was cut. All else, such as JPEG 2000,
pydicom itself reads, with Pillow.
"""

import struct
from collections.abc import Callable

import imagecodecs
import numpy as np
from pydicom import uid

_END = b'\xff\xd9'  # of JPEG and JPEG-LS streams
_START_OF_SCAN, _RESTART_INTERVAL = 0xDA, 0xDD
# Markers of a frame's header: SOF0 to SOF15 without DHT, JPG and DAC, and JPEG-LS's SOF55.
_FRAME_HEADERS = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}
_SIZ = b'\xff\x4f\xff\x51'  # how a JPEG 2000 codestream begins


def decode_frame(
    code: bytes, syntax: str, shape: tuple[int, int], bits_stored: int, is_signed: bool
) -> np.ndarray:
    """One frame of an image with one sample a pixel.

    Args:
        code: the compressed stream of the frame.
        syntax: its DICOM transfer syntax, one of DECODERS.
        shape: (rows, columns) that it must have.
        bits_stored: of a pixel.
        is_signed: whether the pixels are two's complement numbers of so many bits.

    Returns:
        (rows, columns), an integer type of 8 or 16 bits, signed if `is_signed`.

    Raises:
        ValueError, RuntimeError: the stream is damaged, cut short, or of another shape or kind.
    """
    # A header that damage has changed may promise arrays that fill the memory.
    found = _find_shape(code)
    if found != shape:
        raise ValueError(f'the compressed image has {found} rows and columns, not {shape}')
    pixels = DECODERS[syntax](code)
    if pixels.shape != shape or pixels.dtype.kind not in 'iu' or pixels.dtype.itemsize > 2:
        raise ValueError(f'decoded to {pixels.dtype} of shape {pixels.shape}')
    width = 8 * pixels.dtype.itemsize
    if not is_signed:
        return pixels.view(f'u{pixels.dtype.itemsize}')
    # JPEG and JPEG-LS know no signs: they return the stored bits, and the uppermost is the sign.
    spare = max(0, width - bits_stored)
    return (pixels.view(f'i{pixels.dtype.itemsize}') << spare) >> spare


def _decode_jpeg(code: bytes) -> np.ndarray:
    _check_end(code)
    return imagecodecs.jpeg8_decode(code)


def _decode_lossless_jpeg(code: bytes) -> np.ndarray:
    _check_end(code)
    # Of the two decoders this one notices most damage, but it knows no restart intervals.
    if _RESTART_INTERVAL in dict(_segments(code)):
        return imagecodecs.jpeg8_decode(code)
    return imagecodecs.ljpeg_decode(code)


def _decode_jpeg_ls(code: bytes) -> np.ndarray:
    _check_end(code)  # without its end the decoder would never return
    return imagecodecs.jpegls_decode(code)


def _check_end(code: bytes) -> None:
    if not code.rstrip(b'\0').endswith(_END):
        raise ValueError('the compressed stream is cut short')


def _find_shape(code: bytes) -> tuple[int, int]:
    """(rows, columns) by the stream's own header; of one component alone."""
    at = code.find(_SIZ, 0, 256)  # some writers put the boxes of a .jp2 file before it
    if at >= 0 and len(code) >= at + 42:
        right, lower, left, upper = struct.unpack_from('>4I', code, at + 8)
        rows, columns, components = lower - upper, right - left, code[at + 41]
    else:
        for marker, content in _segments(code):
            if marker in _FRAME_HEADERS and len(content) >= 6:
                _, rows, columns, components = struct.unpack_from('>BHHB', content)
                break
        else:
            raise ValueError('the compressed stream has no header of a frame')
    if components != 1:
        raise ValueError(f'the compressed image has {components} components, not one')
    return rows, columns


def _segments(code: bytes) -> list[tuple[int, bytes]]:
    """Markers and contents of a JPEG stream's segments before its first scan."""
    found, at = [], 2
    if code[:2] != b'\xff\xd8':
        raise ValueError('the compressed stream does not begin as JPEG')
    while at + 4 <= len(code) and code[at] == 0xFF:
        marker, length = code[at + 1], int.from_bytes(code[at + 2 : at + 4], 'big')
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        if marker == _START_OF_SCAN or length < 2:
            break
        found.append((marker, code[at + 4 : at + 2 + length]))
        at += 2 + length
    return found


DECODERS: dict[str, Callable[[bytes], np.ndarray]] = {  # by transfer syntax
    uid.JPEGExtended12Bit: _decode_jpeg,
    uid.JPEGLossless: _decode_lossless_jpeg,
    uid.JPEGLosslessSV1: _decode_lossless_jpeg,
    uid.JPEGLSLossless: _decode_jpeg_ls,
    uid.JPEGLSNearLossless: _decode_jpeg_ls,
    **dict.fromkeys(
        (uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL, uid.HTJ2K), imagecodecs.jpeg2k_decode
    ),
}
