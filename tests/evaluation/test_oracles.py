"""Our Dice, HD95 and NSD against MONAI's and seg-metrics', on the masks of oracle_masks.py.

They agree to 1e-4 wherever the definitions do. Each way in which definitions differ is written down
here with the number of masks that it concerns, so that no disagreement can hide among them.
"""

import collections
import dataclasses
import json
import math

import numpy as np
import pytest
from scipy import ndimage

from covseg_jax.evaluation import metrics
from tests.evaluation import oracle_masks


@dataclasses.dataclass(frozen=True)
class Asked:
    """One mask, what we say of it, and its row of the goldens (NaN where that has null)."""

    truth: np.ndarray
    prediction: np.ndarray
    spacing_mm: tuple[float, ...]
    distances: metrics.SurfaceDistances
    dice: float
    hd95_mm: float
    nsd: float
    oracle: dict

    @property
    def is_empty(self) -> tuple[bool, bool]:
        return not self.truth.any(), not self.prediction.any()


def agree(ours: float, theirs: float) -> bool:
    return ours == pytest.approx(theirs, rel=0, abs=1e-4, nan_ok=True)


@pytest.fixture(scope='module')
def asked() -> list[Asked]:
    goldens = json.loads(oracle_masks.GOLDENS.read_text(encoding='utf-8'))
    rows = [dict(zip(goldens['columns'], row, strict=True)) for row in goldens['rows']]
    found = []
    for (name, *given), row in zip(oracle_masks.oracle_masks(), rows, strict=True):
        # Goldens of other masks than these: write them again, python -m …oracle_masks.
        assert (name, oracle_masks.checksum(*given)) == (row['name'], row['crc32'])
        distances = metrics.surface_distances(*given)
        ours = (metrics.count_confusion(*given[:2]).dice, distances.hd95_mm)
        nsd = distances.nsd(oracle_masks.TOLERANCE_MM)
        oracle = {key: math.nan if value is None else value for key, value in row.items()}
        found.append(Asked(*given, distances, *ours, nsd, oracle))
    return found


def test_metrics_agree_with_monai(asked):
    explained = collections.Counter()
    for mask in asked:
        truth_empty, prediction_empty = mask.is_empty
        if truth_empty and not prediction_empty:
            # MONAI leaves out every case without a true lesion (its default, ignore_empty=True):
            # the Dice is NaN. By our empty rule a false alarm is a Dice of 0. With
            # ignore_empty=False MONAI says 0 too, but then 1 where both are empty, and we NaN.
            explained['dice_false_alarm'] += 1
            assert mask.dice == 0
            assert math.isnan(mask.oracle['dice'])
        else:
            explained['dice_undefined' if math.isnan(mask.dice) else 'dice_agrees'] += 1
            assert agree(mask.dice, mask.oracle['dice']), mask.oracle['name']

        explained['hd95_undefined' if math.isnan(mask.hd95_mm) else 'hd95_agrees'] += 1
        assert agree(mask.hd95_mm, mask.oracle['hd95_mm']), mask.oracle['name']

        if mask.oracle['name'] == 'tolerance_2.00001':
            # We forgive a relative 1e-5 of rounding, so that 2.00001 mm is within 2 mm; MONAI
            # compares the distances as they are. Those that are 2 mm but for rounding agree.
            explained['nsd_rounding_forgiven'] += 1
            assert (mask.nsd, mask.oracle['nsd']) == (1, 0)
        else:
            explained['nsd_undefined' if math.isnan(mask.nsd) else 'nsd_agrees'] += 1
            assert agree(mask.nsd, mask.oracle['nsd']), mask.oracle['name']
    assert explained == {
        'dice_agrees': 543,
        'dice_undefined': 8,  # both say NaN: both masks are empty
        'dice_false_alarm': 24,
        'hd95_agrees': 519,
        'hd95_undefined': 56,  # both say NaN: a mask is empty
        'nsd_agrees': 566,
        'nsd_undefined': 8,  # both say NaN: both masks are empty
        'nsd_rounding_forgiven': 1,
    }


def measure_as_seg_metrics(mask: Asked) -> float:
    """One percentile of all distances from a surface to the other mask's outermost voxels, of which
    a voxel is one if any of its 26 neighbours is outside."""
    truth, prediction = (np.pad(each, 1) for each in (mask.truth, mask.prediction))
    distances = []
    for from_, to in ((truth, prediction), (prediction, truth)):
        outermost = to & ~ndimage.binary_erosion(to, np.ones((3, 3, 3)))
        field_mm = ndimage.distance_transform_edt(~outermost, sampling=mask.spacing_mm)
        distances.append(field_mm[from_ & ~ndimage.binary_erosion(from_)])
    return float(np.percentile(np.concatenate(distances), 95))


def test_dice_and_hd95_agree_with_seg_metrics(asked):
    explained = collections.Counter()
    for mask in asked:
        dice, hd95_mm = mask.oracle['seg_metrics_dice'], mask.oracle['seg_metrics_hd95_mm']
        if all(mask.is_empty):
            # seg-metrics takes two empty masks for a perfect match; for us they are undefined.
            explained['dice_both_empty'] += 1
            assert dice == 1
            assert math.isnan(mask.dice)
        else:
            explained['dice_agrees'] += 1
            assert agree(mask.dice, dice), mask.oracle['name']

        if any(mask.is_empty):
            # seg-metrics puts every distance to an empty mask at 0; for us there is none.
            explained['hd95_empty'] += 1
            assert hd95_mm == 0
            assert math.isnan(mask.hd95_mm)
            continue
        directed = (mask.distances.from_truth_mm, mask.distances.from_prediction_mm)
        pooled_mm = float(np.percentile(np.concatenate(directed), 95))
        if agree(mask.hd95_mm, hd95_mm):
            explained['hd95_agrees'] += 1
        elif agree(pooled_mm, hd95_mm):
            # seg-metrics takes one percentile of both directions together; we, as MONAI, the larger
            # of one each. The distances are the same.
            explained['hd95_both_directions_together'] += 1
        else:
            # Besides, it measures to the nearest voxel whose corner neighbours are not all in the
            # mask (SimpleITK's SignedMaurerDistanceMap), while it measures from those whose face
            # neighbours are not; our surface is the latter on both sides, as is MONAI's.
            explained['hd95_surface_by_corners'] += 1
            assert agree(measure_as_seg_metrics(mask), hd95_mm), mask.oracle['name']
    assert explained == {
        'dice_agrees': 567,
        'dice_both_empty': 8,
        'hd95_agrees': 140,
        'hd95_both_directions_together': 365,
        'hd95_surface_by_corners': 14,
        'hd95_empty': 56,
    }
