"""Single lesions: which of the true ones were found, and what was found besides."""

import dataclasses
import math

import numpy as np

from covseg_jax.evaluation import metrics
from covseg_jax.imaging.masks import label_lesions


@dataclasses.dataclass(frozen=True)
class LesionMatch:
    """The lesions of a truth and a prediction.

    Attributes:
      true_voxels: (T,) size of each true lesion.
      covered: (T,) the share of it that is predicted, in [0, 1].
      num_predicted: connected lesions of the prediction.
      num_false: those of them that touch no true lesion.
    """

    true_voxels: np.ndarray
    covered: np.ndarray
    num_predicted: int
    num_false: int

    @property
    def f1(self) -> float:
        """2 TP / (2 TP + FP + FN), where TP are true lesions of which a voxel is predicted, FN the
        others, and FP predicted lesions that touch no true one (Hernandez Petzsche et al. 2022,
        ISLES). NaN where there is no lesion on either side."""
        return self.f1_at(0)

    def f1_at(self, least_share: float) -> float:
        """As `f1`, where TP are true lesions of which at least this share is predicted, in [0, 1],
        and at least a voxel."""
        found = int(np.count_nonzero(self.found(least_share)))
        whole = 2 * found + (len(self.covered) - found) + self.num_false
        return 2 * found / whole if whole else math.nan

    def found(self, least_share: float) -> np.ndarray:
        """(T,) whether at least this share of a true lesion is predicted, and at least a voxel."""
        return (self.covered > 0) & (self.covered >= least_share)


def match_lesions(truth: np.ndarray, prediction: np.ndarray) -> LesionMatch:
    """Matches the lesions of (Z, Y, X) boolean masks of one shape. Voxels that share a corner are
    one lesion."""
    truth, prediction = metrics.crop_to_union(truth, prediction)
    true_labels, num_true = label_lesions(truth)
    predicted_labels, num_predicted = label_lesions(prediction)
    true_voxels = np.bincount(true_labels[truth], minlength=num_true + 1)[1:]
    both = truth & prediction
    hit = np.bincount(true_labels[both], minlength=num_true + 1)[1:]
    touching = np.unique(predicted_labels[both]).size
    covered = hit / np.maximum(true_voxels, 1)
    return LesionMatch(true_voxels, covered, num_predicted, num_predicted - touching)
