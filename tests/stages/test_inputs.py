"""What the stages read from the config and the work directory: how masks are cut."""

import gzip
import json
import os
import types

import numpy as np
import pytest

from configs import transunet
from covseg_jax.imaging import formats
from covseg_jax.imaging.masks import MaskSettings
from covseg_jax.imaging.study import Study
from covseg_jax.segmentation import train
from covseg_jax.stages import inputs


def write_calibration(workdir, content):
    (workdir / 'transunet').mkdir(exist_ok=True)
    path = workdir / 'transunet' / 'calibration.json'
    path.write_text(json.dumps(content | {'checkpoint_step': 7}))


@pytest.mark.parametrize(
    ('variant', 'cuts'),
    [
        ('published', MaskSettings(min_component_ml=0.0, share_of_max=0.2)),
        ('mosmed', MaskSettings(0.6, 0.8, 0.1)),
    ],
)
def test_cuts_come_back_from_calibration_as_they_went_in(variant, cuts, tmp_path):
    config = transunet.get_config(variant)
    write_calibration(tmp_path, inputs.describe_cuts(cuts))
    assert inputs.load_masks(config, tmp_path) == cuts
    assert inputs.given_cuts(config) == (cuts if cuts.share_of_max else None)


def test_cuts_of_older_runs_are_read(tmp_path):
    write_calibration(tmp_path, {'threshold': 0.4})
    config = transunet.get_config('mosmed')
    assert inputs.load_masks(config, tmp_path) == MaskSettings(0.4, 0.4, 0.1)


def test_a_signed_pseudo_mask_is_a_probability_where_it_is_scored(tmp_path):
    config = transunet.get_config('published')
    difference = np.array([-0.5, 0.0, 0.25, 1.0], np.float16).reshape(1, 1, 4)
    (tmp_path / 'pseudo_masks').mkdir()
    np.save(tmp_path / 'pseudo_masks' / 'a.npy', difference)
    case = types.SimpleNamespace(study_id='a')
    raw = inputs.pseudo_mask_reader(config, tmp_path)(case)
    np.testing.assert_array_equal(raw, difference)  # what the network learns from
    scored = inputs.pseudo_probability_reader(config, tmp_path)(case)
    assert scored.ravel().tolist() == [0, 0, 0.25, 1]
    assert inputs.pseudo_mask_cuts(config) == MaskSettings(0.5, 0.0, 0.0, share_of_max=0.2)
    assert inputs.pseudo_mask_cuts(transunet.get_config('mosmed')) == MaskSettings(0.5, 0.0, 0.1)


def test_a_network_is_known_by_its_weights_and_not_by_its_folder(tmp_path, monkeypatch):
    config = transunet.get_config('tiny')
    weights = {}
    monkeypatch.setattr(
        train, 'load_variables', lambda _, folder: (None, {'params': weights[folder.parent]}, 8)
    )
    monkeypatch.setattr(train, 'make_probability', lambda *_: None)

    def identity(name, values, time):
        folder = tmp_path / name
        folder.mkdir()
        weights[folder] = np.asarray(values, np.float32)
        write_calibration(folder, {'threshold': 0.4})
        os.utime(folder / 'transunet' / 'calibration.json', (time, time))
        return inputs.load_model(config, folder, num_devices=1)[0].identity

    here = identity('here', [1, 2], time=1e9)
    assert identity('brought from a bucket', [1, 2], time=2e9) == here
    assert identity('trained again', [2, 1], time=1e9) != here


def make_study(path, content):
    path.write_bytes(content)
    return Study(path.name, path, None, None, None, 'made')


def test_as_many_processes_as_have_room_for_the_largest_scan(tmp_path, monkeypatch):
    scan = bytes(200_000)
    studies = [
        make_study(tmp_path / 'a.nii.gz', gzip.compress(scan)),
        make_study(tmp_path / 'b.nii', scan[:1000]),
        make_study(tmp_path / 'damaged.nii.gz', b'no'),
        make_study(tmp_path / 'in_parts.nii.gz', gzip.compress(b'1' * 100) + gzip.compress(b'')),
    ]
    sizes = [formats.stored_bytes(study.image) for study in studies]
    assert sizes == [200_000, 1000, 0, 4 * studies[3].image.stat().st_size]
    assert formats.stored_bytes(tmp_path) == sum(p.stat().st_size for p in tmp_path.iterdir())
    monkeypatch.setattr(inputs.cpu, 'count_cores', lambda: 8)
    each = 3 * 200_000 + 300_000_000
    for available, expected in ((None, 8), (100 * each, 8), (3 * each, 3), (each - 1, 1)):
        monkeypatch.setattr(inputs.cpu, 'available_memory', lambda given=available: given)
        assert inputs.num_workers(None, studies) == expected
        assert inputs.num_workers(None) == 8
    config = transunet.get_config('tiny').unlock()
    config.data.num_workers = 5
    assert inputs.num_workers(config, studies) == 5
