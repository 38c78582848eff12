"""A TensorBoard event file."""

import os
import pathlib
import time
from collections.abc import Iterable, Mapping

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary


class Events:
    """One new event file in a folder, which all event files of a run share. Every method may raise
    the OSError of a disk that is full."""

    def __init__(self, folder: pathlib.Path, *, start_step: int):
        """For what comes after `start_step` steps: of the folder's earlier files TensorBoard drops
        what lies beyond."""
        folder.mkdir(parents=True, exist_ok=True)
        # Not tensorboardX's SummaryWriter: its thread holds events back, and dies of a full disk
        # without a word.
        self._writer = EventsWriter(str(folder / 'events'), f'.{os.getpid()}.{start_step}')
        self._write(start_step + 1, file_version='brain.Event:2')
        self._write(start_step + 1, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One point a value; what stands before a name's first slash groups them."""
        for name, value in values.items():
            self._write(step, summary=summary.scalar(name, value))

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """One (H, W) or (H, W, 3) picture in [0, 1]."""
        image = np.clip(np.asarray(image, np.float32), 0, 1)
        form = 'HWC' if image.ndim == 3 else 'HW'
        self._write(step, summary=summary.image(name, image, dataformats=form))

    def pr_curve(
        self, step: int, name: str, truth_counts: np.ndarray, other_counts: np.ndarray
    ) -> None:
        """Precision against recall, from (N,) numbers of voxels in and outside lesions over N bins
        of equal width of their probability, from 0 to 1.

        A threshold at a bin's lower edge takes that bin and all above it for lesion. Where it takes
        none, precision is 0, as in tensorboardX's own curve.
        """
        # TensorBoard spreads the columns evenly over thresholds from 0 to 1, both ends among them.
        # A last column, of the threshold 1 that nothing passes, puts the others at their edges.
        tp = np.append(np.cumsum(truth_counts[::-1], dtype=np.float64)[::-1], 0)
        fp = np.append(np.cumsum(other_counts[::-1], dtype=np.float64)[::-1], 0)
        precision = tp / np.maximum(tp + fp, 1)
        recall = tp / np.maximum(tp[0], 1)
        curve = summary.pr_curve_raw(
            name, tp, fp, fp[0] - fp, tp[0] - tp, precision, recall, num_thresholds=len(tp)
        )
        self._write(step, summary=curve)

    def hparams(
        self, values: Mapping[str, bool | int | float | str], metric_names: Iterable[str]
    ) -> None:
        """The run's line of the HPARAMS tab: its settings, and the newest of the scalars that this
        folder has under `metric_names`. Of several calls for one folder TensorBoard shows the
        first."""
        for part in summary.hparams(values, metric_names):
            self._write(0, summary=part)

    def _write(self, step: int, **content: Summary | SessionLog | str) -> None:
        self._writer.write_event(Event(step=step, wall_time=time.time(), **content))

    def flush(self) -> None:
        """Returns once what was written is on disk."""
        self._writer.flush()

    def close(self) -> None:
        """Lets go of the file."""
        self._writer.close()
