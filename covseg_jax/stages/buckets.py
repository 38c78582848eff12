"""Which of the paths in a command lie in buckets, and their folders on this host."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

from covseg_jax import bucket, hosts, mirror
from covseg_jax.errors import InputError
from covseg_jax.stages.inputs import Config
from covseg_jax.stages.on_request import STOPPED
from covseg_jax.stages.pipeline import PIPELINE

_READ = ('input', 'reference', 'model')  # flags
_ON_A_DISK = ('data.prepared', 'data.pseudo_masks', 'prepare.lung_network', 'train.init')
_READ_DATA = {*PIPELINE, 'verify', 'pseudo_masks'}  # the stages that look at data.folder
_SHOWN_BY_STATUS = ('manifests/', 'config.json', 'metrics.jsonl', STOPPED)


def local_paths(text: str | None) -> str | None:
    """A flag's paths, one or several with commas between them, as they are on this host."""
    if not text or bucket.SCHEME not in text:
        return text
    return ','.join(str(bucket.local_path(part)) for part in text.split(','))


@contextlib.contextmanager
def opened(
    config: Config | None, workdir: str, names: Sequence[str], given: Mapping[str, str | None]
) -> Iterator[None]:
    """Brings what the stages read from buckets, and mirrors what they write to buckets for as long
    as the block runs. All hosts call it.

    Args:
      config: the config, if there is one.
      workdir: the work directory, as a person named it; '' without one.
      names: the stages.
      given: the command's flags, as a person gave them.

    Raises:
      InputError: a bucket cannot be used, or must not be where it is named.
    """
    _refuse(config, given)
    for url in _urls_to_fetch(config, names, given):
        mirror.fetch_on_all(url)
    with contextlib.ExitStack() as stack:
        is_alone = given['model'] or list(names) == ['compare']
        if bucket.is_url(workdir) and list(names) == ['status']:
            mirror.look(workdir, _is_shown_by_status)
        elif bucket.is_url(workdir) and not is_alone:
            print(f'{workdir}: on this host in {bucket.local_path(workdir)}')
            stack.enter_context(mirror.opened(workdir, is_workdir=True))
        if bucket.is_url(given['output']):
            print(f'{given["output"]}: on this host in {bucket.local_path(given["output"])}')
            stack.enter_context(mirror.opened(given['output']))
        yield


def _refuse(config: Config | None, given: Mapping[str, str | None]) -> None:
    # Its record of what is the program's, see `written`, would be another on each host.
    if bucket.is_url(given['output']) and hosts.count() > 1:
        raise InputError(
            f'--output={given["output"]}: several hosts write into a folder on a disk that they '
            'share, not into a bucket; name such a folder, or use one host'
        )
    if config is None:
        return
    for name in _ON_A_DISK:
        group, field = name.split('.')
        if any(map(bucket.is_url, config[group][field].split(','))):
            raise InputError(
                f'{name}={config[group][field]!r}: is in a bucket, and this must be on a disk; '
                'copy it to one'
            )
    if config.phantom.make and bucket.is_url(config.data.folder):
        raise InputError(
            f'data.folder={config.data.folder!r}: phantoms are not made in a bucket; leave it '
            "empty ('') to make them in the work directory"
        )


def _urls_to_fetch(
    config: Config | None, names: Sequence[str], given: Mapping[str, str | None]
) -> list[str]:
    found = [part for flag in _READ for part in (given[flag] or '').split(',')]
    if config is not None and not given['input'] and not _READ_DATA.isdisjoint(names):
        found.append(config.data.folder)
    return [each for each in found if bucket.is_url(each)]


def _is_shown_by_status(name: str) -> bool:
    return name.startswith(_SHOWN_BY_STATUS) or name.endswith(_SHOWN_BY_STATUS)
