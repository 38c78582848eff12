"""covseg_jax: COVID-19 lesion segmentation in chest CT without human masks."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from covseg_jax.predict.model import Model


def load(path: str | os.PathLike, *others: str | os.PathLike) -> Model:
    """A trained network that predicts: `covseg_jax.load('export/').predict('scan.nii.gz')`.

    `path` is the folder that `--stages=export` wrote; with `others` the probabilities of all are
    averaged. `predict` takes a NIfTI file or the folder of a DICOM series and gives a
    `Prediction`: mask, probability, affine, lesion_ml, lung_ml, infection_percent, severity.

    Raises:
      covseg_jax.errors.InputError: an export is damaged, or does not fit this machine.
    """
    # Here and not above: processes that prepare studies import this package without JAX.
    from covseg_jax.predict.export import load

    return load(path, *others)
