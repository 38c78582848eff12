"""Times the way of one study from NIfTI to a prepared case, part by part and against peers.

    taskset -c 0 python -m tests.benchmarks.prepare_study [--repeats=5] [--num_studies=0]

Makes phantom studies of MosMedData's size (512 × 512 × 41) in a temporary folder and prints one
JSON line. Medians of runs that take turns; peak memory is that of a process of its own that
prepares one study (Linux). With --num_studies, a whole data set is prepared too, with all cores.
--sizes tells time and memory of large scans instead.
"""

import argparse
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import nibabel
import numpy as np
from scipy import ndimage

from configs import transunet
from covseg_jax.imaging import geometry, nifti, studies
from covseg_jax.phantom import studies as phantom
from covseg_jax.prepare import lungs, prepare_studies
from covseg_jax.prepare.lung_network import load_network
from tests.benchmarks.turns import take_turns

SHAPE, SPACING_MM = (512, 512, 41), (0.7, 0.7, 8.0)


def measure_peak_gb(image: pathlib.Path) -> float:
    """Peak resident memory of a fresh process that prepares the study, GB."""
    program = (
        'import pathlib, sys\n'
        'from configs import transunet\n'
        'from covseg_jax.imaging import studies\n'
        'from covseg_jax.prepare import prepare_studies\n'
        'study = studies.find_inputs(pathlib.Path(sys.argv[1]))[0]\n'
        'settings = prepare_studies.PrepareSettings(**transunet.get_config().prepare)\n'
        'prepare_studies.prepare_volume(study, settings)\n'
        # Not getrusage: until it starts its program a process counts as its parent's size.
        'status = pathlib.Path("/proc/self/status").read_text()\n'
        'print(status.split("VmHWM:")[1].split()[0])'
    )
    done = subprocess.run(
        [sys.executable, '-c', program, str(image)], capture_output=True, text=True, check=True
    )
    return round(int(done.stdout) * 1024 / 1e9, 3)


def write_large(folder: pathlib.Path, shape: tuple[int, int, int]) -> pathlib.Path:
    """A phantom of MosMedData's size, its voxels repeated until the scan is (X, Y, Z) large."""
    made = phantom.make_phantom(1, 'CT-1', SHAPE, SPACING_MM)
    affine, image = made.affine.copy(), made.image
    for axis, length in zip((2, 1, 0), shape, strict=True):  # the image is (Z, Y, X)
        times = -(-length // image.shape[axis])
        image = np.repeat(image, times, axis=axis)
        affine[:3, 2 - axis] /= times
    x, y, z = shape
    path = folder / f'large_{x}_{y}_{z}.nii'
    nifti.write_volume(path, np.ascontiguousarray(image[:z, :y, :x]), affine)
    return path


def measure_sizes(folder: pathlib.Path) -> None:
    """Prints a line for each of some sizes of scans: seconds and peak memory of preparing it."""
    for shape in ((512, 512, 41), (512, 512, 200), (512, 512, 700), (1024, 1024, 500)):
        image = write_large(folder, shape)
        began = time.perf_counter()
        peak = measure_peak_gb(image)
        found = {'shape': shape, 'int16_gb': round(2 * math.prod(shape) / 1e9, 3), 'peak_gb': peak}
        print(json.dumps(found | {'s': round(time.perf_counter() - began, 1)}), flush=True)
        image.unlink()


def measure_data_set(folder: pathlib.Path, num_studies: int) -> dict:
    """Studies a second of a whole `prepare`."""
    workers = os.cpu_count() or 1
    data = folder / 'data'
    phantom.write_phantom_data_set(
        data,
        num_healthy=num_studies // 2,
        num_covid=num_studies - num_studies // 2,
        num_masked=0,
        seed=0,
        shape=SHAPE,
        spacing_mm=SPACING_MM,
        num_workers=workers,
    )
    began = time.perf_counter()
    report = prepare_studies.prepare_studies(
        studies.find_studies(data),
        folder / 'prepared',
        prepare_studies.PrepareSettings(**transunet.get_config().prepare),
        num_workers=workers,
    )
    seconds = time.perf_counter() - began
    return {
        'studies_per_s': round(len(report.made) / seconds, 2),
        'workers': workers,
    }


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--num_studies', type=int, default=0)
    parser.add_argument('--sizes', action='store_true', help='scans of several sizes, and no parts')
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        if options.sizes:
            measure_sizes(folder)
            return
        image = folder / 'study_0001.nii.gz'
        made = phantom.make_phantom(1, 'CT-1', SHAPE, SPACING_MM)
        nifti.write_volume(image, made.image, made.affine)
        study = studies.find_inputs(image)[0]
        volume = nifti.read_volume(image)
        canonical = volume.array
        spacing = volume.spacing_mm
        network = load_network()
        found = lungs.find_lungs(canonical, spacing, network)
        settings = prepare_studies.PrepareSettings(**transunet.get_config().prepare)
        plan = geometry.fit_geometry(
            found, volume.as_stored.shape, volume.affine, settings.grid, settings.margin_mm
        )
        zoom = [n / m for n, m in zip(settings.grid, canonical.shape, strict=True)]
        parts = {
            'whole_s': lambda: prepare_studies.prepare_volume(study, settings),
            'read_s': lambda: nifti.read_volume(image),
            'lungs_s': lambda: lungs.find_lungs(canonical, spacing, network),
            'threshold_lungs_s': lambda: lungs.find_lungs(canonical, spacing),
            'resample_s': lambda: geometry.to_model_grid(canonical, plan, weights=found),
            'peer_nibabel_read_s': lambda: nibabel.load(image).get_fdata(),
            'peer_scipy_resample_s': lambda: ndimage.zoom(
                canonical.astype(np.float32), zoom, order=3
            ),
        }
        seconds = take_turns(parts, options.repeats)
        result = {name: round(statistics.median(each), 3) for name, each in seconds.items()}
        result['read_ratio'] = round(result['read_s'] / result['peer_nibabel_read_s'], 3)
        result['peak_gb'] = measure_peak_gb(image)
        if options.num_studies:
            result |= measure_data_set(folder, options.num_studies)
    print(json.dumps(result))


if __name__ == '__main__':
    main()
