"""A small U-Net that sees lungs where they are dense, computed with NumPy.

It was trained without labels, on phantoms (`covseg_jax/lungs`), and its weights are beside this
file. `lungs.find_lungs` uses it where the image shows no border of the lungs. NumPy, because this
runs in processes beside the one that has the accelerator: no start of XLA in each, no compilation,
and the same masks on every machine.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Mapping

import numpy as np
import safetensors.numpy

from covseg_jax.errors import InputError
from covseg_jax.imaging.geometry import SpacingMm, enlarge, shrink, stretching_matrix

SIZE = 128  # pixels of a slice's longer side
PATCH = 2  # in-plane pixels, PATCH × PATCH, that enter as channels of one and leave the same way
WINDOW_HU = (-1000.0, 300.0)  # of image values 0 and 1
SLICE_MM = 5.0  # between the slices that it looks at, or what the scan has
BESIDE_MM = 10.0  # from a slice to the neighbours that it sees with it, one below and one above
FILE = 'lung_network.safetensors'
SHIPPED = pathlib.Path(__file__).with_name(FILE)
_AT_A_TIME = 2  # slices: more of them leave the cache


@dataclasses.dataclass(frozen=True)
class LungNetwork:
    """Its convolutions in the order in which they run, batch normalisation folded in.

    Attributes:
        convolutions: (kernel (k, k, C, n), bias (n,)) each, float32: two a level of the encoder,
            two of the bottleneck, two a level of the decoder, and the head.
    """

    convolutions: tuple[tuple[np.ndarray, np.ndarray], ...]

    def probability(self, image_hu: np.ndarray, spacing_mm: SpacingMm) -> np.ndarray:
        """How likely a voxel is lung.

        Args:
            image_hu: (Z, Y, X) canonical, HU.
            spacing_mm: (z, y, x).

        Returns:
            float32 (z, y, x) in [0, 1] on a coarser grid over the same extent: the longer of y and
            x is 128, z one slice each 5 mm, or as many as there are.
        """
        slices, distance = resize(image_hu, spacing_mm)
        height, width = slices.shape[1:]
        padded = np.zeros((len(slices), SIZE, SIZE), np.float32)
        top, left = (SIZE - height) // 2, (SIZE - width) // 2
        padded[:, top : top + height, left : left + width] = slices
        found = np.empty_like(padded)
        for start in range(0, len(slices), _AT_A_TIME):
            middle = np.arange(start, min(start + _AT_A_TIME, len(slices)))
            found[middle] = self._apply(with_neighbours(padded, middle, distance))
        return found[:, top : top + height, left : left + width]

    def _apply(self, x: np.ndarray) -> np.ndarray:
        """(B, SIZE, SIZE, 3) in [0, 1] → (B, SIZE, SIZE) probabilities."""
        x, layers, skips = to_channels(x), iter(self.convolutions), []
        num_levels = (len(self.convolutions) - 3) // 4
        for _ in range(num_levels):
            x = _relu(_convolve(_relu(_convolve(x, *next(layers))), *next(layers)))
            skips.append(x)
            x = _max_pool(x)
        x = _relu(_convolve(_relu(_convolve(x, *next(layers))), *next(layers)))
        for skip in reversed(skips):
            x = np.concatenate([skip, _upsample(x)], axis=3)
            x = _relu(_convolve(_relu(_convolve(x, *next(layers))), *next(layers)))
        kernel, bias = next(layers)
        logits = to_pixels(x @ kernel[0, 0] + bias)
        return 1 / (1 + np.exp(-np.clip(logits, -30, 30)))


@functools.cache
def load_network(path: str | os.PathLike = SHIPPED) -> LungNetwork:
    """The network of a file that `save_network` wrote.

    Raises:
        InputError: it cannot be read, or is not one.
    """
    try:
        tensors = safetensors.numpy.load_file(path)
        parts = range(len(tensors) // 2)
        pairs = [(tensors[f'{part}/kernel'], tensors[f'{part}/bias']) for part in parts]
    except (KeyError, OSError, safetensors.SafetensorError) as error:
        raise InputError(
            f'{path}: not the weights of a lung network; --stages=lungs makes them'
        ) from error
    return LungNetwork(
        tuple((kernel.astype(np.float32), bias.astype(np.float32)) for kernel, bias in pairs)
    )


def save_network(network: LungNetwork) -> bytes:
    """The content of a .safetensors file of the network, in float16."""
    tensors: Mapping[str, np.ndarray] = {
        f'{part}/{name}': np.ascontiguousarray(array, np.float16)
        for part, pair in enumerate(network.convolutions)
        for name, array in zip(('kernel', 'bias'), pair, strict=True)
    }
    return safetensors.numpy.save(tensors)


def resize(image_hu: np.ndarray, spacing_mm: SpacingMm) -> tuple[np.ndarray, int]:
    """The slices that the network looks at, float32 (z, y, x) in [0, 1], and how many of them its
    neighbours lie from each."""
    depth_mm = image_hu.shape[0] * spacing_mm[0]
    depth = min(image_hu.shape[0], max(1, round(depth_mm / SLICE_MM)))
    longer = max(image_hu.shape[1:])
    shape = (depth, *(max(1, round(SIZE * side / longer)) for side in image_hu.shape[1:]))
    matrices = [stretching_matrix(*sides) for sides in zip(shape, image_hu.shape, strict=True)]
    low, high = WINDOW_HU
    small = shrink(image_hu, matrices, clip=(low, high))
    slices = (small.astype(np.float32) - low) / (high - low)
    return slices, max(1, round(BESIDE_MM * depth / depth_mm))


def with_neighbours(slices: np.ndarray, middle: np.ndarray, distance: int) -> np.ndarray:
    """(N, H, W) slices → (B, H, W, 3): those numbered `middle`, each between its neighbours; beyond
    the first and the last slice the slice itself stands for them."""
    below, above = middle - distance, middle + distance
    below = np.where(below < 0, middle, below)
    above = np.where(above >= len(slices), middle, above)
    return np.stack([slices[each] for each in (below, middle, above)], axis=-1)


def to_grid(probability: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """(z, y, x) over an extent → `shape` over the same, by linear interpolation: float32."""
    matrices = [stretching_matrix(*sides) for sides in zip(shape, probability.shape, strict=True)]
    result = np.empty(shape, np.float32)
    for slices, values in enlarge(probability, matrices):
        result[slices] = values
    return result


# --- layers; (B, H, W, C) float32


# The first two are the training's, too, and take arrays of JAX as well.


def to_channels(x: np.ndarray) -> np.ndarray:
    """(B, H, W, C) → (B, H / PATCH, W / PATCH, PATCH² · C)."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // PATCH, PATCH, width // PATCH, PATCH, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, height // PATCH, width // PATCH, PATCH**2 * channels)


def to_pixels(x: np.ndarray) -> np.ndarray:
    """(B, h, w, PATCH²) → (B, PATCH · h, PATCH · w): the way back, of one channel."""
    batch, height, width, _ = x.shape
    x = x.reshape(batch, height, width, PATCH, PATCH).transpose(0, 1, 3, 2, 4)
    return x.reshape(batch, height * PATCH, width * PATCH)


def _relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0, out=x)


def _convolve(x: np.ndarray, kernel: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """3 × 3, padded by 1: one product of matrices a row of the kernel, whose three columns stand
    beside each other as channels."""
    batch, height, width, channels = x.shape
    padded = np.zeros((batch, height + 2, width + 2, channels), np.float32)
    padded[:, 1:-1, 1:-1] = x
    columns = np.concatenate([padded[:, :, i : i + width] for i in range(3)], axis=3)
    y = np.zeros((batch, height, width, kernel.shape[3]), np.float32)
    y += bias
    for row in range(3):
        flat = kernel[row].reshape(3 * channels, -1)
        y += columns[:, row : row + height] @ flat
    return y


def _max_pool(x: np.ndarray) -> np.ndarray:
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))


def _upsample(x: np.ndarray) -> np.ndarray:
    """Bilinear ×2 with aligned corners, as `models/upsampling.py` does it."""
    rows, columns = (_corner_aligned_matrix(size) for size in x.shape[1:3])
    batch, height, width, channels = x.shape
    x = (rows @ x.reshape(batch, height, -1)).reshape(batch * 2 * height, width, channels)
    return (columns @ x).reshape(batch, 2 * height, 2 * width, channels)


@functools.cache
def _corner_aligned_matrix(size: int) -> np.ndarray:
    position = np.arange(2 * size) * ((size - 1) / (2 * size - 1))
    return np.maximum(0, 1 - np.abs(position[:, None] - np.arange(size))).astype(np.float32)
