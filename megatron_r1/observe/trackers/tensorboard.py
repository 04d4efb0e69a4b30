"""TensorBoard's event files, by the tensorboard package's own record writer; neither TensorFlow nor torch is imported.

One file a start, in run_dir/tensorboard: `tensorboard --logdir runs` shows every run below. Values are fp32, as
TensorBoard keeps them. A value that is not finite is left out: a gap, like the null in metrics.jsonl.
"""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Mapping
from typing import Any

from megatron_r1.observe.trackers import Remember, TrackedRun, Tracker


class TensorBoard:
    def __init__(self, run: TrackedRun) -> None:
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._protos: Any = event_pb2  # its classes are made at import; no checker sees them
        folder = run.folder / "tensorboard"
        folder.mkdir(exist_ok=True)
        self.about = str(folder)
        begun = time.time()
        # Readers take the files in the order of their names.
        path = folder / f"events.out.tfevents.{begun:017.6f}.{socket.gethostname()}.{os.getpid()}"
        # Unbuffered: a step is one write, and a full disk is known at once.
        self._writer = RecordWriter(open(path, "xb", buffering=0))  # noqa: SIM115
        self._write(wall_time=begun, file_version="brain.Event:2")
        # A reader drops what earlier files have from this step on: a restarted run writes those steps again.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)  # pyright: ignore[reportAttributeAccessIssue]
        self._write(wall_time=begun, step=run.first_step, session_log=start)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        from tensorboard.compat.proto import summary_pb2

        protos: Any = summary_pb2
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        values = [protos.Summary.Value(tag=name, simple_value=value) for name, value in finite.items()]
        self._write(wall_time=time.time(), step=step, summary=protos.Summary(value=values))

    def close(self, seconds: float) -> None:
        self._writer.close()

    def _write(self, **event: Any) -> None:
        self._writer.write(self._protos.Event(**event).SerializeToString())


def open_tracker(run: TrackedRun, remember: Remember) -> Tracker:
    return TensorBoard(run)
