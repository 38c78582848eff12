"""The one table of metrics: what each is called, how it is computed and where it is shown.

A new metric is one line of COLUMNS and its function. cases.csv, slices.csv, summary.json, the
report, the figures, TensorBoard, `compare` and the stage's own table all read COLUMNS.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import numpy as np

from covseg_jax.errors import InputError
from covseg_jax.evaluation import lesions, metrics, probabilities

PROTOCOLS = {
    'volume': 'Whole study, native grid',
    'slice_infection_over_1pct': 'Slices with infection > 1 %, output > 0.2 · max',
    'slice_all': 'All slices with lesion, native grid',
}
# Strata of studies by the infection of their lungs, and of true lesions by their size: (name,
# title, from, below).
INFECTION_STRATA = (
    ('under_1_percent', '< 1 %', 0.0, 1.0),
    ('1_to_5_percent', '1 – 5 %', 1.0, 5.0),
    ('5_to_25_percent', '5 – 25 %', 5.0, 25.0),
    ('over_25_percent', '≥ 25 %', 25.0, math.inf),
)
LESION_STRATA = (
    ('under_1_ml', '< 1 ml', 0.0, 1.0),
    ('1_to_10_ml', '1 – 10 ml', 1.0, 10.0),
    ('over_10_ml', '≥ 10 ml', 10.0, math.inf),
)
NSD_TOLERANCE_MM = 2.0
_no_voxel = functools.partial(np.zeros, (0, 1, 1), bool)


@dataclasses.dataclass(frozen=True)
class CaseArrays:
    """What is scored of one study, or of one slice of it.

    Attributes:
      category: 'CT-0' … 'CT-4', or None.
      truth, prediction, lungs: (Z, Y, X) boolean, native grid.
      spacing_mm: native distances of voxels along z, y, x.
      truth_model, lungs_model: (D, H, W) boolean, model grid; no voxel without probabilities.
      probability_model: (D, H, W) float in [0, 1], the network's output on the model grid.
      subject: whose study it is: what confidence intervals draw. '' is a subject of its own.
      voxel_ml: volume of a native voxel, less than the spacing's product where a scan is tilted;
        None is that product.

    Raises:
      InputError: arrays of one grid differ in shape, or the probability is not in [0, 1].
    """

    study_id: str
    category: str | None
    truth: np.ndarray
    prediction: np.ndarray
    lungs: np.ndarray
    spacing_mm: tuple[float, float, float]
    truth_model: np.ndarray = dataclasses.field(default_factory=_no_voxel)
    probability_model: np.ndarray = dataclasses.field(default_factory=_no_voxel)
    lungs_model: np.ndarray = dataclasses.field(default_factory=_no_voxel)
    subject: str = ''
    voxel_ml: float | None = None

    def __post_init__(self):
        object.__setattr__(self, 'subject', self.subject or self.study_id)
        if self.voxel_ml is None:
            object.__setattr__(self, 'voxel_ml', math.prod(map(float, self.spacing_mm)) / 1000)
        model_grid = ('truth_model', 'probability_model', 'lungs_model')
        for grid in (('truth', 'prediction', 'lungs'), model_grid):
            shapes = {name: getattr(self, name).shape for name in grid}
            if len(set(shapes.values())) > 1 or len(shapes[grid[0]]) != 3:
                listed = ', '.join(f'{name} {shape}' for name, shape in shapes.items())
                raise InputError(
                    f'{self.study_id}: masks on different grids ({listed}); '
                    'score masks that were made on the grid of their own scan'
                )
        probability = self.probability_model
        # Written so that a NaN fails it too.
        if probability.size and not (probability.min() >= 0 and probability.max() <= 1):
            raise InputError(
                f'{self.study_id}: the probability map has values outside [0, 1] or NaN; '
                'predict this study again'
            )

    @functools.cached_property
    def whole(self) -> metrics.Confusion:
        return metrics.count_confusion(self.truth, self.prediction)

    @functools.cached_property
    def inside(self) -> metrics.Confusion:
        return metrics.count_confusion(self.truth, self.prediction, within=self.lungs)

    @functools.cached_property
    def surfaces(self) -> metrics.SurfaceDistances:
        return metrics.surface_distances(self.truth, self.prediction, self.spacing_mm)

    @functools.cached_property
    def lesion_match(self) -> lesions.LesionMatch:
        return lesions.match_lesions(self.truth, self.prediction)

    @functools.cached_property
    def lung_voxels(self) -> tuple[np.ndarray, np.ndarray]:
        """Truth and probability of the voxels inside the lungs, on the model grid."""
        return self.truth_model[self.lungs_model], self.probability_model[self.lungs_model]

    def volume_ml(self, mask: np.ndarray) -> float:
        return float(np.count_nonzero(mask) * self.voxel_ml)

    def percent_of_lungs(self, mask: np.ndarray) -> float:
        """100 × what of the mask lies inside the lungs / lungs."""
        lung_voxels = int(np.count_nonzero(self.lungs))
        inside = int(np.count_nonzero(mask & self.lungs))
        return 100 * inside / lung_voxels if lung_voxels else math.nan

    @property
    def volume_error_ml(self) -> float:
        return abs(self.volume_ml(self.prediction) - self.volume_ml(self.truth))

    @property
    def volume_error_percent(self) -> float:
        true_ml = self.volume_ml(self.truth)
        return 100 * self.volume_error_ml / true_ml if true_ml else math.nan

    def count_lesions(self, low_ml: float, high_ml: float, *, found: bool = False) -> int:
        """True lesions in [low_ml, high_ml): all, or those of which a voxel is predicted."""
        size_ml = self.lesion_match.true_voxels * self.voxel_ml
        counted = (size_ml >= low_ml) & (size_ml < high_ml)
        return int((counted & (self.lesion_match.covered > 0) if found else counted).sum())


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of cases.csv.

    Attributes:
      name: its key in every file.
      score: computes it; NaN is undefined (rules in metrics.py).
      title: on the page and in figures.
      digits: decimals in the page's table of cases; None: it is not in that table.
      group: of a metric, whose mean is in summary.json: its place there, groups in rising order and
        columns of a group as below; None: no metric.
      shown: where it stands besides: `slices`, slices.csv (the two slice protocols have it);
        `headline`, the head of the page, the stage's table and the figures against infection;
        `compare`; `strata`, the page's tables of strata; `hparams`, TensorBoard's tab.
      kind: str, int or float.
    """

    name: str
    score: Callable[[CaseArrays], str | int | float | None]
    title: str = ''
    digits: int | None = None
    group: int | None = None
    shown: tuple[str, ...] = ()
    kind: type = float


_CHIEF = ('slices', 'headline', 'compare', 'strata', 'hparams')
COLUMNS = (
    Column('study_id', lambda case: case.study_id, 'Study', 0, kind=str),
    Column('subject', lambda case: case.subject, kind=str),
    Column('category', lambda case: case.category, 'Category', 0, kind=str),
    Column('dice', lambda case: case.whole.dice, 'Dice', 3, 1, _CHIEF),
    Column('iou', lambda case: case.whole.iou, 'IoU', 3, 2),
    Column('sensitivity', lambda case: case.whole.sensitivity, 'Sensitivity', 3, 1, _CHIEF),
    Column('specificity_lung', lambda case: case.inside.specificity,
           'Specificity (lungs)', 3, 1, _CHIEF),
    Column('specificity_image', lambda case: case.whole.specificity,
           'Specificity (image)', 3, 1, ('slices',)),
    Column('precision', lambda case: case.whole.precision, 'Precision', 3, 2),
    Column('hd95_mm', lambda case: case.surfaces.hd95_mm,
           'HD95 (mm)', 1, 1, ('compare', 'hparams')),
    Column('nsd', lambda case: case.surfaces.nsd(NSD_TOLERANCE_MM),
           f'Normalized surface Dice (NSD), {NSD_TOLERANCE_MM:g}\u00a0mm', 3, 1,
           ('compare', 'strata', 'hparams')),
    Column('volume_ml_true', lambda case: case.volume_ml(case.truth), 'True lesion (ml)', 1),
    Column('volume_ml_predicted', lambda case: case.volume_ml(case.prediction),
           'Predicted lesion (ml)', 1),
    Column('lung_ml', lambda case: case.volume_ml(case.lungs), 'Lungs (ml)', 1),
    Column('infection_percent', lambda case: case.percent_of_lungs(case.truth),
           'Infection (%)', 2, shown=('slices',)),
    Column('infection_percent_predicted', lambda case: case.percent_of_lungs(case.prediction),
           'Predicted infection (%)', 2),
    Column('volume_error_ml', lambda case: case.volume_error_ml, 'Volume error (ml)', group=3),
    Column('volume_error_percent', lambda case: case.volume_error_percent,
           'Volume error (%)', group=3),
    Column('lesion_f1', lambda case: case.lesion_match.f1,
           'Lesion-wise F1', 3, 2, ('compare', 'strata')),
    Column('lesions_true', lambda case: len(case.lesion_match.true_voxels), kind=int),
    Column('lesions_predicted', lambda case: case.lesion_match.num_predicted, kind=int),
    *(Column(f'lesions_{prefix}{name}',
             functools.partial(CaseArrays.count_lesions, low_ml=low, high_ml=high, found=found),
             kind=int)
      for prefix, found in (('', False), ('found_', True)) for name, _, low, high in LESION_STRATA),
    Column('average_precision', lambda case: probabilities.average_precision(*case.lung_voxels),
           'Average precision', 3, 3),
    Column('ece', lambda case: probabilities.expected_calibration_error(*case.lung_voxels),
           'Expected calibration error (ECE)', group=3),
    Column('brier', lambda case: probabilities.brier_score(*case.lung_voxels),
           'Brier score', group=3),
)  # fmt: skip
METRICS = sorted((each for each in COLUMNS if each.group), key=lambda each: each.group)
TITLES = {each.name: each.title for each in COLUMNS}


def metrics_shown(where: str) -> tuple[str, ...]:
    """Names of the metrics that stand in a place, as `Column.shown` calls it."""
    return tuple(each.name for each in METRICS if where in each.shown)
