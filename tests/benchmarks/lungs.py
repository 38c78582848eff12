"""What the lungs hold of lesions, and what they take in beside lungs: one table.

    python -m tests.benchmarks.lungs [--lungs_source=network|threshold] [--phantoms=5]
        [--real_slices=DIR] [--healthy=DIR] [--chest=DIR] [-v]

Scans of patients are those of the folders that are given; of phantoms there are as many of CT-2 as
of CT-3, and again of those whose lesions are, for a good part, consolidated. `inside` is the share
of a scan's lesion voxels inside the lungs; `added` is what lies outside of the reference, as a
share of it: the true lungs, or, where only lesions are known, the threshold's lungs joined with
them; `volume` is that of the lungs over that of the threshold's. Means are over scans; in brackets
stands the worst, of volumes the range. Where no lungs are found, no lesion is inside.
"""

import argparse
import itertools
import pathlib
from collections.abc import Iterator

import numpy as np

from covseg_jax.imaging.geometry import SpacingMm, canonical_spacing
from covseg_jax.imaging.nifti import read_volume
from covseg_jax.imaging.studies import find_inputs
from covseg_jax.phantom.studies import make_phantom
from covseg_jax.prepare.lung_network import LungNetwork, load_network
from covseg_jax.prepare.lungs import DENSE_HU, find_lungs
from covseg_jax.prepare.study_files import read_image, read_mask

SEED = 3  # of the phantoms, as in the tests of lungs
CATEGORIES = ('CT-2', 'CT-3')
CONSOLIDATED = 0.3  # of the lesions' voxels are as dense as soft tissue; of most phantoms 0.01
# Image in HU, spacing, and where they are known its lesions and its lungs.
Scan = tuple[np.ndarray, SpacingMm, np.ndarray | None, np.ndarray | None]


def make_phantoms(category: str, number: int, least_share: float = 0.0) -> Iterator[Scan]:
    """The first phantoms of the seed, of those of whose lesions that share is consolidated."""
    phantoms = (make_phantom((SEED, index), category) for index in itertools.count())
    chosen = (
        made for made in phantoms if (made.image[made.lesion > 0] > DENSE_HU).mean() >= least_share
    )
    for made in itertools.islice(chosen, number):
        yield made.image, canonical_spacing(made.affine), made.lesion > 0, made.lungs > 0


def read_scans(folder: pathlib.Path) -> Iterator[Scan]:
    """A data set's, with lesion masks where it has such; every label counts."""
    for study in find_inputs(folder):
        volume, lesion = read_image(study), None
        if study.lesion_mask is not None:
            lesion = read_mask(study, 'lesion_mask', volume, labels=None)
        yield volume.array, volume.spacing_mm, lesion, None


def read_chest(folder: pathlib.Path) -> Iterator[Scan]:
    """The scan image.nii.gz with the lungs lung_mask.nii.gz."""
    volume = read_volume(folder / 'image.nii.gz')
    lungs = read_volume(folder / 'lung_mask.nii.gz').array > 0
    yield volume.array, volume.spacing_mm, None, lungs


def find(scan: Scan, network: LungNetwork | None) -> np.ndarray:
    """bool (Z, Y, X): the lungs, none where they are not found."""
    try:
        return find_lungs(*scan[:2], network)
    except ValueError:
        return np.zeros(scan[0].shape, bool)


def score(scan: Scan, network: LungNetwork | None) -> dict[str, float]:
    """Column → figure, of those that the scan has a truth for."""
    _, _, lesion, truth = scan
    by_threshold = find(scan, None)
    lungs = by_threshold if network is None else find(scan, network)
    figures = {'volume': lungs.sum() / max(1, by_threshold.sum())}
    reference = truth
    if lesion is not None:
        figures['inside'] = lungs[lesion].mean()
        if truth is None:
            reference = by_threshold | lesion
    if reference is not None:
        figures['added'] = (lungs & ~reference).sum() / reference.sum()
    if truth is not None:
        figures['Dice'] = 2 * (lungs & truth).sum() / (lungs.sum() + truth.sum())
    return figures


# Column → the worst of its figures.
COLUMNS = {'inside': min, 'added': max, 'Dice': min, 'volume': None}


def make_row(name: str, rows: list[dict[str, float]]) -> str:
    """A line of the table."""
    cells = [name, str(len(rows))]
    for column, worst in COLUMNS.items():
        values = [row[column] for row in rows if column in row]
        if not values:
            cells.append('')
        elif worst is None:
            cells.append(f'{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})')
        else:
            cells.append(f'{np.mean(values):.3f} ({worst(values):.3f})')
    return f'| {" | ".join(cells)} |'


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--lungs_source', choices=('network', 'threshold'), default='network')
    parser.add_argument('--phantoms', type=int, default=5, help='of each category; 0 makes none')
    for name, text in (
        ('real_slices', 'a data set with lesion masks'),
        ('healthy', 'scans without lesions'),
        ('chest', 'a folder of one scan, image.nii.gz, and its lungs, lung_mask.nii.gz'),
    ):
        parser.add_argument(f'--{name}', type=pathlib.Path, metavar='DIR', help=text)
    parser.add_argument('-v', action='store_true', help='a line for each scan, too')
    options = parser.parse_args()
    network = load_network() if options.lungs_source == 'network' else None
    sets = {
        f'{each} phantoms{of}': make_phantoms(each, options.phantoms, least)
        for of, least in (('', 0.0), (', consolidated', CONSOLIDATED))
        for each in CATEGORIES
    }
    for name, read in (('real_slices', read_scans), ('healthy', read_scans), ('chest', read_chest)):
        folder = getattr(options, name)
        if folder is not None:
            sets[name.replace('_', ' ')] = read(folder)
    print(f'| {options.lungs_source} | scans | {" | ".join(COLUMNS)} |\n|{"---|" * 6}', flush=True)
    for name, scans in sets.items():
        rows = []
        for number, scan in enumerate(scans):
            rows.append(score(scan, network))
            if options.v:
                print(make_row(f'{name}, {number + 1}', rows[-1:]), flush=True)
        if rows:
            print(make_row(name, rows), flush=True)


if __name__ == '__main__':
    main()
