"""Thresholds that are found without human masks."""

import types

import numpy as np
import pytest

from covseg_jax.data.opacities import PaintedScan
from covseg_jax.imaging.masks import MaskSettings
from covseg_jax.predict import calibrate


class HealthyCase:
    """One slice of 1 ml voxels: probability 0.3 in 12 of them, 0.6 in 4, 0.1 in the others."""

    geometry = types.SimpleNamespace(voxel_ml=1.0)

    def image(self):
        found = np.full((1, 8, 8), 0.1)
        found[0, 0] = 0.3
        found[0, 4, :4] = 0.3
        found[0, 7, :4] = 0.6
        return found

    lungs = image


def painted_scan():
    # A lesion of 16 voxels at 0.5, 0.9 in one of them; 8 voxels of 0.3 lie apart from it.
    mask = np.zeros((1, 8, 8), bool)
    mask[0, 2:6, 2:6] = True
    image = np.where(mask, 0.5, 0.0)
    image[0, 3, 3] = 0.9
    image[0, 0] = 0.3
    return PaintedScan(image, np.ones_like(image), mask, voxel_ml=1.0)


@pytest.mark.parametrize(
    ('seed_thresholds', 'max_healthy_ml', 'expected_cuts', 'expected_ml'),
    [
        ((), 20.0, (0.4, 0.4), 4.0),
        ((), 1.0, (0.7, 0.7), 0.0),  # finds one voxel of the lesion
        ((0.5, 0.8), 20.0, (0.2, 0.5), 4.0),
        ((0.5, 0.8), 1.0, (0.2, 0.8), 0.0),  # finds all of it
    ],
)
def test_calibrate_mask_takes_the_best_cuts_that_spare_healthy_lungs(
    seed_thresholds, max_healthy_ml, expected_cuts, expected_ml
):
    settings, healthy_ml = calibrate.calibrate_mask(
        lambda image, lungs: image,
        [painted_scan()],
        [HealthyCase(), HealthyCase()],
        max_healthy_ml=max_healthy_ml,
        min_component_ml=0.0,
        thresholds=(0.2, 0.4, 0.7),
        seed_thresholds=seed_thresholds,
    )
    assert settings == MaskSettings(*expected_cuts, min_component_ml=0.0)
    assert healthy_ml == expected_ml


def test_calibrate_mask_without_cuts_that_spare_healthy_lungs_takes_the_highest():
    class Marked(HealthyCase):
        def image(self):
            return np.ones((1, 8, 8))

        lungs = image

    settings, healthy_ml = calibrate.calibrate_mask(
        lambda image, lungs: image,
        [painted_scan()],
        [Marked(), Marked()],
        max_healthy_ml=10.0,
        min_component_ml=0.0,
    )
    assert (settings.threshold, settings.seed_threshold, healthy_ml) == (0.9, 0.9, 64.0)


class PartlyMarked(HealthyCase):
    """A slice of 1 ml voxels, of which so many are marked whatever the cut."""

    def __init__(self, number):
        self.number = number

    def image(self):
        found = np.zeros((1, 8, 8))
        found.ravel()[: self.number] = 1.0
        return found

    lungs = image


@pytest.mark.parametrize(
    ('marked', 'limit', 'cut'),
    [
        ([14], 5.0, 0.4),  # 14 / 2.996 = 4.67
        ([16], 5.0, 0.9),  # 5.34
        ([0, 20], 5.0, 0.4),  # 10 - 6.314 · 10, and 10 / 2.996
        ([4, 36], 5.0, 0.9),  # 20 - 6.314 · 16, but 20 / 2.996 = 6.7
        ([0, 20] * 20, 7.2, 0.9),  # 10 - 1.685 · 1.601 = 7.30
        ([0, 20] * 20, 7.4, 0.4),
        ([10, 10], 9.9, 0.9),
    ],
)
def test_cut_is_refused_only_where_healthy_scans_show_that_it_marks_more(marked, limit, cut):
    settings, _ = calibrate.calibrate_mask(
        lambda image, lungs: image,
        [painted_scan()],
        [PartlyMarked(number) for number in marked],
        max_healthy_ml=limit,
        min_component_ml=0.0,
        seed_thresholds=(),
    )
    assert settings.threshold == cut


def test_cut_is_refused_with_a_higher_one_whose_masks_lie_within_its_own():
    class HalfMarked(PartlyMarked):
        """Beside what is marked whatever the cut, 40 voxels at 0.5 in one scan."""

        def image(self):
            found = super().image()
            if self.number == 17:
                found.ravel()[-40:] = 0.5
            return found

        lungs = image

    # Above 0.5: 16, 16, 16, 16, 17 ml, 16.2 - 2.13 · 0.2; below it 24.2 - 2.13 · 8.2.
    settings, _ = calibrate.calibrate_mask(
        lambda image, lungs: image,
        [painted_scan()],
        [HalfMarked(number) for number in (16, 16, 16, 16, 17)],
        max_healthy_ml=15.0,
        min_component_ml=0.0,
        seed_thresholds=(),
    )
    assert settings.threshold == 0.9


def test_without_healthy_scans_the_lowest_cuts_are_taken():
    settings, healthy_ml = calibrate.calibrate_mask(
        lambda image, lungs: image, [], [], max_healthy_ml=15.0, min_component_ml=0.1
    )
    assert (settings.threshold, settings.seed_threshold, healthy_ml) == (0.4, 0.4, None)
