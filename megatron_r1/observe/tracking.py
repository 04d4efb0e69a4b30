"""metrics.jsonl, and what goes to the trackers of the same run: the one place that writes a step's numbers.

The file is the run's own and its faults are the run's. A tracker is not: each works in a thread of its own behind a
queue, so that one that fails, hangs or falls behind is left out with one warning and the run goes on.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from megatron_r1.config.same import as_json
from megatron_r1.config.track import TrackConfig, TrackerName
from megatron_r1.observe.metrics import JsonLines, keep_steps, plain_json, write_json
from megatron_r1.observe.trackers import TrackedRun, Tracker, opener_of

RECORD = "trackers.json"
"""What the trackers must know when the run starts again, and where they are; in the run's folder."""

OPEN_SECONDS = 20.0
"""The run waits so long for trackers to open, to say where they are; later ones are told of as they come."""
CLOSE_SECONDS = 90.0
"""The same for their last uploads, when the run has ended well."""
HURRIED_SECONDS = 10.0
"""The same when it has not: a batch system may be about to kill it."""
GRACE_SECONDS = 10.0
"""Beyond these, for a tracker that does not keep to them."""
MAX_WAITING = 1000
"""Steps that a tracker may be behind."""


def say(text: str) -> None:
    print(text, flush=True)


class TrackedStage(Protocol):
    """A stage's configuration with the part that names trackers."""

    @property
    def run_dir(self) -> Path: ...
    @property
    def track(self) -> TrackConfig: ...


class MetricsLog:
    """metrics.jsonl of a stage from step `first_step` on, and its trackers. One, on rank 0.

    `say` prints a line: where each tracker is, and what ended it."""

    def __init__(
        self, config: TrackedStage, *, stage: str, say: Callable[[str], None] = say, first_step: int = 0
    ) -> None:
        path = config.run_dir / "metrics.jsonl"
        keep_steps(path, first_step)
        self._file, self._say = JsonLines(path), say
        record = _Record(config.run_dir / RECORD)
        self._threads = [
            TrackerThread(
                name,
                TrackedRun(
                    folder=config.run_dir,
                    stage=stage,
                    track=config.track,
                    first_step=first_step,
                    config=plain_json(as_json(config)),
                    known=record.of(name),
                ),
                record,
            )
            for name in config.track.names
        ]
        until = time.monotonic() + OPEN_SECONDS
        for thread in self._threads:
            thread.opened.wait(max(0.0, until - time.monotonic()))
        self._look()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        self.close(CLOSE_SECONDS if kind is None else HURRIED_SECONDS)

    def write(self, row: Mapping[str, Any]) -> None:
        """A step's row, with its number in `step`. OutputError if it does not fit into metrics.jsonl."""
        self._file.write(row)
        numbers = numbers_of(row) if self._threads else {}
        for thread in self._threads:
            thread.give(int(row["step"]), numbers)
        self._look()

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Let the trackers finish within `seconds` in all, and leave behind those that do not."""
        self._file.close()
        for thread in self._threads:
            thread.finish(seconds)
        until = time.monotonic() + seconds + GRACE_SECONDS  # they keep to it themselves, unless they hang
        for thread in self._threads:
            thread.wait(until)
        self._look()
        self._threads.clear()

    def _look(self) -> None:
        """Say what has opened and what has failed since the last look; those that failed are left out from here on."""
        for thread in self._threads:
            if thread.about and not thread.told:
                self._say(f"tracked by {thread.name}: {thread.about}")
                thread.told = True
        failed = [thread for thread in self._threads if thread.fault]
        for thread in failed:
            self._say(f"WARNING: {thread.name} is left out from here on, the run goes on: {thread.fault}")
        self._threads = [thread for thread in self._threads if thread not in failed]


class TrackerThread:
    """A tracker and the thread that alone calls it. `fault` says why it has ended, if it should not have."""

    def __init__(self, name: TrackerName, run: TrackedRun, record: _Record) -> None:
        self.name: TrackerName = name
        self.about, self.told, self.fault = "", False, ""
        self.opened = threading.Event()
        """Set too when it could not be opened."""
        self._seconds = HURRIED_SECONDS
        self._rows: queue.Queue[tuple[int, Mapping[str, float]] | None] = queue.Queue(MAX_WAITING)
        self._thread = threading.Thread(target=self._work, args=(run, record), name=f"track {name}", daemon=True)
        self._thread.start()

    def give(self, step: int, numbers: Mapping[str, float]) -> None:
        try:
            self._rows.put_nowait((step, numbers))
        except queue.Full:
            self.fault = self.fault or f"it is {MAX_WAITING:,} steps behind; is its disk or its network there?"

    def finish(self, seconds: float) -> None:
        self._seconds = seconds
        with suppress(queue.Full):
            self._rows.put_nowait(None)

    def wait(self, until: float) -> None:
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            self.fault = self.fault or f"it had not finished {self._seconds:g} s after the last step"

    def _work(self, run: TrackedRun, record: _Record) -> None:
        tracker: Tracker | None = None
        try:
            tracker = opener_of(self.name)(run, lambda **facts: record.keep(self.name, facts))
            self.about = tracker.about
            self.opened.set()
            while (row := self._rows.get()) is not None and not self.fault:
                tracker.log(*row)
            tracker.close(self._seconds)
        except BaseException as error:  # whatever a library raises: nobody else would see it
            lines = str(error).strip().splitlines()
            self.fault = f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(": ")
            with suppress(BaseException):
                if tracker is not None:
                    tracker.close(HURRIED_SECONDS)
        finally:
            self.opened.set()


class _Record:
    """trackers.json: by tracker, what it asked to be kept."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # none yet, or spoilt: the trackers begin anew
            content = {}
        self._content: dict[str, Any] = content if isinstance(content, dict) else {}

    def of(self, name: TrackerName) -> Mapping[str, Any]:
        known = self._content.get(name)
        return known if isinstance(known, dict) else {}

    def keep(self, name: TrackerName, facts: Mapping[str, Any]) -> None:
        with self._lock:
            self._content[name] = dict(facts)
            write_json(self._path, self._content)


def numbers_of(row: Mapping[str, Any], within: str = "") -> dict[str, float]:
    """What trackers get of a row: every number by its path (`seconds/rollout`), truth values as 0 and 1, NaN and
    infinities as they are. Texts, lists and nulls are left out, and the step, which is the axis."""
    found: dict[str, float] = {}
    for key, value in row.items():
        if not within and key == "step":
            continue
        if hasattr(value, "tolist"):  # numpy's scalars
            value = value.tolist()
        if isinstance(value, Mapping):
            found |= numbers_of(value, f"{within}{key}/")
        elif isinstance(value, bool | int | float):
            with suppress(OverflowError):  # a whole number beyond every float
                found[f"{within}{key}"] = float(value)
    return found
