"""What the stages read from the config and the work directory: how masks are cut."""

import json
import types

import numpy as np
import pytest

from configs import transunet
from covseg_jax.imaging.masks import MaskSettings
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
