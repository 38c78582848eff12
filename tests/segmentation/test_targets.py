"""Rounds of training, and what the network learns from in each."""

import dataclasses
import types

import numpy as np
import pytest

from configs import transunet
from covseg_jax.errors import InputError
from covseg_jax.prepare.cases import Splits
from covseg_jax.segmentation import train
from covseg_jax.segmentation.targets import (
    Round,
    choose_targets,
    learned_cases,
    plan_rounds,
    refine_targets,
)


@dataclasses.dataclass(frozen=True)
class FakeCase:
    study_id: str
    has_lesion_mask: bool

    def image(self):
        return np.full((2, 4, 4), 0.8)

    def lungs(self):
        return np.ones((2, 4, 4), np.uint8)

    def lesion(self):
        return np.ones((2, 4, 4), np.uint8)


MASKED, UNMASKED = FakeCase('a', True), FakeCase('b', False)
SPLITS = Splits((), (), (MASKED, UNMASKED), (UNMASKED,), ())


def pseudo_mask(case):
    return np.full((2, 4, 4), 0.2)


def test_plan_rounds_divides_the_steps():
    assert plan_rounds(('synthetic', 'refined'), (1, 3), 10) == [
        Round('synthetic', 0, 2),
        Round('refined', 2, 10),
    ]
    assert plan_rounds(('targets',), (0.3,), 7) == [Round('targets', 0, 7)]


@pytest.mark.parametrize(
    ('kinds', 'shares'),
    [((), ()), (('refined',), (1,)), (('target',), (1,)), (('targets',), (1, 1)),
     (('targets', 'refined'), (1, 0))],
)  # fmt: skip
def test_plan_rounds_refuses_what_cannot_be_run(kinds, shares):
    with pytest.raises(InputError, match='round'):
        plan_rounds(kinds, shares, 10)


def test_choose_targets_by_source():
    splits, read = choose_targets('pseudo', SPLITS, pseudo_mask)
    assert splits == SPLITS
    assert read(MASKED).max() == 0.2
    splits, read = choose_targets('human_else_pseudo', SPLITS, pseudo_mask)
    assert splits == SPLITS
    assert (read(MASKED).max(), read(UNMASKED).max()) == (1, 0.2)
    splits, read = choose_targets('human', SPLITS, pseudo_mask)
    assert (splits.train, splits.validation) == ((MASKED,), ())
    with pytest.raises(InputError, match='evaluation_pattern'):
        choose_targets('human', dataclasses.replace(SPLITS, train=(UNMASKED,)), pseudo_mask)
    with pytest.raises(InputError, match='targets'):
        choose_targets('humans', SPLITS, pseudo_mask)


def test_rounds_of_painted_scans_learn_from_no_covid_scan():
    assert learned_cases(('synthetic',), 'pseudo', SPLITS) == ()
    assert learned_cases(('synthetic', 'refined'), 'pseudo', SPLITS) == (MASKED, UNMASKED, UNMASKED)
    assert learned_cases(('targets',), 'human', SPLITS) == (MASKED,)


def test_refine_targets_averages_until_the_round_began_and_keeps_human_masks(tmp_path):
    calls = types.SimpleNamespace(count=0)

    def predict(image, lungs):
        calls.count += 1
        return image * lungs

    _, read = choose_targets('human_else_pseudo', SPLITS, pseudo_mask)
    np.save(tmp_path / 'b.npy', np.zeros((2, 4, 4)))  # of a training that was begun anew since
    for is_done, predictions in ((False, 1), (True, 1), (False, 2)):
        refined = refine_targets(
            SPLITS.train, read, predict, tmp_path, keep_human=True, is_done=is_done
        )
        np.testing.assert_allclose(refined(UNMASKED), 0.5, atol=1e-3)
        np.testing.assert_array_equal(refined(MASKED), 1)
        assert calls.count == predictions


def test_refined_round_learns_from_probabilities_that_are_not_lessened(monkeypatch, tmp_path):
    """At the lungs' border `predict.border_factor` is for predictions alone."""
    config = transunet.get_config('tiny')
    state = types.SimpleNamespace(step=4)
    parts = types.SimpleNamespace(mesh=None, network=None, make_state=lambda: state)
    for name in ('check_train_batch', 'choose_segmentation_step', '_make_evaluations'):
        monkeypatch.setattr(train, name, lambda *_: None)
    monkeypatch.setattr(train, 'build_segmentation', lambda _: parts)
    monkeypatch.setattr(train, '_plan_rounds', lambda _: [Round('refined', 4, 8)])
    monkeypatch.setattr(train, '_variables_of', lambda _: None)
    monkeypatch.setattr(train, 'make_predict', lambda *_: lambda _, slices: np.ones_like(slices))

    class Seen(Exception):
        pass

    def refine(cases, read_target, probability, *_, **__):
        raise Seen(probability(UNMASKED.image(), UNMASKED.lungs()))

    monkeypatch.setattr(train, 'refine_targets', refine)
    with pytest.raises(Seen) as seen:
        train.train_segmentation(config, SPLITS, pseudo_mask, tmp_path)
    np.testing.assert_array_equal(seen.value.args[0], 1.0)


@pytest.fixture
def seen(monkeypatch):
    """Volumes and whether the plateau is stepped, of each evaluation, which is left out."""
    found = []

    def make(*_):
        return lambda open_volumes, plateau, _: found.append((list(open_volumes()), plateau))

    monkeypatch.setattr(train, '_make_evaluation', make)
    return found


def make_evaluations(kinds, read_target=pseudo_mask, schedule='cosine', held_out=True):
    shape = (16, 32, 32)
    image, lungs = np.full(shape, 0.1, np.float16), np.ones(shape, np.uint8)
    healthy = types.SimpleNamespace(
        study_id='c', image=lambda: image, lungs=lambda: lungs,
        geometry=types.SimpleNamespace(voxel_ml=1.0),
    )  # fmt: skip
    sides = {'healthy_train': (healthy,), 'healthy_calibration': (healthy,) if held_out else ()}
    config = transunet.get_config('tiny').unlock()
    config.train.schedule = schedule
    splits = dataclasses.replace(SPLITS, **sides)
    return train._make_evaluations(config, None, splits, read_target, kinds)


@pytest.mark.parametrize('held_out', [True, False])
def test_rounds_of_painted_scans_are_validated_on_them_and_ask_for_no_pseudo_mask(seen, held_out):
    def refuse(case):
        raise AssertionError('a pseudo-mask was read')

    evaluations = make_evaluations({'synthetic'}, refuse, 'plateau', held_out)
    assert evaluations.keys() == {'synthetic'}
    evaluations['synthetic'](None)
    ((((painted, mask, lungs),), steps_plateau),) = seen
    assert steps_plateau
    assert lungs.all()
    assert 0 < mask.sum() < mask.size
    added = painted - np.float16(0.1)
    assert added.min() >= 0
    assert added[mask].mean() > 5 * added[~mask].mean()


def test_other_rounds_are_validated_on_their_targets_and_alone_step_the_plateau(seen):
    evaluations = make_evaluations({'synthetic', 'refined'}, schedule='plateau')
    for _ in range(2):
        evaluations['refined'](None)
    evaluations['synthetic'](None)
    *of_targets, (((_, painted_mask, _),), painted_steps_plateau) = seen
    assert [(volumes[0][1].max(), steps) for volumes, steps in of_targets] == [(0.2, True)] * 2
    assert (painted_mask.dtype, painted_steps_plateau) == (bool, False)


def test_target_of_a_training_scan_that_is_not_there_is_missed_before_the_first_round(seen):
    def read_one(case):
        if case is MASKED:
            raise InputError('run synthesize')
        return pseudo_mask(case)

    with pytest.raises(InputError, match='synthesize'):
        make_evaluations({'synthetic', 'refined'}, read_one)


def test_target_of_another_preparation_is_refused_before_the_first_round(seen):
    with pytest.raises(InputError, match=r'b has .3, 4, 4. voxels, its prepared scan .2, 4, 4.'):
        make_evaluations(
            {'refined'}, lambda case: np.zeros((2 + (case is UNMASKED), 4, 4), np.float16)
        )
