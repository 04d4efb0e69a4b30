"""A run as one line a step: a table that reads the same on a terminal and in a log file.

On a terminal a bar with the time left stays below the table; elsewhere each line carries the time left. Left
out: keeping numbers (metrics.py).
"""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

HEADER_EVERY = 20
RECENT_STEPS = 20
"""Steps whose mean length predicts the time left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    title: str
    key: str
    width: int
    spec: str


COLUMNS = (
    Column(title="reward", key="reward_mean", width=7, spec=".3f"),
    Column(title="correct", key="accuracy", width=8, spec=".1%"),
    Column(title="format", key="format", width=7, spec=".0%"),
    Column(title="length", key="length_mean", width=8, spec=",.1f"),
    Column(title="KL", key="kl", width=8, spec=".4f"),
    Column(title="grad", key="grad_norm", width=7, spec=".2f"),
    Column(title="mismatch", key="mismatch", width=10, spec=".1e"),
    Column(title="tokens/s", key="tokens_per_second", width=9, spec=",.0f"),
    Column(title="valid.", key="eval_accuracy", width=9, spec=".1%"),
)


SFT_COLUMNS = (
    Column(title="loss", key="loss", width=8, spec=".4f"),
    Column(title="grad", key="grad_norm", width=8, spec=".2f"),
    Column(title="lr", key="lr", width=9, spec=".1e"),
    Column(title="epoch", key="epoch", width=7, spec=".2f"),
    Column(title="tokens/s", key="tokens_per_second", width=10, spec=",.0f"),
    Column(title="valid.", key="validation_loss", width=8, spec=".4f"),
)

PAIR_COLUMNS = (
    Column(title="loss", key="pair_loss", width=8, spec=".4f"),
    Column(title="right", key="pair_accuracy", width=8, spec=".1%"),
    Column(title="margin", key="margin", width=8, spec=".2f"),
    Column(title="grad", key="grad_norm", width=8, spec=".2f"),
    Column(title="lr", key="lr", width=9, spec=".1e"),
    Column(title="tokens/s", key="tokens_per_second", width=10, spec=",.0f"),
)


class Progress:
    """Prints one line per finished step, or per `every` steps. Close it, or use it as a context manager."""

    def __init__(
        self,
        total_steps: int,
        *,
        columns: Sequence[Column] = COLUMNS,
        every: int = 1,
        stream: TextIO | None = None,
        first_step: int = 0,
    ) -> None:
        self.total_steps = total_steps
        self._columns, self._every = columns, every
        self._stream = sys.stdout if stream is None else stream
        self._lines = 0
        self._done = first_step
        self._last = time.monotonic()
        self._recent: deque[float] = deque(maxlen=RECENT_STEPS)
        self._bar = _terminal_bar(self._stream, total_steps, first_step)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Report that step `step` (counted from 0) is done; `metrics` is its metrics.jsonl record."""
        now = time.monotonic()
        self._recent.append(now - self._last)
        self._last = now
        self._done = step + 1
        if self._done % self._every == 0 or self._done == self.total_steps:
            if self._lines % HEADER_EVERY == 0:
                self._print(header(self.total_steps, self._columns))
            self._lines += 1
            left = (self.total_steps - self._done) * sum(self._recent) / len(self._recent)
            self._print(step_line(self._done, self.total_steps, metrics, seconds_left=left, columns=self._columns))
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._done)

    def note(self, text: str) -> None:
        """A line between steps, e.g. an evaluation or a checkpoint."""
        self._print(text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _print(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)


def header(total_steps: int, columns: Sequence[Column] = COLUMNS) -> str:
    """The column titles, aligned with step_line()."""
    titles = "".join(column.title.rjust(column.width) for column in columns)
    return "step".rjust(_step_width(total_steps)) + titles + "left".rjust(9)


def step_line(
    done: int,
    total_steps: int,
    metrics: Mapping[str, Any],
    *,
    seconds_left: float,
    columns: Sequence[Column] = COLUMNS,
) -> str:
    """One step's numbers; '-' where there is none, 'nan' shown as it is."""
    cells = []
    for column in columns:
        value = metrics.get(column.key)
        text = "-" if value is None else format(value, column.spec) if math.isfinite(value) else str(value)
        cells.append(text.rjust(column.width) if len(text) < column.width else " " + text)
    step = f"{done}/{total_steps}".rjust(_step_width(total_steps))
    return step + "".join(cells) + duration(seconds_left).rjust(9)


def duration(seconds: float) -> str:
    """'42s', '3m05s', '2h07m', '3d04h'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86_400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86_400}d{whole % 86_400 // 3600:02d}h"


def _step_width(total_steps: int) -> int:
    return max(2 * len(str(total_steps)) + 1, 4)


def _terminal_bar(stream: TextIO, total_steps: int, first_step: int) -> Any:
    """A started rich progress bar if `stream` is a terminal, else None."""
    if not stream.isatty():
        return None
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("steps"), BarColumn(bar_width=None), MofNCompleteColumn(),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    bar = Bar(*columns, console=Console(file=stream))
    bar.add_task("steps", total=total_steps, completed=first_step)
    bar.start()
    return bar
