"""Pseudo-masks that a model predicts: numbers by hand."""

import json
import types

import numpy as np
import pytest

from covseg_jax import atomic
from covseg_jax.errors import InputError
from covseg_jax.gan.synthesize import read_pseudo_mask
from covseg_jax.imaging.masks import MaskSettings
from covseg_jax.predict.self_training import predict_pseudo_masks, soften

CUTS = MaskSettings(0.4, 0.6, min_component_ml=0.0)


def test_soft_pseudo_mask_is_one_half_at_the_models_threshold():
    # Of one lesion, for each touches the next; float32 as networks give it.
    probability = np.array([[[0.0, 0.2, 0.3999999, 0.4, 0.7, 1.0]]], np.float32)
    soft = soften(probability, 1.0, CUTS)
    np.testing.assert_allclose(soft[0, 0], [0, 0.25, 0.4995, 0.5, 0.75, 1], atol=3e-4)
    assert ((soft >= 0.5) == (probability >= np.float32(0.4))).all()


def test_lesion_that_the_model_would_not_mark_is_none():
    probability = np.zeros((1, 1, 9), np.float32)
    probability[0, 0, [1, 2, 3]] = 0.3, 0.55, 0.3  # nowhere 0.6: dropped, but for its border
    probability[0, 0, [6, 7]] = 0.5, 0.6
    soft = soften(probability, 1.0, CUTS)
    np.testing.assert_allclose(soft[0, 0], [0, 0.375, 0, 0.375, 0, 0, 0.583, 0.667, 0], atol=1e-3)


def test_predictions_are_stored_as_the_gans_pseudo_masks_are(tmp_path):
    lungs = np.ones((1, 4, 4), np.uint8)

    def make_case(study_id, value):
        image = np.zeros((1, 4, 4), np.float16)
        image[0, :2] = value
        geometry = types.SimpleNamespace(voxel_ml=0.5)
        return types.SimpleNamespace(
            study_id=study_id, image=lambda: image, lungs=lambda: lungs, geometry=geometry
        )

    model = (lambda image, lungs: image.astype(np.float32)), CUTS
    cases = [make_case('h', 0.6)], [make_case('c', 0.7)], tmp_path / 'masks'
    facts = {'models': [{'weights_sha256': 'ab'}]}
    summary = predict_pseudo_masks(*model, *cases, 0.1, facts, atomic.new_file)
    found = read_pseudo_mask(tmp_path / 'masks', 'c')
    assert found.dtype == np.float16
    np.testing.assert_allclose(found[0, :2], 0.75, atol=1e-3)
    assert summary['healthy_false_positive_ml'] == {'mean': 4.0, 'studies': {'h': 4.0}}
    assert summary['infection_percent'] == {'c': 50.0}
    assert summary | facts == summary == json.loads((tmp_path / 'masks/summary.json').read_text())
    with pytest.raises(InputError, match='calibration_fraction'):
        predict_pseudo_masks(*model, [], *cases[1:], 0.1, facts, atomic.new_file)
