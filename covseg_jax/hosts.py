"""Runs over several hosts, all with the same command; on one host nothing of this does anything.

All hosts see the same work directory. Whole studies are shared out, and what each found of its own
is gathered; files of the whole run are the first host's to write.
"""

import importlib.util
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from covseg_jax.errors import InputError, one_line

_num_hosts, _index = 1, 0


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


def wait_for_all(what: str) -> None:
    """Returns once every host has come here; `what` is the same on all and names the place."""
    if _num_hosts > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)


def is_any(flag: bool) -> bool:
    """True on all hosts where it is true on one; all call it."""
    if _num_hosts == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def gather(found: list, total: int) -> list:
    """One entry for each of `total` items, in their order, from those that each host found for what
    `share` gave it: JSON values, and NumPy's numbers."""
    if _num_hosts == 1:
        return found
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(found, default=_plain).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array(len(text)))
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: len(text)] = text
    texts = multihost_utils.process_allgather(padded)
    parts = [json.loads(row[:n].tobytes()) for row, n in zip(texts, lengths, strict=True)]
    return [parts[item % _num_hosts][item // _num_hosts] for item in range(total)]


def _plain(number: Any) -> Any:
    return number.item()


def first_decides(decide: Callable[[], Any], what: str) -> Any:
    """What `decide` says on the first host, a JSON value, on all of them.

    `what` is the same on all and names the place. All hosts call it, and wait for the first.

    Raises:
      InputError: on the other hosts, with the first one's message, where `decide` fails there; the
        first host raises what it raised.
    """
    if _num_hosts == 1:
        return decide()
    told, error = None, None
    if is_first():
        try:
            told = {'what': what, 'answer': decide()}
        except BaseException as caught:  # Ctrl-C too: the others would wait for ever
            told, error = {'what': what, 'fault': one_line(caught)}, caught
    told = _tell(told)
    if error is not None:
        raise error
    if told['what'] != what:
        raise RuntimeError(f'hosts are at different places: {told["what"]!r} and {what!r}')
    if 'fault' in told:
        raise InputError(told['fault'])
    return told['answer']


def _tell(value: Any) -> Any:
    """The first host's JSON value, on all hosts."""
    from jax.experimental import multihost_utils

    text = json.dumps(value).encode() if is_first() else b''
    length = int(multihost_utils.broadcast_one_to_all(np.array(len(text), np.int32)))
    padded = np.zeros(length, np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())


def first_alone(work: Callable[[], Any], what: str) -> None:
    """The first host does it, and all go on once it is done.

    Raises:
      InputError: as `first_decides`: where it fails, it ends all hosts.
    """

    def do() -> None:
        work()

    first_decides(do, what)
