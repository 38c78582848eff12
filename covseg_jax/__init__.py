"""covseg_jax: COVID-19 lesion segmentation in chest CT without human masks."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from covseg_jax.predict.default import DEFAULT

if TYPE_CHECKING:
    from covseg_jax.predict.model import Model

__version__ = '0.2.0'


def load(path: str | os.PathLike = DEFAULT, *others: str | os.PathLike) -> Model:
    """A trained network that predicts: `covseg_jax.load().predict('scan.nii.gz')`.

    `path` is the folder that `--stages=export` wrote; without it, or as 'default', it is the model
    that comes with the program. With `others` the probabilities of all are averaged. `predict`
    takes a NIfTI file or the folder of a DICOM series and gives a `Prediction`: mask, probability,
    lungs, affine, lesion_ml, lung_ml, infection_percent, severity; of several networks also
    disagreement, lesion_ml_low and lesion_ml_high, else None; of a DICOM series its
    `write_dicom_seg(path)` writes a DICOM Segmentation.

    Raises:
      covseg_jax.errors.InputError: an export is damaged, or does not fit this machine.
    """
    # Here and not above: processes that prepare studies import this package without JAX.
    from covseg_jax.predict.export import load

    return load(path, *others)
