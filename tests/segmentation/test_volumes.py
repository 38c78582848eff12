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
    settings = VolumeSettings(3, flip=False, smoothing_slices=0.0, output='linear')
    probability = predict_volumes(lambda slices: gain * slices, settings)
    np.testing.assert_allclose(probability(image, lungs).ravel(), expected, rtol=1e-6)


def test_an_output_that_does_not_exist_is_named():
    with pytest.raises(InputError, match=r"predict\.output='logit'"):
        VolumeSettings(3, flip=False, smoothing_slices=0.0, output='logit')
