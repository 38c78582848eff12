"""Folders in buckets as folders on this host's disk, where all work is done.

`bucket.fetch` brings what lies below a gs:// URL. `opened` mirrors a folder that this program
writes: it brings what the bucket has, and `Mirror.push` takes there what changed since. Whenever a
push is cut off, it is in the bucket as a whole or not at all, though only single objects are:

1. The list, `.covseg_jax_bucket.json`, names what is about to come, with sizes and checksums.
2. New objects get their names; the contents of those that are replaced lie in
   `.covseg_jax_bucket/`.
3. The list names the new state, in one write: this makes the push valid.
4. Contents move to their names, and objects that are removed go.

Whoever opens the folder next takes back what was cut off before 3, and ends what was cut off after.
Hosts have disks of their own then: `share` gives each what the others wrote.
"""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

from covseg_jax import hosts
from covseg_jax.bucket import (
    ABSENT,
    LIST,
    STAGED,
    Bucket,
    LocalFolder,
    Note,
    Stored,
    crc32c,
    fetch,
    is_mirrored,
    run_all,
)
from covseg_jax.errors import InputError, one_line


class Mirror:
    """A folder that this program writes in a bucket, and its mirror on this host.

    Its methods raise an InputError where the bucket cannot be used, or holds what this program did
    not write.
    """

    def __init__(self, url: str):
        self.url, self.local, self._bucket = url, LocalFolder(url), Bucket(url)
        self._stored: dict[str, Stored] = {}  # the bucket's objects
        self._notes: dict[str, Note] = {}  # of those that the list names

    def begin(self) -> None:
        """Makes the mirror what the bucket holds; all hosts call it. Files stay as they are where
        an earlier process of this host changed them, and nobody the bucket since: of several hosts
        each has then what the others kept so."""
        before = hosts.first_decides(self.end_push, 'what was cut off is ended')
        _as_one(lambda: self._pull(before), together=True)
        if hosts.count() > 1:
            self.push(together=True)

    def _pull(self, before: int | None = None) -> None:
        """Brings what the bucket has; `before` is the list's generation at the start."""
        self._read_list()
        is_start = before is not None
        # Nobody changed the bucket since this host knew it.
        is_ahead = is_start and self.local.read_record() == before != ABSENT
        wanted = {}
        for name, note in self._notes.items():
            found = self.local.describe(name)
            if found is not None and found['crc32c'] == note['crc32c']:
                self.local.keep(name, found)
            elif found is None or not is_ahead:
                wanted[name] = self._stored[name]
            else:
                self.local.forget([name])
        if not is_ahead:
            own = self.local.names() if is_start else self.local.known_names()
            self.local.remove([name for name in own if name not in self._notes])
        self.local.fetch(self._bucket, wanted)
        self._write_record()

    def push(self, *, together: bool = False) -> None:
        """Takes to the bucket what changed here. `together`: all hosts call it, and afterwards each
        has what all of them changed."""
        changed = self._find_changes()
        own = {name: _content(note) for name, note in changed.items()}
        plan = {'changed': own, 'removed': self.local.find_removed()}
        plans = [plan]
        if together and hosts.count() > 1:
            # Host 0 alone knows what it pushed alone.
            notes = self._notes if hosts.is_first() else None
            plans = hosts.gather([plan | {'notes': notes}], hosts.count())
            self._notes = plans[0]['notes']
        coming, owners, going = self._merge(plans)
        if coming or going:
            me, is_writer = hosts.index() if together else 0, hosts.is_first() or not together
            content = {'files': self._notes, 'coming': coming}
            _as_one(lambda: self._write_list(content) if is_writer else None, together)
            mine = {name: note for name, note in coming.items() if owners[name] == me}
            parts = _as_one(lambda: self._upload(mine), together)
            arrived = {name: coming[name] for part in parts for name in part}
            kept = {name: note for name, note in self._notes.items() if name not in going}
            moving = sorted(arrived.keys() & self._notes.keys())
            content = {'files': kept | arrived, 'moving': moving, 'going': going}
            for name in mine.keys() & arrived.keys():
                self.local.keep(name, changed[name])
            self.local.forget(plan['removed'])
            _as_one(lambda: self._commit(content, together) if is_writer else None, together)
        if together and hosts.count() > 1:
            _as_one(self._pull, together)

    def _find_changes(self) -> dict[str, Note]:
        changed = {}
        for name in self.local.names():
            note = self.local.describe(name)
            if note is not None and _content(note) == self._notes.get(name):
                self.local.keep(name, note)
            elif note is not None:  # else it went meanwhile
                changed[name] = note
        return changed

    def _merge(self, plans: list[dict]) -> tuple[dict[str, Note], dict[str, int], dict[str, Note]]:
        """What comes, which host brings it, and what goes."""
        coming: dict[str, Note] = {}
        owners: dict[str, int] = {}
        for host, plan in enumerate(plans):
            for name, note in plan['changed'].items():
                if coming.setdefault(name, note) is note:
                    owners[name] = host
        removed = {name for plan in plans for name in plan['removed']} - coming.keys()
        return coming, owners, {n: self._notes[n] for n in sorted(removed & self._notes.keys())}

    def _upload(self, notes: dict[str, Note]) -> list[str]:
        """Uploads files; returns those that still were as noted. The others come with the next
        push."""

        def upload(name: str, note: Note) -> bool:
            key = STAGED + name if name in self._notes else name
            try:
                with (self.local.folder / name).open('rb') as file:
                    if crc32c(file, note['bytes']) != note['crc32c']:
                        return False
                    file.seek(0)
                    self._stored[key] = self._bucket.upload(key, file, note['bytes'])
            except FileNotFoundError:
                return False
            return True

        # Manifests last: who looks into the bucket sees a stage as done when it is all there.
        jobs = sorted(notes.items(), key=lambda item: item[0].startswith('manifests/'))
        done = run_all(upload, jobs, 'upload')
        return [name for (name, _), is_done in zip(jobs, done, strict=True) if is_done]

    def _commit(self, content: dict, together: bool) -> None:
        self._write_list(content)
        self._notes = content['files']
        if together and hosts.count() > 1:
            self._stored = self._bucket.list()  # with what the others brought
        self._settle(content)

    def push_rest(self) -> None:
        """Takes what is left to the bucket where a run failed, maybe in a push, unless another run
        has begun there."""
        stored = self._bucket.find(LIST)
        if (stored.generation if stored else ABSENT) != self._generation():
            raise InputError(f'{self.url}: another run works there')
        self.end_push()
        self.push()

    def end_push(self) -> int:
        """Takes back what a push had brought that was cut off before it was valid, and ends one
        that was valid. Returns the generation of the list before that."""
        self._stored = self._bucket.list()
        content, before = self._load_list(), self._generation()
        self._settle(content)
        if content.get('coming'):
            self._write_list({'files': content['files']})
        self._notes = content['files']
        return before

    def _settle(self, content: dict) -> None:
        """What a list says that is still to be done with objects."""
        unwanted = [(name, note) for name, note in content.get('going', {}).items()]
        for name, note in content.get('coming', {}).items():
            unwanted.append((STAGED + name, note))
            if name not in content['files']:
                unwanted.append((name, note))
        found = [n for n, note in unwanted if n in self._stored and self._stored[n].has(note)]
        run_all(self._remove_object, [(name,) for name in found], 'clean')
        moving = [n for n in content.get('moving', ()) if STAGED + n in self._stored]
        run_all(self._move_object, [(name,) for name in moving], 'move')

    def _remove_object(self, name: str) -> None:
        self._bucket.remove(name, self._stored.pop(name))

    def _move_object(self, name: str) -> None:
        generation = self._stored[name].generation if name in self._stored else ABSENT
        self._stored[name] = self._bucket.copy(STAGED + name, name, generation)
        self._remove_object(STAGED + name)

    def _read_list(self) -> None:
        """Reads the list, and checks each object against it. What somebody removed is gone."""
        self._stored = self._bucket.list()
        files = self._load_list()['files']
        self._notes = {name: note for name, note in files.items() if name in self._stored}
        for name, note in self._notes.items():
            if not self._stored[name].has(note):
                raise InputError(
                    f'{self.url}/{name}: is damaged, or somebody wrote over it: its size or '
                    f'checksum is not the one in {LIST}; restore it, or remove it (of a checkpoint '
                    'or a prepared study the whole folder), and run the same command again'
                )

    def _load_list(self) -> dict:
        if LIST not in self._stored:
            if self._stored:
                raise InputError(
                    f'{self.url}/{min(self._stored)}: is in the way, for this program did not '
                    f'begin this folder (it has no {LIST}); name another one'
                )
            return {'files': {}}
        try:
            return json.loads(self._bucket.read(LIST, self._stored[LIST]))
        except ValueError as error:
            raise InputError(
                f'{self.url}/{LIST}: is damaged: it is not JSON; restore it (`gcloud storage '
                'restore`), or name another folder'
            ) from error

    def _write_list(self, content: dict) -> None:
        text = json.dumps(content, indent=0)
        self._stored[LIST] = self._bucket.write(LIST, text.encode(), self._generation())
        self._write_record()

    def _write_record(self) -> None:
        self.local.write_record(self._generation())

    def _generation(self) -> int:
        return self._stored[LIST].generation if LIST in self._stored else ABSENT


def look(url: str, is_wanted: Callable[[str], bool]) -> None:
    """Brings the chosen files of a folder that a run, maybe elsewhere, is writing; changes nothing
    in the bucket, and nothing here where this host knows as much."""
    bucket, local = Bucket(url), LocalFolder(url)
    with local.locked() as is_free:
        stored = bucket.list() if is_free else {}
        generation = local.read_record()
        if LIST in stored and stored[LIST].generation != generation:
            chosen = {n: each for n, each in stored.items() if is_mirrored(n) and is_wanted(n)}
            local.fetch(bucket, {n: s for n, s in chosen.items() if not local.has(n, s.crc32c)})
            local.remove(n for n in local.known_names() if is_wanted(n) and n not in stored)
            local.write_record(generation)


def fetch_on_all(url: str) -> None:
    """`bucket.fetch`, on every host; all call it."""
    _as_one(lambda: fetch(url) and None, together=True)


_workdir: Mirror | None = None
_pushing: futures.Future | None = None
_thread = futures.ThreadPoolExecutor(1)


@contextlib.contextmanager
def opened(url: str, *, is_workdir: bool = False) -> Iterator[None]:
    """Mirrors a folder in a bucket for as long as the block runs, and takes what is new there to
    the bucket when it ends, be it well or not.

    Raises:
      InputError: the folder is another process's, or not this program's; or it cannot be used.
    """
    global _workdir
    mirror = Mirror(url)
    with mirror.local.locked() as is_free:
        _as_one(lambda: None if is_free else _refuse_taken(url), together=True)
        mirror.begin()
        _workdir = mirror if is_workdir else _workdir
        try:
            yield
        except BaseException:
            # Other hosts may be anywhere, and what they had done whole is in the bucket.
            if hosts.is_first():
                try:
                    with contextlib.suppress(Exception):  # it is what ends the run
                        join()
                    mirror.push_rest()
                except (InputError, OSError) as error:
                    print(
                        f'note: {one_line(error)}; what is new is in {mirror.local.folder}',
                        file=sys.stderr,
                    )
            raise
        else:
            join()
            mirror.push(together=True)
        finally:
            _workdir = None if is_workdir else _workdir


def _refuse_taken(url: str) -> None:
    raise InputError(
        f'{url}: another run on this host works there; wait for its end, or name another folder '
        '(hosts of one run that share a disk need a --bucket_cache each)'
    )


def is_apart() -> bool:
    """Whether the hosts have each a work directory of their own."""
    return _workdir is not None and hosts.count() > 1


def push() -> None:
    """Takes to the bucket what changed in the work directory, where it is in one; all hosts call
    it, and then have what the others wrote."""
    join()
    if _workdir is not None:
        _workdir.push(together=True)


def share() -> None:
    """After it all hosts have what each wrote into the work directory, on a shared disk or not."""
    if is_apart():
        push()


def push_after(wait: Callable[[], None]) -> None:
    """Takes to the bucket what changed in the work directory, once `wait` returns, while this
    thread goes on. `join` comes before the next."""
    global _pushing
    if _workdir is not None and hosts.is_first():
        mirror = _workdir

        def work() -> None:
            wait()
            mirror.push()

        _pushing = _thread.submit(work)


def join() -> None:
    """Waits for `push_after`, and raises what it raised."""
    global _pushing
    pushing, _pushing = _pushing, None
    if pushing is not None:
        pushing.result()


def _as_one(work: Callable[[], Any], together: bool) -> list:
    """Does the work, on all hosts if `together`; what it gave on each, JSON values.

    Raises:
      InputError: on all hosts where it fails on one.
    """
    if not together or hosts.count() == 1:
        return [work()]
    try:
        told = [work(), None]
    except (InputError, OSError) as error:
        told = [None, one_line(error)]
    told = hosts.gather([told], hosts.count())
    for _, fault in told:
        if fault:
            raise InputError(fault)
    return [each for each, _ in told]


def _content(note: Note) -> Note:
    return {'bytes': note['bytes'], 'crc32c': note['crc32c']}
