"""One seed, many streams, and nothing in common with another seed's."""

import itertools
import pathlib
import re
import types

import jax
import numpy as np

import covseg_jax
from covseg_jax.data.opacities import paint_scans
from covseg_jax.data.streams import stream_key, stream_seed
from tests.settings import opacity_model

NAMES = [('gan',), ('train', 0), ('train', 1), ('high',), ('low',), ('paint', 'a'), ('paint', 'b')]


def test_streams_of_neighbouring_seeds_share_nothing():
    seeds = [stream_seed(seed, *name) for seed in range(-5, 100) for name in NAMES]
    assert len(set(seeds)) == 105 * len(NAMES)
    assert all(0 <= each < 2**32 for each in seeds)
    # Neither do streams of streams, and names are no sums.
    nested = [stream_seed(each, 'high') for each in seeds]
    assert len({*seeds, *nested}) == 2 * len(seeds)
    keys = [jax.random.key_data(stream_key(seed, *name)) for seed in range(9) for name in NAMES]
    assert len({tuple(np.asarray(key).tolist()) for key in keys}) == 9 * len(NAMES)


def test_a_stream_is_the_same_whenever_it_is_drawn():
    # The first 8 digits of `printf '[3, "train", 1]' | sha256sum`, on any machine.
    assert stream_seed(3, 'train', 1) == 0x2B9FD605


def test_nothing_adds_a_number_to_a_seed_or_makes_a_key_of_its_own():
    root = pathlib.Path(covseg_jax.__file__).parent
    sources = {path: path.read_text(encoding='utf-8') for path in root.rglob('*.py')}
    assert len(sources) > 50
    found = [
        f'{path.name}: {line.strip()}'
        for path, text in sources.items()
        for line in text.splitlines()
        if re.search(r'\bseed \+|random\.key\(', line)
        and path.name != 'streams.py'
        and 'eval_shape' not in line  # shapes alone
    ]
    assert found == []


def test_scans_are_painted_by_study_and_seed():
    class Healthy:
        geometry = types.SimpleNamespace(voxel_ml=1.0)

        def __init__(self, study_id):
            self.study_id = study_id

        def image(self):
            return np.full((4, 16, 16), 0.15, np.float16)

        def lungs(self):
            return np.ones((4, 16, 16), np.uint8)

    model = opacity_model(grain_voxels=(2.0, 6.0), coverage_threshold=(0.5, 0.9))

    def paint(seed, *names):
        return {
            (seed, name): scan.image
            for name, scan in zip(names, paint_scans(map(Healthy, names), model, seed), strict=True)
        }

    all_of_them = {**paint(0, 'a', 'b'), **paint(1, 'a', 'b')}
    for one, other in itertools.combinations(all_of_them.values(), 2):
        assert (one != other).any()
    # Whoever else is there.
    np.testing.assert_array_equal(paint(0, 'b')[0, 'b'], all_of_them[0, 'b'])
