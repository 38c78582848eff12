"""Which losses a step minimises."""

from collections import Counter

import pytest

from configs import transunet
from covseg_jax.errors import InputError
from covseg_jax.segmentation import schedule


def test_published_schedule_is_a_hundred_small_epochs_and_then_the_sum():
    published = transunet.get_config('published').train
    phases = {name: published[name] for name in ('num_epochs', 'epoch_steps', 'contrastive_steps')}
    terms = [schedule.published_terms(step, **phases) for step in range(published.num_steps)]
    contrastive, mse, combined = ('contrastive',), ('mse',), ('contrastive', 'mse', 'sensitivity')
    assert terms[:7] == [contrastive, contrastive, mse] * 2 + [contrastive]
    assert terms[297:302] == [contrastive, contrastive, mse, combined, combined]
    assert Counter(terms) == {contrastive: 200, mse: 100, combined: 1000}


def losses_of(mode, **changes):
    train = transunet.get_config('phantom_gan').train.unlock()
    train.update(mode=mode, num_steps=40, num_epochs=2, epoch_steps=10, contrastive_steps=2)
    train.losses.update(contrastive=0.1, mse=1.0, sensitivity=1.0)
    train.update_from_flattened_dict(changes)
    terms_at = schedule.terms_by_step(train)
    return Counter(map(terms_at, range(40)))


def test_losses_without_weight_are_left_out_of_every_step():
    whole, pixels = ('contrastive', 'mse', 'sensitivity'), ('mse', 'sensitivity')
    assert losses_of('combined') == {whole: 40}
    assert losses_of('combined', **{'losses.contrastive': 0.0}) == {pixels: 40}
    assert losses_of('two_phase') == {('contrastive',): 8, pixels: 32}
    assert losses_of('two_phase', **{'losses.mse': 0.0}) == {
        ('contrastive',): 8,
        ('sensitivity',): 32,
    }
    assert losses_of('published', **{'losses.sensitivity': 0.0}) == {
        ('contrastive',): 4,
        ('mse',): 16,
        ('contrastive', 'mse'): 20,
    }


@pytest.mark.parametrize(
    ('mode', 'without', 'message'),
    [
        ('two_phase', ['contrastive'], r'minimise contrastive and no .*train\.mode=combined'),
        ('two_phase', ['mse', 'sensitivity'], r'mse, sensitivity and no .*sensitivity a weight$'),
        ('published', ['mse'], r'minimise mse and no .*losses\.mse a weight$'),
        (
            'combined',
            ['contrastive', 'mse', 'sensitivity'],
            r'contrastive, mse, sensitivity and no',
        ),
    ],
)
def test_a_step_whose_losses_have_no_weight_is_refused(mode, without, message):
    with pytest.raises(InputError, match=message):
        losses_of(mode, **{f'losses.{name}': 0.0 for name in without})
    if without == ['contrastive']:  # without such steps there is nothing to refuse
        losses_of(mode, **{'losses.contrastive': 0.0, 'contrastive_steps': 0})


def test_another_mode_is_refused():
    with pytest.raises(InputError, match=r"train\.mode='three_phase' is not one of"):
        losses_of('three_phase')
