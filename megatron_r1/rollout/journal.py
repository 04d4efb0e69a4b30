"""The groups that were sampled since the last checkpoint, on disk as they come, so that a restart samples none twice.

One file a step, journal/step_N.jsonl, written by rank 0. A run that goes on from a checkpoint takes the groups of the
steps after it from here and samples only those that are missing; half-sampled ones begin anew, with the seeds they had.
Arrays are kept exactly. Rewards are not kept: grading is done again.
"""

from __future__ import annotations

import base64
import contextlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_r1.errors import DataError
from megatron_r1.observe.metrics import JsonLines, read_json_lines
from megatron_r1.types import Completion, Problem

JOURNAL = "journal"

Group = tuple[Completion, ...]
ARRAYS = {"token_ids": np.int32, "logprobs": np.float32, "teacher_logprobs": np.float32}
ROUTES = "routes"
"""Of a completion that has them: their dtype and shape beside the bytes."""


class Journal:
    """That of one run folder, on rank 0."""

    def __init__(self, run_dir: Path) -> None:
        self._folder = run_dir / JOURNAL

    def known(self, step: int, problems: Sequence[Problem], *, first: int = 0) -> dict[int, Group]:
        """The groups that a killed run sampled in step `step`, by their place among `problems`, before which the step
        had `first` others; a record of another problem is passed over."""
        found: dict[int, Group] = {}
        with contextlib.suppress(DataError):  # a line that a power cut spoilt: what is from there on is sampled again
            for record in read_json_lines(self._file(step)):
                index = record["index"] - first
                if 0 <= index < len(problems) and problems[index].id == record["problem"]:
                    found[index] = tuple(completion_from_json(one) for one in record["completions"])
        return found

    def open(self, step: int) -> JsonLines:
        """The file of step `step`, to `record` in; what it holds stays."""
        self._folder.mkdir(exist_ok=True)
        return JsonLines(self._file(step))

    def forget(self, before: int) -> None:
        """Remove the steps below `before`, which a checkpoint has made past."""
        for file in self._folder.glob("step_*.jsonl"):
            if int(file.stem.removeprefix("step_")) < before:
                file.unlink(missing_ok=True)

    def keep_from(self, step: int) -> None:
        """A run goes on from step `step`: remove what was sampled after a gap. The steps of the gap are sampled anew,
        and need not lead to the weights that those after it were sampled from."""
        while self._file(step).exists():
            step += 1
        for file in self._folder.glob("step_*.jsonl"):
            if int(file.stem.removeprefix("step_")) > step:
                file.unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove everything: the run is over, or begins from its start."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _file(self, step: int) -> Path:
        return self._folder / f"step_{step:08d}.jsonl"


def record(file: JsonLines, index: int, problem: Problem, group: Group) -> None:
    """Add the group of problem number `index` of the step. OutputError if it cannot be written."""
    file.write({"index": index, "problem": problem.id, "completions": [completion_to_json(one) for one in group]})


def completion_to_json(completion: Completion) -> dict[str, Any]:
    """Plain JSON that `completion_from_json` makes the same completion of."""
    arrays = {
        name: base64.b64encode(np.asarray(getattr(completion, name), dtype).tobytes()).decode()
        for name, dtype in ARRAYS.items()
        if getattr(completion, name) is not None
    }
    fields = ("finish_reason", "weight_version", "text")
    found = arrays | {name: getattr(completion, name) for name in fields}
    routes = completion.routes
    if routes is not None:
        found[ROUTES] = [routes.dtype.name, list(routes.shape), base64.b64encode(routes.tobytes()).decode()]
    return found


def completion_from_json(found: Mapping[str, Any]) -> Completion:
    """See `completion_to_json`. KeyError or ValueError for what is none."""
    arrays = {
        name: np.frombuffer(base64.b64decode(found[name]), dtype) for name, dtype in ARRAYS.items() if name in found
    }
    if ROUTES in found:
        dtype, shape, data = found[ROUTES]
        arrays[ROUTES] = np.frombuffer(base64.b64decode(data), dtype).reshape(shape)
    return Completion(
        **arrays,
        finish_reason=found["finish_reason"],
        weight_version=found["weight_version"],
        text=found["text"],
    )
