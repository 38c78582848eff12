"""What a training would take on a TPU: hours, money, and how well more chips serve, from what
`compile_check` says of its steps."""

from collections.abc import Mapping
from typing import Any


def estimate_training(programs: Mapping[str, Mapping[str, Any]]) -> dict[str, float] | None:
    """One stage's training on one topology, from its programs by name, of which those that train
    have 'steps', how many of the run's steps they are.

    Returns:
      hours of the training steps alone, without evaluation, saving and waiting for data, and
      samples_per_s_per_chip, of the batch's rows; None where a program does not fit.
    """
    steps = [each for each in programs.values() if each.get('steps')]
    if not steps or not all(each['fits'] for each in steps):
        return None
    seconds = sum(each['steps'] * each['ms'] / 1e3 for each in steps)
    samples = sum(each['steps'] * each['batch_size'] for each in steps)
    chips = steps[0]['devices']
    return {
        'chips': chips,
        'hours': round(seconds / 3600, 4),
        'samples_per_s_per_chip': round(samples / seconds / chips, 2),
    }


def estimate_costs(
    found: Mapping[str, Mapping[str, Mapping[str, Mapping[str, Any]]]], price_per_chip_hour: float
) -> list[dict[str, Any]]:
    """A row for each topology and stage of what was found, topology → stage → program.

    Beside those of `estimate_training` it has efficiency, the samples a second and chip over those
    of the first topology of the same kind of chip that is listed, and price, in the price's
    currency; None where there is none.
    """
    rows, first = [], {}
    for topology, stages in found.items():
        for stage, programs in stages.items():
            row = {'topology': topology, 'stage': stage, 'efficiency': None, 'price': None}
            costs = estimate_training(programs)
            if costs is not None:
                speed = costs['samples_per_s_per_chip']
                base = first.setdefault((topology.split(':')[0], stage), speed)
                row |= costs | {'efficiency': round(speed / base, 3)}
                if price_per_chip_hour > 0:
                    row['price'] = round(costs['hours'] * costs['chips'] * price_per_chip_hour, 2)
            rows.append(row)
    return rows
