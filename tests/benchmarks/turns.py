"""How the parts of a benchmark are timed beside each other."""

import time
from collections.abc import Callable


def take_turns(
    parts: dict[str, Callable[[], object]], repeats: int, rest_s: float = 0.0
) -> dict[str, list[float]]:
    """Seconds of each part; the first turn is not counted.

    `rest_s` is waited before each: a library's threads look for work for a while after its part, at
    the cost of the next one.
    """
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for turn in range(repeats + 1):
        for name, work in parts.items():
            time.sleep(rest_s)
            began = time.perf_counter()
            work()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds
