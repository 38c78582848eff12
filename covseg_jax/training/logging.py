"""metrics.jsonl, pictures and TensorBoard, kept in step with the checkpoints."""

import contextlib
import json
import math
import os
import pathlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

from covseg_jax import atomic, hosts
from covseg_jax.errors import InputError
from covseg_jax.training.events import Events

_PICTURES = 'pictures'


class SilentLog:
    """The log of a host other than host 0, which alone writes."""

    def _ignore(self, *arguments: object) -> None: ...

    write = write_image = sync = close = _ignore


class MetricsLog:
    """Scalars and images of one run: `folder`/metrics.jsonl (one line a logged step, full
    precision), `folder`/tensorboard/, and the images as `folder`/pictures/<name>/<step>.png too.

    Its methods raise an InputError where the disk is full or cannot be written.
    """

    def __init__(self, folder: pathlib.Path, *, start_step: int):
        """Opens the log of a run that goes on after `start_step` steps: what an earlier process
        wrote beyond that step, and will be computed again, is dropped."""
        self._path = folder / 'metrics.jsonl'
        folder.mkdir(parents=True, exist_ok=True)
        for path in (folder / _PICTURES).glob('*/*.png'):
            if _step_of(path) > start_step:
                path.unlink()
        if self._path.exists():
            kept = [row for row in read_rows(self._path) if row['step'] <= start_step]
            atomic.write_text(self._path, ''.join(json.dumps(row) + '\n' for row in kept))
        self._file = self._path.open('a', encoding='utf-8')
        self._events = Events(folder / 'tensorboard', start_step=start_step)

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line, and one TensorBoard scalar a value."""
        # JSON has no NaN: an undefined value is null, as everywhere in this project.
        line = {k: (v if math.isfinite(v) else None) for k, v in values.items()}
        with self._explained():
            self._file.write(json.dumps({'step': step} | line) + '\n')
            self._file.flush()
            self._events.scalars(step, values)
            self._events.flush()

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        """One (H, W) or (H, W, 3) picture in [0, 1]."""
        with self._explained():
            self._events.image(step, name, image)
            path = self._path.parent / _PICTURES / name.rpartition('/')[2] / f'{step}.png'
            with atomic.new_file(path) as temporary:
                levels = np.round(255 * np.clip(image, 0, 1)).astype(np.uint8)
                Image.fromarray(levels).save(temporary, 'PNG')

    def sync(self) -> None:
        """Returns once what was written is on disk."""
        with self._explained():
            self._events.flush()
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Lets go of both files."""
        for file in (self._file, self._events):
            with contextlib.suppress(OSError):  # nothing is held back but what a full disk refused
                file.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(
                f'{self._path.parent}: the log could not be written ({error.strerror or error}); '
                'free space there or make it writable, and run the same command again: it goes on '
                'from the last checkpoint'
            ) from error


def open_log(folder: pathlib.Path, *, start_step: int) -> MetricsLog | SilentLog:
    """The log of a run; only host 0 writes it."""
    return MetricsLog(folder, start_step=start_step) if hosts.is_first() else SilentLog()


def read_rows(path: pathlib.Path) -> list[dict]:
    """The lines of a metrics.jsonl, without one that is, or was left, half-written."""
    return [row for row in atomic.read_json_lines(path) if 'step' in row]


def read_newest(path: pathlib.Path) -> dict[str, float | None]:
    """The newest value of every name in a metrics.jsonl; {} where there is none."""
    newest: dict[str, float | None] = {}
    for row in read_rows(path) if path.exists() else ():
        newest |= row
    return newest


def find_pictures(folder: pathlib.Path, name: str) -> dict[int, pathlib.Path]:
    """The files of a run's images of one name by their steps, the first one first."""
    return {
        _step_of(path): path
        for path in sorted((folder / _PICTURES / name).glob('*.png'), key=_step_of)
    }


def _step_of(path: pathlib.Path) -> int:
    return int(path.stem) if path.stem.isdigit() else 0


_GAP = 2  # pixels between the pictures of a strip


def image_strip(rows: list[list[np.ndarray]]) -> np.ndarray:
    """Rows of equal (H, W) pictures -> one picture, a thin white line between them."""
    padded = [[np.pad(each, (0, _GAP), constant_values=1) for each in row] for row in rows]
    return np.block(padded)[:-_GAP, :-_GAP]


def split_strip(strip: np.ndarray, num_columns: int) -> list[np.ndarray]:
    """The columns of what `image_strip` made."""
    width = (strip.shape[1] + _GAP) // num_columns
    return [strip[:, i * width : (i + 1) * width - _GAP] for i in range(num_columns)]
