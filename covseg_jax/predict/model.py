"""A trained network with everything that a prediction needs, and one study's prediction."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from covseg_jax.errors import InputError
from covseg_jax.imaging.geometry import from_canonical, to_study_grid
from covseg_jax.imaging.masks import MaskSettings, StudyMask, mask_on_study_grid
from covseg_jax.imaging.studies import find_inputs
from covseg_jax.imaging.study import Study
from covseg_jax.manifest import fingerprint
from covseg_jax.predict import dicom_seg, uncertainty
from covseg_jax.prepare.prepare_studies import (
    PreparedCase,
    PrepareSettings,
    lung_network_crc32,
    prepare_volume,
)
from covseg_jax.segmentation.volumes import Probability, VolumeSettings, with_pixels

RANGE = ('lesion_ml_low', 'lesion_ml_high')


@dataclasses.dataclass(frozen=True)
class Measures:
    """What a mask says of a study."""

    lesion_ml: float
    lung_ml: float

    @property
    def infection_percent(self) -> float:
        """100 × lesion / lungs."""
        return 100 * self.lesion_ml / self.lung_ml if self.lung_ml else 0.0

    @property
    def severity(self) -> str:
        """MosMedData's categories (Morozov et al. 2020, arXiv 2005.06465) by the share of the lungs
        alone: CT-0 nothing, CT-1 to 25 %, CT-2 to 50 %, CT-3 to 75 %, CT-4 above. Radiologists gave
        them by eye, from the more affected lung."""
        if not self.lesion_ml:
            return 'CT-0'
        return f'CT-{1 + sum(self.infection_percent > edge for edge in (25, 50, 75))}'


def measure(mask: np.ndarray, lungs: np.ndarray, voxel_ml: float) -> Measures:
    """Boolean masks of one shape, and the volume of a voxel in ml."""
    return Measures(
        float(np.count_nonzero(mask & lungs)) * voxel_ml, float(np.count_nonzero(lungs)) * voxel_ml
    )


@dataclasses.dataclass(frozen=True)
class Prediction(Measures):
    """A study's lesions, voxel for voxel as the scan's array, and their `Measures`."""

    mask: np.ndarray  # (X, Y, Z) uint8, 1 in lesions, in the axis order of the scan's own file
    lungs: np.ndarray  # the same, 1 in the lungs
    probability: np.ndarray  # (X, Y, Z) float32 in [0, 1], 0 outside the lungs
    affine: np.ndarray  # (4, 4), voxel indices to mm, as the scan's
    notes: tuple[str, ...]  # what was settled by rule in the scan's file
    study: Study
    model_identity: str
    # Of a model of several networks: their disagreement, (X, Y, Z) float32 in [0, 0.5], and the
    # range of lesion_ml that they speak for.
    disagreement: np.ndarray | None = None
    lesion_ml_low: float | None = None
    lesion_ml_high: float | None = None

    def write_dicom_seg(self, path: str | os.PathLike) -> None:
        """Writes lesions and lungs of a DICOM series as a DICOM Segmentation object.

        Raises:
          InputError: the scan is none, or such an object cannot refer to it; highdicom is not
            installed; something that this program did not write lies at `path`.
        """
        dicom_seg.refuse_impossible([self.study])
        masks = (self.mask > 0, self.lungs > 0)
        dicom_seg.write_dicom_seg(pathlib.Path(path), self.study, *masks, self.model_identity)


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a network is and where it comes from, for the record of what it predicts."""

    name: str  # the folder of the export, as it was named; 'default'; or the work directory
    network: str  # 'transunet' or 'unet'; '' where an export of an early version does not say
    volumes: VolumeSettings
    config: str | None = None  # NAME:VARIANT of its training
    checkpoint_step: int | None = None
    training_data: Mapping[str, Any] | None = None  # as model.json has it
    sha256: Mapping[str, str] = dataclasses.field(default_factory=dict)  # of an export's files
    pixels: tuple[int, int] | None = None  # H and W of the slices that it sees


@dataclasses.dataclass(frozen=True)
class MeanProbability:
    """A `Probability` that is the mean of several networks'."""

    networks: tuple[Probability, ...]

    def __call__(self, image: np.ndarray, lungs: np.ndarray) -> np.ndarray:
        return run_networks(self, image, lungs).mean(axis=0)


def run_networks(probability: Probability, image: np.ndarray, lungs: np.ndarray) -> np.ndarray:
    """(N, D, H, W): what each network says whose mean a `Probability` is; N is 1 of one network."""
    networks = probability.networks if isinstance(probability, MeanProbability) else (probability,)
    return np.stack([network(image, lungs) for network in networks])


@dataclasses.dataclass(frozen=True)
class Model:
    """A trained network, or several whose probabilities are averaged."""

    probabilities: tuple[Probability, ...]  # one function of volumes on each device of this host
    preparation: PrepareSettings
    masks: MaskSettings
    identity: str  # equal for models that predict the same
    # model.json of an export; {} of a run that is not exported
    description: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    origins: tuple[Origin, ...] = ()  # of each network

    @property
    def num_networks(self) -> int:
        """How many networks' mean its probability is."""
        first = self.probabilities[0]
        return len(first.networks) if isinstance(first, MeanProbability) else 1

    def predict(self, scan: str | os.PathLike) -> Prediction:
        """Segments one study: a NIfTI file, or the folder of a DICOM series.

        Raises:
          InputError: it cannot be used; file, fault and remedy in one line.
        """
        studies = find_inputs(pathlib.Path(scan))
        if len(studies) != 1:
            names = ', '.join(study.study_id for study in studies[:5])
            raise InputError(
                f'{scan}: holds {len(studies)} studies ({names}{", …" * (len(studies) > 5)}); name '
                'the file or folder of one of them, or give each series a folder of its own'
            )
        case = prepare_volume(studies[0], self.preparation)
        networks = run_networks(self.probabilities[0], case.image, case.lungs)
        probability = networks.mean(axis=0)
        found = mask_on_study_grid(probability, case.lungs, case.geometry, self.masks)
        native = native_probability(case, probability, found)
        affine = np.asarray(case.geometry.affine)
        measures, more = measure(found.mask, found.lungs, case.geometry.study_voxel_ml), {}
        if len(networks) > 1:
            apart = native_probability(case, uncertainty.disagreement(networks), found)
            more = {'disagreement': from_canonical(apart, affine)}
            more |= range_cells(networks, case, self.masks, measures.lesion_ml)
        return Prediction(
            **vars(measures),
            **more,
            mask=from_canonical(found.mask.astype(np.uint8), affine),
            lungs=from_canonical(found.lungs.astype(np.uint8), affine),
            probability=from_canonical(native, affine),
            affine=affine,
            notes=case.notes,
            study=studies[0],
            model_identity=self.identity,
        )


def native_probability(case: PreparedCase, probability: np.ndarray, found: StudyMask) -> np.ndarray:
    """(Z, Y, X) float32, canonical: the probability on the study's own grid."""
    return (to_study_grid(probability, case.geometry) * found.lungs).astype(np.float32)


def range_cells(
    networks: np.ndarray, case: PreparedCase, settings: MaskSettings, lesion_ml: float
) -> dict[str, float]:
    """The range of lesion ml that a case's networks (N, D, H, W) speak for, by column of
    results.csv; nothing of one network. `lesion_ml` is the mask's."""
    if len(networks) == 1:
        return {}
    ends = uncertainty.lesion_range_ml(networks, case.geometry.voxel_ml, settings, lesion_ml)
    return dict(zip(RANGE, ends, strict=True))


def _field_of_view(preparation: PrepareSettings) -> tuple:
    """What of the settings decides beside the size of pixels: of a lung network its content,
    wherever it lies."""
    return preparation.without_pixels(), lung_network_crc32(preparation)


def average_models(models: Sequence[Model]) -> Model:
    """One model whose probabilities and thresholds are the means of theirs. Where their grids
    differ in the size of pixels alone it has the finest, and the others see its slices resampled.

    Raises:
      InputError: they see studies, or cut masks, in different ways.
    """
    first = max(models, key=lambda model: model.preparation.grid)
    if len(models) == 1:
        return first
    for other in models:
        if _field_of_view(other.preparation) != _field_of_view(first.preparation):
            raise InputError(
                'the models of an ensemble see studies in different ways '
                f'({first.preparation} and {other.preparation}); average those of one kind'
            )
        if other.masks.share_of_max != first.masks.share_of_max:
            raise InputError(
                'the models of an ensemble cut their masks by different rules (at a threshold, or '
                'at a share of the maximum); average those of one kind'
            )

    means = {
        field.name: float(np.mean([getattr(model.masks, field.name) for model in models]))
        for field in dataclasses.fields(MaskSettings)
    }
    members = [
        [with_pixels(each, model.preparation.grid[1:]) for each in model.probabilities]
        for model in models
    ]
    return Model(
        probabilities=tuple(MeanProbability(each) for each in zip(*members, strict=True)),
        preparation=first.preparation,
        masks=MaskSettings(**means),
        identity=fingerprint([model.identity for model in models]),
        description={'ensemble': [dict(model.description) for model in models]},
        origins=tuple(origin for model in models for origin in model.origins),
    )
