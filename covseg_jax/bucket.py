"""Objects in Google Cloud Storage: those below one gs:// URL, and the local folder that stands for
them.

Google's own client moves them: it tries again, checks what it moves by CRC-32C, and writes or
removes an object only in the generation that is named. What a person can mend is an InputError.
"""

import base64
import contextlib
import fcntl
import io
import json
import os
import pathlib
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from typing import Any, BinaryIO, NamedTuple

from tqdm import tqdm

from covseg_jax import atomic
from covseg_jax.errors import GO_ON, InputError

SCHEME = 'gs://'
ABSENT = 0  # the generation of an object that is not there
# A folder that this program writes has these two, see `mirror`.
LIST = '.covseg_jax_bucket.json'
STAGED = '.covseg_jax_bucket/'
# What XLA compiled is for this machine, and the rest is being written.
_NOT_MIRRORED = ('compile_cache', '.tmp-', '.old-', '.covseg_jax_bucket')
_BEING_WRITTEN = '.orbax-checkpoint-tmp'
_THREADS = 8  # requests at a time: the client keeps ten connections
_CHUNK = 1 << 20
_cache = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache') / 'covseg_jax' / 'buckets'


Note = dict[str, Any]  # bytes and crc32c of a file


class Stored(NamedTuple):
    """What an object holds, and which of its generations that is."""

    bytes: int
    crc32c: str  # in base64, as the service has it
    generation: int

    def has(self, note: dict[str, Any]) -> bool:
        """Whether size and checksum are those noted."""
        return (self.bytes, self.crc32c) == (note['bytes'], note['crc32c'])


def is_url(text: object) -> bool:
    """Whether what a person named lies in a bucket."""
    return str(text or '').startswith(SCHEME)


def use_cache(folder: str) -> None:
    """Local folders for buckets lie in this one from now on."""
    global _cache
    _cache = pathlib.Path(folder)


def local_path(text: str) -> pathlib.Path:
    """Where on this host is what a person named: of a gs:// URL the folder that stands for it.

    Raises:
      InputError: the URL is not one of a folder in a bucket.
    """
    return own_folder(text) / _parts(text)[-1] if is_url(text) else pathlib.Path(text)


def own_folder(url: str) -> pathlib.Path:
    """The folder around `local_path` of a URL; nothing else lies in it."""
    return _cache.expanduser().absolute() / urllib.parse.quote('/'.join(_parts(url)), safe='')


def _parts(url: str) -> list[str]:
    parts = url.removeprefix(SCHEME).rstrip('/').split('/')
    if len(parts) < 2 or any(part in ('', '.', '..') for part in parts):
        raise InputError(f'{url}: is not a folder in a bucket; name it as gs://BUCKET/FOLDER')
    return parts


def crc32c(file: BinaryIO, size: int) -> str:
    """The checksum of the next `size` bytes of a file, as the service has it."""
    import google_crc32c

    found = google_crc32c.Checksum()
    while size > 0 and (chunk := file.read(min(size, _CHUNK))):
        found.update(chunk)
        size -= len(chunk)
    return base64.b64encode(found.digest()).decode()


class Bucket:
    """The objects below a URL, by their names relative to it; '' is the one that the URL names.

    Its methods raise an InputError where credentials, permission, the bucket or the connection is
    missing, or an object is not as it was named.
    """

    def __init__(self, url: str):
        self.url = SCHEME + '/'.join(_parts(url))
        bucket, *parts = _parts(url)
        self._key = '/'.join(parts)
        with self._explained():
            from google.cloud import storage

            self._bucket = storage.Client(project=None).bucket(bucket)

    def list(self) -> dict[str, Stored]:
        """All objects below the URL."""
        fields = 'items(name,size,crc32c,generation),nextPageToken'
        with self._explained():
            found = list(self._bucket.list_blobs(prefix=f'{self._key}/', fields=fields))
        # Consoles make an object whose name ends with a slash for an empty folder.
        return {
            blob.name.removeprefix(f'{self._key}/'): _describe(blob)
            for blob in found
            if not blob.name.endswith('/')
        }

    def find(self, name: str) -> Stored | None:
        """One object, or None."""
        with self._explained(name):
            blob = self._bucket.get_blob(self._key_of(name))
            return blob and _describe(blob)

    def read(self, name: str, stored: Stored) -> bytes:
        """What an object holds."""
        with self._explained(name):
            blob = self._bucket.blob(self._key_of(name))
            return blob.download_as_bytes(
                if_generation_match=stored.generation, raw_download=True, checksum='crc32c'
            )

    def fetch(self, name: str, stored: Stored, path: pathlib.Path) -> None:
        """Copies an object into a file, which is there once it is whole. Its time is the object's,
        the same on every host: by it `predict --resume` knows a scan."""
        with self._explained(name), atomic.new_file(path) as temporary:
            with temporary.open('wb') as file:
                self._bucket.blob(self._key_of(name)).download_to_file(
                    file,
                    if_generation_match=stored.generation,
                    raw_download=True,
                    checksum='crc32c',
                )
            made_at = stored.generation * 1000  # a generation is the microsecond of its making
            os.utime(temporary, ns=(made_at, made_at))

    def write(self, name: str, content: bytes, generation: int = ABSENT) -> Stored:
        """Writes an object in place of the generation that is there."""
        return self.upload(name, io.BytesIO(content), len(content), generation)

    def upload(self, name: str, file: BinaryIO, size: int, generation: int = ABSENT) -> Stored:
        """As `write`, the next `size` bytes of a file."""
        with self._explained(name):
            blob = self._bucket.blob(self._key_of(name))
            blob.upload_from_file(
                file, size=size, if_generation_match=generation, checksum='crc32c'
            )
            return _describe(blob)

    def copy(self, name: str, to: str, generation: int = ABSENT) -> Stored:
        """Copies an object to another name, in place of the generation that is there."""
        with self._explained(to):
            source, blob = (self._bucket.blob(self._key_of(each)) for each in (name, to))
            token, _, _ = blob.rewrite(source, if_generation_match=generation)
            while token is not None:
                token, _, _ = blob.rewrite(source, token, if_generation_match=generation)
            return _describe(blob)

    def remove(self, name: str, stored: Stored) -> None:
        """Removes an object, where it is this one."""
        with self._explained(name):
            from google.api_core.exceptions import NotFound

            with contextlib.suppress(NotFound):  # a try before this one removed it
                blob = self._bucket.blob(self._key_of(name))
                blob.delete(if_generation_match=stored.generation)

    def _key_of(self, name: str) -> str:
        return f'{self._key}/{name}' if name else self._key

    @contextlib.contextmanager
    def _explained(self, name: str = '') -> Iterator[None]:
        place = f'{self.url}/{name}' if name else self.url
        try:
            yield
        except InputError:
            raise
        except ImportError as error:
            raise InputError(
                f'{place}: {error.name} is not installed, which buckets need; '
                'pip install google-cloud-storage'
            ) from error
        except Exception as error:
            fault = _explain(error, place)
            if fault is None:
                raise
            raise InputError(fault) from error


def _describe(blob: Any) -> Stored:
    return Stored(int(blob.size), blob.crc32c, int(blob.generation))


def _explain(error: Exception, place: str) -> str | None:
    """The line for an error of Google's client; None of any other error."""
    import requests
    from google.api_core import exceptions as api
    from google.auth.exceptions import GoogleAuthError
    from google.cloud.storage.exceptions import DataCorruption, InvalidResponse

    said = (str(error).splitlines() or [type(error).__name__])[0]
    bucket = SCHEME + place.removeprefix(SCHEME).partition('/')[0]
    match error:
        case api.PreconditionFailed():
            return (
                f'{place}: is not the object that this program knows: somebody wrote it, or '
                'another run works there; move it elsewhere, or name another folder'
            )
        case api.NotFound() if 'bucket' in said.lower():
            return f'{place}: there is no bucket {bucket}; make it, or mend its name'
        case api.NotFound():
            return f'{place}: is gone since it was listed; {GO_ON}'
        case api.Unauthorized() | api.Forbidden():
            return (
                f'{place}: permission is missing ({error.code}); give the account that runs this '
                f'the role Storage Object User (roles/storage.objectUser) on {bucket}'
            )
        case GoogleAuthError():
            return (
                f'{place}: no credentials of Google Cloud ({said}); run `gcloud auth '
                'application-default login`, or give the VM a service account'
            )
        case DataCorruption():
            return f'{place}: arrived with another checksum than it was stored with; {GO_ON}'
        case api.GoogleAPIError() | InvalidResponse() | requests.RequestException():
            return f'{place}: the bucket does not answer as it should ({said}); {GO_ON}'
    return None


def run_all(work: Callable[..., Any], jobs: Iterable[tuple], what: str) -> list:
    """`work(*job)` for every job, several at a time; the results in the jobs' order. The first that
    fails ends it."""
    jobs = list(jobs)
    with futures.ThreadPoolExecutor(_THREADS) as threads:
        running = [threads.submit(work, *job) for job in jobs]
        try:
            bar = tqdm(running, what, unit='file', disable=None, leave=False)
            return [job.result() for job in bar]
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise


class LocalFolder:
    """A URL's folder on this host, and which of its files are as the bucket has them."""

    def __init__(self, url: str):
        self.url, self.folder = url, local_path(url)
        self._record = own_folder(url) / 'record.json'
        self._known: dict[str, list] = {}  # name -> bytes, time and checksum of a file

    @contextlib.contextmanager
    def locked(self, *, wait: bool = False) -> Iterator[bool]:
        """Whether no other process of this host works with the folder, until the block ends."""
        self._record.parent.mkdir(parents=True, exist_ok=True)
        with (self._record.parent / 'lock').open('w') as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
            else:
                yield True

    def read_record(self) -> int:
        """Reads what an earlier process left; returns the generation of the list that it knew."""
        try:
            record = json.loads(self._record.read_text(encoding='utf-8'))
        except (OSError, ValueError):  # none; without it files are read to know them
            record = {'list': ABSENT, 'files': {}}
        self._known = record['files']
        return record['list']

    def write_record(self, generation: int) -> None:
        record = {'list': generation, 'files': self._known}
        atomic.write_text(self._record, json.dumps(record, indent=0))

    def names(self) -> list[str]:
        """The files that belong in the bucket."""
        if self.folder.is_file():
            return ['']
        paths = [path for path in self.folder.rglob('*') if path.is_file()]
        names = [path.relative_to(self.folder).as_posix() for path in paths]
        return sorted(filter(is_mirrored, names))

    def has(self, name: str, checksum: str) -> bool:
        """Whether a file is there and holds this."""
        note = self.describe(name)
        return note is not None and note['crc32c'] == checksum

    def describe(self, name: str) -> Note | None:
        """Size and checksum of a file, which may grow meanwhile; None where it is not there."""
        try:
            with (self.folder / name).open('rb') as file:
                status = os.fstat(file.fileno())
                state = [status.st_size, status.st_mtime_ns]
                if self._known.get(name, [])[:2] != state:
                    # Only now, for a file is known by what was read of it, and not by its time.
                    return {'bytes': state[0], 'crc32c': crc32c(file, state[0]), 'time': state[1]}
                return {'bytes': state[0], 'crc32c': self._known[name][2], 'time': state[1]}
        except (FileNotFoundError, NotADirectoryError):
            return None

    def keep(self, name: str, note: Note) -> None:
        """The bucket has this file as it is described."""
        self._known[name] = [note['bytes'], note['time'], note['crc32c']]

    def known_names(self) -> list[str]:
        return list(self._known)

    def find_removed(self) -> list[str]:
        """Files that the bucket has and that are here no more."""
        return [name for name in self._known if not (self.folder / name).exists()]

    def forget(self, names: Iterable[str]) -> None:
        for name in names:
            self._known.pop(name, None)

    def fetch(self, bucket: Bucket, stored: dict[str, Stored]) -> None:
        for name in stored:
            if name and any(part in ('', '.', '..') for part in name.split('/')):
                raise InputError(f'{self.url}/{name}: no file can have this name; rename it')

        def fetch_one(name: str, each: Stored) -> None:
            bucket.fetch(name, each, self.folder / name)

        run_all(fetch_one, stored.items(), 'fetch')
        for name in stored:
            self.keep(name, self.describe(name))

    def remove(self, names: Iterable[str]) -> None:
        """Removes files, and folders that hold nothing more: an empty one would look like a
        checkpoint."""
        for name in list(names):
            path = self.folder / name
            path.unlink(missing_ok=True)
            self._known.pop(name, None)
            with contextlib.suppress(OSError):
                while name and path.parent != self.folder:
                    path = path.parent
                    path.rmdir()


def fetch(url: str) -> pathlib.Path:
    """Brings the object of a URL, or all objects below it, and returns where they are. Those that
    are there already, as they were fetched and as the bucket has them, stay.

    Raises:
      InputError: nothing is there, or it cannot be fetched.
    """
    bucket, local = Bucket(url), LocalFolder(url)
    with local.locked(wait=True):
        stored = {name: each for name, each in bucket.list().items() if is_mirrored(name)}
        if not stored:
            single = bucket.find('')
            if single is None:
                raise InputError(f'{url}: nothing is there; mend the name')
            stored = {'': single}
        local.read_record()
        local.remove(name for name in local.names() if name not in stored)
        local.fetch(bucket, {n: s for n, s in stored.items() if not local.has(n, s.crc32c)})
        local.write_record(ABSENT)
    return local.folder


def is_mirrored(name: str) -> bool:
    """Whether an object or file belongs both in a bucket and in the folder that stands for it."""
    return _BEING_WRITTEN not in name and not any(
        part.startswith(_NOT_MIRRORED) for part in name.split('/')
    )
