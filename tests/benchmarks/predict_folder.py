"""Times predict over a folder of 512 × 512 × 41 studies: one after the other, and overlapped.

    python -m tests.benchmarks.predict_folder [--variant=phantom] [--num_studies=48] [--repeats=3]

Makes phantom studies in a temporary folder and predicts them, NIfTI to NIfTI, with the config's
network in fresh weights (its time does not depend on them), in turns with and without other
processes beside it. Prints one JSON line: the medians in seconds a study, their ratio, and what a
study's parts take one after the other.
"""

import argparse
import json
import os
import pathlib
import statistics
import tempfile
import time

import numpy as np

from configs import transunet
from covseg_jax import cpu
from covseg_jax.imaging import nifti, studies
from covseg_jax.imaging.masks import MaskSettings
from covseg_jax.phantom import studies as phantom
from covseg_jax.predict.model import Model
from covseg_jax.predict.studies import Extras, predict_studies, write_prediction
from covseg_jax.prepare import prepare_studies

SHAPE, SPACING_MM = (512, 512, 41), (0.7, 0.7, 8.0)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--variant', default='phantom', help='of configs/transunet.py')
    parser.add_argument('--num_studies', type=int, default=48)
    parser.add_argument('--repeats', type=int, default=3)
    options = parser.parse_args()
    # Not above: the other processes read this module too, and need no JAX.
    from covseg_jax.segmentation import train as segmentation

    config = transunet.get_config(options.variant)
    parts = segmentation.build_segmentation(config)
    probability = segmentation.make_probability(config, parts.network, parts.make_state().ema)
    preparation = prepare_studies.PrepareSettings(**config.prepare)
    settings = MaskSettings(0.5, 0.6)
    model = Model((probability,), preparation, settings, identity='fresh weights')
    workers = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for number in range(options.num_studies):
            made = phantom.make_phantom(number, 'CT-1', SHAPE, SPACING_MM)
            path = folder / 'scans' / f'study_{number:04d}.nii.gz'
            nifti.write_volume(path, made.image, made.affine)
        found = studies.find_inputs(folder / 'scans')

        def predict(num_workers: int) -> float:
            began = time.perf_counter()
            predict_studies(found, model, folder / 'masks', num_workers=num_workers)
            return (time.perf_counter() - began) / len(found)

        seconds: dict[int, list[float]] = {0: [], workers: []}
        case = prepare_studies.prepare_volume(found[0], preparation)
        probability(case.image, case.lungs)  # compiles
        for _ in range(options.repeats):
            for num_workers, each in seconds.items():
                each.append(predict(num_workers))
        steps = [time.perf_counter()]
        case = prepare_studies.prepare_volume(found[0], preparation)
        steps.append(time.perf_counter())
        mask = probability(case.image, case.lungs)
        steps.append(time.perf_counter())
        write_prediction(case, mask[None], settings, folder / 'masks', Extras(), found[0], '')
        steps.append(time.perf_counter())
    alone, overlapped = (statistics.median(each) for each in seconds.values())
    prepare_s, network_s, write_s = np.diff(steps).round(3).tolist()
    print(
        json.dumps(
            {
                'one_at_a_time_s': round(alone, 3),
                'overlapped_s': round(overlapped, 3),
                'ratio': round(alone / overlapped, 2),
                'processes': workers,
                'num_studies': len(found),
                'prepare_s': prepare_s,
                'network_s': network_s,
                'write_s': write_s,
            }
        )
    )


if __name__ == '__main__':
    cpu.tune_process()  # as `covseg_jax.main` does
    main()
