"""From slices to a volume."""

import numpy as np
import pytest

from covseg_jax.errors import InputError
from covseg_jax.segmentation.volumes import VolumeSettings, predict_volumes


@pytest.mark.parametrize(
    ('gain', 'expected'),
    [
        (1.0, [0.0, 0.2, 0.4, 0.0]),  # below 0 and outside the lungs is 0
        (4.0, [0.0, 0.5, 1.0, 0.0]),  # 0.8 and 1.6, over 1.6
        (-1.0, [0.3, 0.0, 0.0, 0.0]),
    ],
)
def test_raw_output_becomes_a_volume_within_0_and_1(gain, expected):
    image = np.array([-0.3, 0.2, 0.4, 0.9], np.float32).reshape(4, 1, 1)
    lungs = np.array([1, 1, 1, 0], np.uint8).reshape(4, 1, 1)
    settings = VolumeSettings(3, 0.0, False, 0.0, border_factor=1.0, output='linear')
    probability = predict_volumes(lambda slices: gain * slices, settings)
    np.testing.assert_allclose(probability(image, lungs).ravel(), expected, rtol=1e-6)


def test_slices_are_smoothed_in_their_plane_and_within_the_lungs():
    image = np.zeros((3, 9, 9), np.float32)
    image[1, 4, 4] = 1.0
    lungs = np.ones(image.shape, np.uint8)
    lungs[:, 5:] = 0
    seen = []

    def predict(slices):
        seen.append(slices[..., 0])
        return slices

    settings = VolumeSettings(3, 0.5, False, 0.0, border_factor=1.0, output='sigmoid')
    predict_volumes(predict, settings)(image, lungs)
    # A Gaussian of half a pixel: 1, e^-2 and e^-8 beside each other, over their sum.
    row = np.exp(-2.0 * np.arange(-2, 3) ** 2)
    row /= row.sum()
    expected = np.zeros_like(image)
    expected[1, 2:7, 2:7] = np.outer(row, row)
    expected[:, 5:] = 0.0
    np.testing.assert_allclose(seen[0], expected, atol=1e-6)


def test_lungs_outermost_pixels_count_less_slice_by_slice():
    lungs = np.zeros((3, 8, 9), np.uint8)
    lungs[1, 1:7, 1:8] = 1  # its neighbours above and below hold no lung
    settings = VolumeSettings(3, 0.0, False, 0.0, border_factor=0.64, output='sigmoid')
    found = predict_volumes(np.ones_like, settings)(np.zeros(lungs.shape, np.float32), lungs)
    expected = np.zeros(lungs.shape, np.float32)
    expected[1, 1:7, 1:8] = 0.64
    expected[1, 2:6, 2:7] = 0.8
    expected[1, 3:5, 3:6] = 1.0
    np.testing.assert_allclose(found, expected)


def test_an_output_that_does_not_exist_is_named():
    with pytest.raises(InputError, match=r"predict\.output='logit'"):
        VolumeSettings(3, 0.0, False, 0.0, border_factor=1.0, output='logit')
