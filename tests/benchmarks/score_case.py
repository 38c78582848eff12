"""Times every metric of one study of MosMedData's size (512 × 512 × 41), part by part.

    OMP_NUM_THREADS=1 taskset -c 0 python -m tests.benchmarks.score_case [--repeats=5]

Prints a JSON line for each kind of case: `moderate` (3 % infection), `severe` (30 %) and `specks`
(a moderate truth, and a prediction strewn with single voxels). Medians and bests, in seconds, of
runs that take turns; `whole` is `scores.score_case`, `peer_scipy_surfaces` the same distances as
`surfaces` by SciPy.
"""

import argparse
import dataclasses
import json
import statistics
from collections.abc import Iterator

import numpy as np
from scipy import ndimage

from covseg_jax.evaluation import lesions, metrics, scores
from tests.benchmarks.turns import take_turns

SHAPE, MODEL_SHAPE, SPACING_MM = (41, 512, 512), (32, 128, 128), (8.0, 0.7, 0.7)


def make_lungs() -> np.ndarray:
    """Two ellipsoids, about 18 % of the volume."""
    z, y, x = np.ogrid[-1 : 1 : SHAPE[0] * 1j, -1 : 1 : SHAPE[1] * 1j, -1 : 1 : SHAPE[2] * 1j]
    lungs = np.zeros(SHAPE, bool)
    for side in (-0.42, 0.42):
        lungs |= (z / 0.95) ** 2 + (y / 0.66) ** 2 + ((x - side) / 0.27) ** 2 < 1
    return lungs


def make_field(rng: np.random.Generator, lungs: np.ndarray) -> np.ndarray:
    """(Z, Y, X) float32: the sum of 20 bumps in the lungs, with ragged edges."""
    field = 0.15 * ndimage.zoom(rng.standard_normal((21, 64, 64)), np.divide(SHAPE, (21, 64, 64)))
    grid = np.ogrid[tuple(slice(n) for n in SHAPE)]
    for centre in rng.choice(np.argwhere(lungs), 20):
        radii_mm = rng.uniform((10, 8, 8), (30, 30, 30))
        steps = zip(grid, centre, SPACING_MM, radii_mm, strict=True)
        field += np.exp(-sum(((at - c) * step / r) ** 2 for at, c, step, r in steps))
    return field.astype(np.float32)


def take_share(field: np.ndarray, lungs: np.ndarray, percent: float) -> np.ndarray:
    return lungs & (field > np.percentile(field[lungs], 100 - percent))


def make_cases() -> Iterator[tuple[str, scores.CaseArrays]]:
    """Names and arrays of the three kinds."""
    rng = np.random.default_rng(0)
    lungs = make_lungs()
    field = make_field(rng, lungs)
    predicted_field = field + 0.3 * make_field(rng, lungs)
    zoom = np.divide(MODEL_SHAPE, SHAPE)
    lungs_model = ndimage.zoom(lungs, zoom, order=0)
    field_model = ndimage.zoom(predicted_field, zoom, order=1)
    for kind, percent in (('moderate', 3), ('severe', 30), ('specks', 3)):
        truth = take_share(field, lungs, percent)
        prediction = take_share(predicted_field, lungs, 1.2 * percent)
        if kind == 'specks':
            prediction |= rng.random(SHAPE, np.float32) < 0.002
        middle = np.percentile(field_model[lungs_model], 100 - 1.2 * percent)
        probability = 1 / (1 + np.exp(-8 * (field_model - middle)))
        yield (
            kind,
            scores.CaseArrays(
                study_id='study_0001',
                category=None,
                truth=truth,
                prediction=prediction,
                lungs=lungs,
                spacing_mm=SPACING_MM,
                truth_model=ndimage.zoom(truth, zoom, order=0),
                probability_model=(probability * lungs_model).astype(np.float32),
                lungs_model=lungs_model,
            ),
        )


def measure_by_scipy(*masks: np.ndarray) -> list[np.ndarray]:
    """`metrics.surface_distances` by erosion and distance transform."""
    surfaces = [mask & ~ndimage.binary_erosion(mask) for mask in metrics.crop_to_union(*masks)]
    fields = [ndimage.distance_transform_edt(~surface, sampling=SPACING_MM) for surface in surfaces]
    return [fields[1][surfaces[0]], fields[0][surfaces[1]]]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--repeats', type=int, default=5)
    options = parser.parse_args()
    for kind, case in make_cases():
        masks = (case.truth, case.prediction)
        row = scores.score_case(case)[0]
        seconds = take_turns(
            {
                # A copy each time: a case keeps what was measured of it.
                'whole': lambda case=case: scores.score_case(dataclasses.replace(case)),
                'surfaces': lambda masks=masks: metrics.surface_distances(*masks, SPACING_MM),
                'peer_scipy_surfaces': lambda masks=masks: measure_by_scipy(*masks),
                'lesions': lambda masks=masks: lesions.match_lesions(*masks),
            },
            options.repeats,
        )
        medians = {name: statistics.median(each) for name, each in seconds.items()}
        figures = {
            'kind': kind,
            'infection_percent': round(row['infection_percent'], 2),
            'lesions': [row['lesions_true'], row['lesions_predicted']],
            'median_s': {name: round(median, 3) for name, median in medians.items()},
            'best_s': {name: round(min(each), 3) for name, each in seconds.items()},
            'surfaces_ratio': round(medians['surfaces'] / medians['peer_scipy_surfaces'], 3),
        }
        print(json.dumps(figures))


if __name__ == '__main__':
    main()
