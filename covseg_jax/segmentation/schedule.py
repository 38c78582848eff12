"""Which losses a step of the segmentation network's training minimises."""

from collections.abc import Callable

import ml_collections

from covseg_jax.errors import InputError

CONTRASTIVE = ('contrastive',)
MSE = ('mse',)
SEGMENTATION = ('mse', 'sensitivity')
COMBINED = CONTRASTIVE + SEGMENTATION


def terms_by_step(train: ml_collections.ConfigDict) -> Callable[[int], tuple[str, ...]]:
    """Step number, from 0 -> the losses that it minimises, those of a config's group `train` that
    have a weight: method.md section 4's two-phase epoch, one sum, or the published schedule.

    Raises:
      InputError: the mode does not exist, some step has no loss with a weight, or none has one of
        SEGMENTATION: the network would learn to mark nothing.
    """
    phases = {name: train[name] for name in ('num_epochs', 'epoch_steps', 'contrastive_steps')}
    modes = {
        'two_phase': lambda step: (
            CONTRASTIVE
            if step % phases['epoch_steps'] < phases['contrastive_steps']
            else SEGMENTATION
        ),
        'combined': lambda step: COMBINED,
        'published': lambda step: published_terms(step, **phases),
    }
    if train.mode not in modes:
        raise InputError(f'train.mode={train.mode!r} is not one of {", ".join(map(repr, modes))}')
    all_terms_at, weights = modes[train.mode], train.losses.to_dict()
    found = list(dict.fromkeys(map(all_terms_at, range(train.num_steps))))
    for terms in found:
        if not any(weights[name] for name in terms):
            raise InputError(
                f'train.mode={train.mode!r}: steps that minimise {", ".join(terms)} and no other '
                f'loss have nothing to learn from, for no weight is above 0; {_remedy(terms)}'
            )
    if not any(weights[name] for terms in found for name in terms if name in SEGMENTATION):
        raise InputError(
            f'train.mode={train.mode!r}: none of {train.num_steps} steps minimises '
            f'{" or ".join(SEGMENTATION)}, so the network would not learn to mark lesions; give '
            'one of --config.train.losses.mse and sensitivity a weight, or '
            '--config.train.num_steps more than train.contrastive_steps'
        )
    return lambda step: tuple(name for name in all_terms_at(step) if weights[name])


def _remedy(terms: tuple[str, ...]) -> str:
    give = f'give --config.train.losses.{terms[-1]} a weight'
    return f'{give}, or take --config.train.mode=combined' if terms == CONTRASTIVE else give


def published_terms(
    step: int, *, num_epochs: int, epoch_steps: int, contrastive_steps: int
) -> tuple[str, ...]:
    """The losses of a step (from 0) of the published schedule, method.md section 3: `num_epochs`
    epochs of `epoch_steps` steps, the first `contrastive_steps` of each contrastive and the others
    MSE; from then on the sum of all three losses. Published: 100 epochs of 2 contrastive and 1 MSE
    step."""
    if step >= num_epochs * epoch_steps:
        return COMBINED
    return CONTRASTIVE if step % epoch_steps < contrastive_steps else MSE
