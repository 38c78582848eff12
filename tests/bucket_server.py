"""A bucket on loopback: those calls of Google Cloud Storage's JSON API that the program makes.

After the API's reference, https://cloud.google.com/storage/docs/json_api: objects with generations,
preconditions and CRC-32C, listings in pages, uploads in one request and in several, rewrites.
"""

import base64
import contextlib
import itertools
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import google_crc32c

_OBJECT = re.compile(r'/storage/v1/b/([^/]+)/o(?:/([^/]+)(/rewriteTo/b/[^/]+/o/([^/]+))?)?')
PAGE = 50  # objects of a listing's page, so that a run has several


def crc32c(content):
    return base64.b64encode(google_crc32c.Checksum(content).digest()).decode()


class Object(NamedTuple):
    content: bytes
    generation: int
    crc32c: str  # as it was stored


class Refused(Exception):
    """The HTTP status of an answer that is none."""


class BucketServer:
    """Buckets by name, each with its objects by name."""

    def __init__(self, *names):
        self.buckets = {name: {} for name in names}
        self.refuse = {}  # HTTP method -> the status that answers it
        self.hold = None  # pattern: an upload of such a name is never answered, and `held` is set
        self.held = threading.Event()
        self.calls = []  # method and kind of each
        self._generations = itertools.count(1)
        self._sessions = {}
        self._lock = threading.Lock()

    def put(self, bucket, name, content):
        """Somebody else writes an object."""
        made = Object(content, next(self._generations), crc32c(content))
        self.buckets[bucket][name] = made
        return made

    def names(self, bucket, prefix=''):
        return {
            name.removeprefix(prefix) for name in self.buckets[bucket] if name.startswith(prefix)
        }

    @contextlib.contextmanager
    def serving(self):
        """Yields the address for STORAGE_EMULATOR_HOST."""
        server = ThreadingHTTPServer(('127.0.0.1', 0), _Handler)
        server.daemon_threads = True
        server.store = self
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield f'http://127.0.0.1:{server.server_port}'
        finally:
            server.shutdown()
            server.server_close()

    def answer(self, method, url, headers, body):
        """(status, headers, content) of a request."""
        parts = urlsplit(url)
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        if status := self.refuse.get(method):
            raise Refused(status)
        path = parts.path.removeprefix('/download').removeprefix('/upload')
        found = _OBJECT.fullmatch(path)
        if found is None:  # about the bucket itself: who may write objects may not ask
            raise Refused(403)
        bucket, name, _, target = (unquote(part) if part else part for part in found.groups())
        self.calls.append((method, 'object' if name else 'list'))
        if bucket not in self.buckets:
            raise Refused(404)
        objects = self.buckets[bucket]
        if parts.path.startswith('/upload'):
            return self._upload(objects, method, query, headers, body)
        if name is None:
            return self._list(objects, query)
        with self._lock:
            if name not in objects:
                raise Refused(404)
            if target:
                _require(objects.get(target), query)
                objects[target] = objects[name]._replace(generation=next(self._generations))
                answer = {'done': True, 'resource': _describe(target, objects[target])}
                size = str(len(objects[target].content))
                return 200, {}, _json(answer | {'totalBytesRewritten': size, 'objectSize': size})
            _require(objects[name], query)
            if method == 'DELETE':
                del objects[name]
                return 204, {}, b''
            if query.get('alt') == 'media':
                each = objects[name]
                said = {
                    'x-goog-hash': f'crc32c={each.crc32c}',
                    'x-goog-generation': each.generation,
                }
                return 200, said, each.content
            return 200, {}, _json(_describe(name, objects[name]))

    def _list(self, objects, query):
        names = sorted(name for name in objects if name.startswith(query.get('prefix', '')))
        start = int(query.get('pageToken', 0))
        page = [_describe(name, objects[name]) for name in names[start : start + PAGE]]
        more = {'nextPageToken': str(start + PAGE)} if start + PAGE < len(names) else {}
        return 200, {}, _json({'items': page} | more)

    def _upload(self, objects, method, query, headers, body):
        if method == 'PUT':  # a part of a resumable upload
            session = self._sessions[query['upload_id']]
            session['content'] += body
            if headers['Content-Range'].endswith('/*') or not _is_last(headers['Content-Range']):
                return 308, {'Range': f'bytes=0-{len(session["content"]) - 1}'}, b''
            return self._store(objects, session['name'], session['content'], session['query'])
        if query['uploadType'] == 'resumable':
            key = str(next(self._generations))
            name = json.loads(body)['name']
            self._sessions[key] = {'name': name, 'content': b'', 'query': query}
            place = f'http://{headers["Host"]}/upload/storage/v1/b/{self._name_of(objects)}/o'
            return 200, {'Location': f'{place}?uploadType=resumable&upload_id={key}'}, b''
        boundary = re.search('boundary="?([^";]+)"?', headers['Content-Type'])[1].encode()
        _, described, content, _ = body.split(b'--' + boundary)
        name = json.loads(_part(described))['name']
        return self._store(objects, name, _part(content), query)

    def _store(self, objects, name, content, query):
        if self.hold and re.search(self.hold, name):
            self.held.set()
            threading.Event().wait()
        with self._lock:
            _require(objects.get(name), query)
            objects[name] = Object(content, next(self._generations), crc32c(content))
            return 200, {}, _json(_describe(name, objects[name]))

    def _name_of(self, objects):
        return next(name for name, each in self.buckets.items() if each is objects)


def _part(part):
    return part.partition(b'\r\n\r\n')[2].removesuffix(b'\r\n')


def _is_last(content_range):
    last, total = re.fullmatch(r'bytes (?:\d+-(\d+)|\*)/(\d+)', content_range).groups()
    return last is None or int(last) + 1 == int(total)


def _require(found, query):
    wanted = query.get('ifGenerationMatch')
    if wanted is not None and int(wanted) != (found.generation if found else 0):
        raise Refused(412)


def _describe(name, each):
    return {
        'name': name, 'size': str(len(each.content)), 'crc32c': each.crc32c,
        'generation': str(each.generation),
    }  # fmt: skip


def _json(value):
    return json.dumps(value).encode()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def _handle(self):
        body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        try:
            status, headers, content = self.server.store.answer(
                self.command, self.path, self.headers, body
            )
        except Refused as refused:
            status, headers = refused.args[0], {}
            reason = {404: 'The specified bucket does not exist.'}.get(status, 'refused')
            if status == 404 and '/o/' in self.path:
                reason = 'No such object'
            content = _json({'error': {'code': status, 'message': reason}})
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, str(value))
        self.send_header('Content-Length', str(len(content)))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):  # it was killed
            self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_DELETE = _handle

    def log_message(self, *arguments):
        pass
