"""What the segmentation network learns from, round by round.

A round is a part of the training with its own targets: 'synthetic' is healthy scans with painted
opacities alone; 'targets' adds the COVID scans with their pseudo-masks or human masks; 'refined'
adds them too, each pseudo-mask averaged with what the network itself predicts at the round's start.
The GAN and a network that has seen painted opacities fail in different places: where they disagree
the mean is near one half, and `train.losses.doubtful` takes its weight.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from covseg_jax import atomic, hosts, mirror
from covseg_jax.errors import InputError
from covseg_jax.prepare.cases import Case, Splits

# case -> (D, H, W) lesion in [0, 1], or the published recipe's signed difference
ReadTarget = Callable[[Case], np.ndarray]

SOURCES = ('pseudo', 'human', 'human_else_pseudo')
ROUNDS = ('synthetic', 'targets', 'refined')


@dataclasses.dataclass(frozen=True)
class Round:
    """A round's kind, its first step and the step after its last."""

    kind: str
    start: int
    end: int


def plan_rounds(kinds: Sequence[str], shares: Sequence[float], num_steps: int) -> list[Round]:
    """Divides num_steps among rounds.

    Raises:
      InputError: an unknown kind, other than one positive share for each, or 'refined' first.
    """
    unknown = [kind for kind in kinds if kind not in ROUNDS]
    if unknown or not kinds or kinds[0] == 'refined':
        raise InputError(
            f'--config.train.rounds={tuple(kinds)}: must be some of {ROUNDS}, '
            "and not 'refined' first"
        )
    if len(shares) != len(kinds) or min(shares) <= 0:
        raise InputError(
            f'--config.train.round_shares={tuple(shares)}: must be one positive share for each of '
            f'the rounds {tuple(kinds)}'
        )
    ends = np.rint(num_steps * np.cumsum(shares) / sum(shares)).astype(int).tolist()
    return [Round(*each) for each in zip(kinds, [0, *ends[:-1]], ends, strict=True)]


def choose_targets(
    source: str, splits: Splits, read_pseudo_mask: ReadTarget
) -> tuple[Splits, ReadTarget]:
    """Which COVID scans train the network, and on what: with the source 'pseudo' all, on their
    pseudo-masks; with 'human' those with a human mask alone; with 'human_else_pseudo' all, on their
    human mask where there is one. Evaluation subjects never train.

    Raises:
      InputError: another source, or 'human' and no training subject has a mask.
    """
    if source not in SOURCES:
        raise InputError(f'train.targets={source!r} is not one of {", ".join(SOURCES)}')
    if source == 'pseudo':
        return splits, read_pseudo_mask
    if source == 'human':
        splits = dataclasses.replace(
            splits,
            train=tuple(c for c in splits.train if c.has_lesion_mask),
            validation=tuple(c for c in splits.validation if c.has_lesion_mask),
        )
        if not splits.train:
            raise InputError(
                "train.targets='human': no training subject has a lesion mask, all that have one "
                'are kept for evaluation; let data.evaluation_pattern match fewer of them'
            )

    def read_target(case: Case) -> np.ndarray:
        return case.lesion() if case.has_lesion_mask else read_pseudo_mask(case)

    return splits, read_target


def learns_from_covid(rounds: Sequence[str]) -> bool:
    """Whether some of the rounds of these kinds learns from COVID scans, not from painted healthy
    ones alone."""
    return set(rounds) != {'synthetic'}


def learned_cases(rounds: Sequence[str], source: str, splits: Splits) -> tuple[Case, ...]:
    """The COVID cases of training and validation that rounds of these kinds see, with targets from
    this source."""
    if not learns_from_covid(rounds):
        return ()
    covid = splits.train + splits.validation
    return human_mask_cases(source, splits) if source == 'human' else covid


def human_mask_cases(source: str, splits: Splits) -> tuple[Case, ...]:
    """The cases of training and validation whose target is a human mask, by `choose_targets`."""
    if source == 'pseudo':
        return ()
    return tuple(case for case in splits.train + splits.validation if case.has_lesion_mask)


def refine_targets(
    cases: Sequence[Case],
    read_target: ReadTarget,
    predict: Callable[[np.ndarray, np.ndarray], np.ndarray],
    folder: pathlib.Path,
    *,
    keep_human: bool,
    is_done: bool,
) -> ReadTarget:
    """Writes the mean of each case's target and the network's prediction to `folder`, as
    `<study_id>.npy`, float16 (D, H, W), and returns what reads them. With `keep_human` human masks
    stay as they are. With `is_done` what is there is kept: the round that learns from it has begun,
    and the network is no more what it was before.
    """
    for case in hosts.share(cases):
        path = folder / f'{case.study_id}.npy'
        if is_done and path.exists():
            continue
        target = np.asarray(read_target(case), np.float32)
        if not (keep_human and case.has_lesion_mask):
            target = (target + predict(np.asarray(case.image()), np.asarray(case.lungs()))) / 2
        with atomic.new_file(path) as temporary:
            np.save(temporary, target.astype(np.float16))
    hosts.wait_for_all(f'{folder.name} is refined')
    mirror.share()
    return lambda case: np.load(folder / f'{case.study_id}.npy', mmap_mode='r')
