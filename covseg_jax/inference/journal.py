"""What a prediction over many studies has done, so that it can go on after it was killed."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from isal import isal_zlib

from covseg_jax import atomic
from covseg_jax.imaging.studies import Study


@dataclasses.dataclass(frozen=True)
class Journal:
    """A file of JSON lines, one a study that is done; one file a host, read all together.

    Attributes:
      folder: where predictions go.
      host: which host this is.
      identity: of the model and of what was asked for.
    """

    folder: pathlib.Path
    host: int
    identity: str

    def append(self, study: Study, row: Mapping[str, Any], files: Iterable[pathlib.Path]) -> None:
        """Notes a study whose files are all written."""
        line = {
            'study_id': study.study_id,
            'identity': self.identity,
            'source': _describe_source(study),
            'files': {path.name: _crc32(path) for path in files},
            'row': dict(row),
        }
        # A kill may have left half a line before it.
        text = f'\n{json.dumps(line)}\n'.encode()
        # Several processes write: one call appends one line, whole.
        path = self.folder / f'results.{self.host}.jsonl'
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, text)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def read_done(self, studies: Iterable[Study]) -> dict[str, dict[str, Any]]:
        """Study id -> row, of those that were done by the same model from the same files, and whose
        own files are as they were written."""
        entries: dict[str, list[dict]] = {}
        for path in sorted(self.folder.glob('results.*.jsonl')):
            for entry in atomic.read_json_lines(path):
                entries.setdefault(entry['study_id'], []).append(entry)
        return {
            study.study_id: entry['row']
            for study in studies
            for entry in entries.get(study.study_id, ())
            if self._is_whole(entry, study)
        }

    def _is_whole(self, entry: Mapping[str, Any], study: Study) -> bool:
        return (
            entry['identity'] == self.identity
            and entry['source'] == _describe_source(study)
            and all(_crc32(self.folder / name) == crc32 for name, crc32 in entry['files'].items())
        )

    def clear(self) -> None:
        """Forgets what was done."""
        for path in self.folder.glob('results.*.jsonl'):
            path.unlink(missing_ok=True)


def _describe_source(study: Study) -> list:
    """Names, sizes and times of a study's files: reading them all would cost what is saved."""
    found = []
    for path in (study.image, study.lung_mask):
        if path is None:
            continue
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        for file in files:
            state = file.stat() if file.exists() else None
            found.append([file.name, state and state.st_size, state and state.st_mtime_ns])
    return found


def _crc32(path: pathlib.Path) -> int | None:
    return isal_zlib.crc32(path.read_bytes()) if path.is_file() else None
