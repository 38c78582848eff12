"""What a prediction over many studies has done, so that it can go on after it was killed."""

import dataclasses
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from isal import isal_zlib

from covseg_jax import atomic, written
from covseg_jax.imaging.study import Study

_HEAD = b'["covseg_jax predict: what is done, a line a study"]\n'  # by it the file is known
_NAME = re.compile(r'results\.\d+\.jsonl')


@dataclasses.dataclass(frozen=True)
class Journal:
    """A line for each study that is done, in `results.<host>.jsonl`. Each host writes its own file
    and reads all of them."""

    folder: pathlib.Path  # where predictions go
    host: int
    identity: str  # of the model and of what was asked for

    def files(self) -> list[pathlib.Path]:
        """This host's file, whether it is there or not, and those of the others that are there."""
        found = {p for p in self.folder.glob('results.*.jsonl') if _NAME.fullmatch(p.name)}
        return sorted(found | {self._path})

    @property
    def _path(self) -> pathlib.Path:
        return self.folder / f'results.{self.host}.jsonl'

    def begin(self) -> None:
        """To be called once, before the first study is noted."""
        written.claim(self._path, _HEAD)

    def append(self, study: Study, row: Mapping[str, Any], files: Iterable[pathlib.Path]) -> None:
        """Notes a study whose files are all written."""
        line = {
            'study_id': study.study_id,
            'identity': self.identity,
            'source': _describe_source(study),
            'files': {path.name: _crc32(path) for path in files},
            'row': dict(row),
        }
        atomic.append_json_line(self._path, line, _HEAD)

    def read_done(self, studies: Iterable[Study]) -> dict[str, dict[str, Any]]:
        """Study id -> row, of those that were done by the same model from the same files, and whose
        own files are as they were written."""
        entries: dict[str, list[dict]] = {}
        for path in filter(written.is_ours, self.files()):
            for entry in atomic.read_json_lines(path):
                entries.setdefault(entry['study_id'], []).append(entry)
        return {
            study.study_id: entry['row']
            for study in studies
            for entry in entries.get(study.study_id, ())
            if entry['identity'] == self.identity
            and entry['source'] == _describe_source(study)
            and all(_crc32(self.folder / name) == crc32 for name, crc32 in entry['files'].items())
        }


def _describe_source(study: Study) -> list:
    """Names, sizes and times of a study's files: reading them all would cost what is saved."""
    found = []
    for path in filter(None, (study.image, study.lung_mask)):
        inside = study.files if path == study.image and study.files else None
        for file in inside or (sorted(path.iterdir()) if path.is_dir() else [path]):
            if file.name == written.RECORD or written.is_output(file):  # written into the series
                continue
            state = file.stat() if file.exists() else None
            found.append([file.name, state and state.st_size, state and state.st_mtime_ns])
    return found


def _crc32(path: pathlib.Path) -> int | None:
    return isal_zlib.crc32(path.read_bytes()) if path.is_file() else None
