"""What a run writes about itself, so that a full disk or a crash never damages what was already written.

metrics.jsonl and rollouts.jsonl grow by whole lines; run.json and summary.json are replaced in one piece.
Left out: what the numbers mean (the stages decide) and how they look (progress.py, report.py).
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from megatron_r1.errors import DataError, UserError
from megatron_r1.files import replacing


class OutputError(UserError, OSError):
    """A file of the run folder cannot be written: names the file, the reason and the remedy."""


class JsonLines:
    """An append-only file of one JSON object a line. A line is on disk as a whole or not at all."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            _cut_torn_line(self._file)
        except OSError as error:
            raise _output_error(self.path, error) from error

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line; OutputError (and the file as it was) if it does not fit. NaN and infinity become
        null."""
        line = json.dumps(plain_json(record), ensure_ascii=False, allow_nan=False).encode("utf-8", "replace") + b"\n"
        size = os.fstat(self._file).st_size
        try:
            done = 0
            while done < len(line):
                done += os.write(self._file, line[done:])
        except OSError as error:
            if os.fstat(self._file).st_size > size:
                os.ftruncate(self._file, size)  # a half-written line would spoil the next one
            raise _output_error(self.path, error) from error

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def write_json(path: Path | str, content: Mapping[str, Any]) -> None:
    """Replace `path` with `content`, atomically: readers see the old file or the new one. OutputError on
    failure."""
    path = Path(path)
    try:
        with replacing(path) as file:
            json.dump(plain_json(content), file, ensure_ascii=False, allow_nan=False, indent=2)
            file.write("\n")
    except OSError as error:
        raise _output_error(path, error) from error


def read_json_lines(path: Path | str) -> Iterator[dict[str, Any]]:
    """The objects of a jsonl file; none if it does not exist. A torn last line (a killed run) is skipped; any
    other bad line is a DataError."""
    path = Path(path)
    if not path.exists():
        return
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                return
            try:
                yield json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}, line {number}: not valid JSON: {error}") from error


def keep_steps(path: Path, count: int) -> None:
    """Cut the file down to its rows of steps below `count`, and a torn last line off: a run that goes on from a
    checkpoint writes the later ones again. OutputError on failure."""
    if not path.exists():
        return
    try:
        with replacing(path) as file:
            for row in read_json_lines(path):
                if row["step"] < count:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
    except OSError as error:
        raise _output_error(path, error) from error


class PhaseTimer:
    """Wall-clock seconds by phase. Phases may nest: the inner phase's time is not counted in the outer
    one."""

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        *,
        around: Callable[[str], AbstractContextManager[None]] | None = None,
    ) -> None:
        """`around(name)` is entered with each phase, such as Watch.phase."""
        self._clock, self._around = clock, around
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._mark = self._start = clock()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._charge()
        self._open.append(name)
        try:
            with nullcontext() if self._around is None else self._around(name):
                yield
        finally:
            self._charge()
            self._open.pop()

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last take(), and "other": wall-clock time outside every phase.
        Resets."""
        self._charge()
        seconds = dict(self._seconds)
        seconds["other"] = max(self._mark - self._start - sum(seconds.values()), 0.0)
        self._seconds.clear()
        self._start = self._mark
        return seconds

    def _charge(self) -> None:
        now = self._clock()
        if self._open:
            name = self._open[-1]
            self._seconds[name] = self._seconds.get(name, 0.0) + now - self._mark
        self._mark = now


def plain_json(value: Any) -> Any:
    """`value` with numpy scalars, paths and tuples made plain; NaN and infinities become None, as JSON has
    none."""
    if isinstance(value, Mapping):
        return {str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, str):
        return str(value)
    if hasattr(value, "tolist"):  # numpy arrays and scalars
        return plain_json(value.tolist())
    if isinstance(value, Sequence | set | frozenset):
        return [plain_json(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int):
        return value
    return str(value)


def _cut_torn_line(file: int) -> None:
    """Cut what a killed run left after the last newline, so that the next line starts on its own."""
    end = size = os.fstat(file).st_size
    while end > 0:
        start = max(end - 65_536, 0)
        newline = os.pread(file, end - start, start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end < size:
        os.ftruncate(file, end)


def _output_error(path: Path, error: OSError) -> OutputError:
    return OutputError(
        error.errno,
        f"cannot write {path}: {error.strerror}; what was written before is intact; "
        "free space or fix permissions, then start the run again",
    )
