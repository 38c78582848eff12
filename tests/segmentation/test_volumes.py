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
    settings = VolumeSettings(3, 0.0, flip=False, smoothing_slices=0.0, output='linear')
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

    settings = VolumeSettings(
        3, smoothing_pixels=0.5, flip=False, smoothing_slices=0.0, output='sigmoid'
    )
    predict_volumes(predict, settings)(image, lungs)
    # A Gaussian of half a pixel: 1, e^-2 and e^-8 beside each other, over their sum.
    row = np.exp(-2.0 * np.arange(-2, 3) ** 2)
    row /= row.sum()
    expected = np.zeros_like(image)
    expected[1, 2:7, 2:7] = np.outer(row, row)
    expected[:, 5:] = 0.0
    np.testing.assert_allclose(seen[0], expected, atol=1e-6)


def test_an_output_that_does_not_exist_is_named():
    with pytest.raises(InputError, match=r"predict\.output='logit'"):
        VolumeSettings(3, 0.0, flip=False, smoothing_slices=0.0, output='logit')
