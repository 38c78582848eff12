"""Runs over several hosts, all with the same command; on one host nothing of this does anything.

All hosts see the same work directory, or `mirror.share` gives each what the others wrote. Each
takes its share of the studies, and what each found is gathered; only host 0 writes the files of the
whole run.
"""

import importlib.util
import json
import os
import pathlib
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from covseg_jax.errors import InputError, one_line

_Made = TypeVar('_Made')

_num_hosts, _index = 1, 0
_last_step = 0  # that `reached_stop` was asked for


def connect(settings: Mapping[str, Any]) -> None:
    """Joins the hosts of this run; to be called before JAX computes anything.

    `settings` holds coordinator ('' or host:port), num_processes and process_id. On a Cloud TPU VM
    all three are found without them; elsewhere '' means one host.

    Raises:
      InputError: they do not find each other.
    """
    global _num_hosts, _index
    if settings['coordinator']:
        found = {
            'coordinator_address': settings['coordinator'],
            'num_processes': settings['num_processes'],
            'process_id': settings['process_id'],
        }
    elif _is_tpu_vm():
        found = {}
    else:
        return
    import jax

    try:
        jax.distributed.initialize(**found)
    except (RuntimeError, ValueError) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f'distributed.coordinator={settings["coordinator"]!r}: the hosts do not find each '
            f'other ({line}); give all of them the same coordinator and num_processes, and each '
            'its own process_id'
        ) from error
    _num_hosts, _index = jax.process_count(), jax.process_index()
    if _num_hosts == 1:  # JAX took SIGTERM for what several hosts agree on, see `reached_stop`
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _is_tpu_vm() -> bool:
    devices = pathlib.Path('/dev/accel0'), pathlib.Path('/dev/vfio/0')
    return importlib.util.find_spec('libtpu') is not None and any(d.exists() for d in devices)


def count() -> int:
    """How many hosts there are."""
    return _num_hosts


def index() -> int:
    """Which of them this is, from 0."""
    return _index


def is_first() -> bool:
    """True on the host that writes the run's own files."""
    return _index == 0


def share(items: Sequence) -> list:
    """This host's part of what all of them are to do: every n-th."""
    return list(items[_index::_num_hosts])


def gather(found: list, total: int) -> list:
    """One entry for each of `total` items, in their order, from those that each host found for its
    `share` of them: JSON values, and NumPy's numbers."""
    parts = _tell_all(found)
    return [parts[item % _num_hosts][item // _num_hosts] for item in range(total)]


def check_shared(check: Callable[[Any], None], items: Sequence) -> None:
    """Each host checks its share of the items; all call it.

    Raises:
      InputError: on all hosts, with the message of the first item whose check raised one on any.
    """
    faults = []
    for item in share(items):
        try:
            faults.append(check(item))
        except InputError as error:
            faults.append(one_line(error))
    for fault in filter(None, gather(faults, len(items))):
        raise InputError(fault)


def on_each(work: Callable[[], _Made]) -> _Made:
    """What the work gives on this host; all call it, and each does it.

    Raises:
      InputError: on all hosts, where it raises one on any.
    """
    made = []
    check_shared(lambda _: made.append(work()), range(_num_hosts))
    return made[0]


def ask_all_to_stop() -> None:
    """On several hosts: has `reached_stop` say so, as SIGTERM does that comes from outside."""
    os.kill(os.getpid(), signal.SIGTERM)


def reached_stop(step: int) -> bool:
    """True on all hosts at one and the same step, soon after any of them got SIGTERM, by JAX's
    preemption service; on one host always False. Nothing waits for it.

    All hosts call it for every step of a loop, in order, and wait for each other before the first.
    """
    global _last_step
    if _num_hosts == 1:
        return False
    from jax.experimental.multihost_utils import reached_preemption_sync_point as is_chosen

    # JAX chooses the number after the last one that it was asked for when the signal came. If that
    # was before this loop, whose numbers may begin anywhere, none of them need be it.
    came_before = step not in (_last_step, _last_step + 1) and is_chosen(_last_step + 1)
    _last_step = step
    return is_chosen(step) or came_before


def wait_for_all(what: str) -> None:
    """Returns once every host has come here; `what` is the same on all and names the place."""
    first_decides(lambda: None, what)


def first_alone(work: Callable[[], Any], what: str) -> None:
    """Host 0 does the work, and all go on once it is done.

    Raises:
      InputError: as `first_decides`: where the work fails, it ends all hosts.
    """

    def do() -> None:
        work()

    first_decides(do, what)


def first_decides(decide: Callable[[], Any], what: str) -> Any:
    """What `decide` returns on host 0, a JSON value, on all of them.

    `what` is the same on all and names the place. All hosts call it, and wait for the others.

    Raises:
      InputError: on the other hosts, with host 0's message, where `decide` fails there; host 0
        raises what it raised.
    """
    if _num_hosts == 1:
        return decide()
    told, error = {'what': what}, None
    if is_first():
        try:
            told['answer'] = decide()
        except BaseException as caught:  # Ctrl-C too: the others would wait for ever
            told['fault'], error = one_line(caught), caught
    told = _tell_all(told)[0]
    if error is not None:
        raise error
    if told['what'] != what:
        raise RuntimeError(f'hosts are at different places: {told["what"]!r} and {what!r}')
    if 'fault' in told:
        raise InputError(told['fault'])
    return told['answer']


def _tell_all(value: Any) -> list:
    """The JSON values of all hosts, in the hosts' order, on all of them."""
    if _num_hosts == 1:
        return [value]
    from jax.experimental.multihost_utils import process_allgather

    text = json.dumps(value, default=lambda number: number.item())  # NumPy's numbers
    content = np.frombuffer(text.encode(), np.uint8)
    lengths = process_allgather(np.array(len(content)))
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: len(content)] = content
    rows = process_allgather(padded)
    return [json.loads(row[:n].tobytes()) for row, n in zip(rows, lengths, strict=True)]
