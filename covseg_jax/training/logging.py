"""metrics.jsonl and TensorBoard, kept in step with the checkpoints."""

import json
import math
import pathlib

import numpy as np
import tensorboardX

from covseg_jax import atomic


class MetricsLog:
    """Scalars and images of one run: `folder`/metrics.jsonl (one line a logged step, full
    precision) and `folder`/tensorboard/."""

    def __init__(self, folder: pathlib.Path, *, start_step: int):
        """Opens the log of a run that goes on after `start_step` steps: what an earlier process
        wrote beyond that step, and will be computed again, is dropped."""
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / 'metrics.jsonl'
        if self._path.exists():
            kept = [
                line
                for line in self._path.read_text(encoding='utf-8').splitlines()
                if _step_of(line) is not None and _step_of(line) <= start_step
            ]
            atomic.write_text(self._path, ''.join(line + '\n' for line in kept))
        self._file = self._path.open('a', encoding='utf-8')
        self._writer = tensorboardX.SummaryWriter(
            str(folder / 'tensorboard'), purge_step=start_step + 1 if start_step else None
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line, and one TensorBoard scalar a value."""
        # JSON has no NaN: an undefined value is null, as everywhere in this project.
        line = {k: (v if math.isfinite(v) else None) for k, v in values.items()}
        self._file.write(json.dumps({'step': step} | line) + '\n')
        self._file.flush()
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        """One (H, W) or (H, W, 3) picture in [0, 1]."""
        image = np.clip(np.asarray(image, np.float32), 0, 1)
        self._writer.add_image(name, image, step, dataformats='HWC' if image.ndim == 3 else 'HW')

    def close(self) -> None:
        """Flushes both."""
        self._file.close()
        self._writer.close()


def _step_of(line: str) -> int | None:
    try:
        return json.loads(line)['step']
    except (ValueError, KeyError):  # a line that a killed process left half-written
        return None


def image_strip(rows: list[list[np.ndarray]]) -> np.ndarray:
    """Rows of equal (H, W) pictures -> one picture, a thin white line between them."""
    height, width = rows[0][0].shape
    gap = 2
    strip = np.ones(
        (len(rows) * (height + gap) - gap, len(rows[0]) * (width + gap) - gap), np.float32
    )
    for r, row in enumerate(rows):
        for c, picture in enumerate(row):
            top, left = r * (height + gap), c * (width + gap)
            strip[top : top + height, left : left + width] = picture
    return strip
