"""Procedural problems: reasoning-gym datasets, named in one line, generated one by one when asked for.

A task line is `name` or `name:arg=value,arg=value`; a list argument separates its items with `|`
(`basic_arithmetic:operators=+|-,allow_parentheses=False`). Seed and size are the run's, never the line's.
Left out: grading (rewards/ owns it; `Problem.metadata` says how to make the same entry again) and reading
files.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import reasoning_gym
from reasoning_gym.factory import DATASETS

from megatron_r1.config.gym_tasks import refusal
from megatron_r1.errors import ConfigError
from megatron_r1.types import Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A parsed task line: dataset name and checked arguments."""

    line: str
    name: str
    arguments: dict[str, Any]


class TaskProblems(Sequence[Problem]):
    """A task's `size` problems, as a sequence that generates entry i when it is read. Same seed, same
    entries."""

    def __init__(self, task: Task, *, seed: int, size: int) -> None:
        self.task = task
        digest = hashlib.sha256(f"{seed}:{task.line}".encode()).digest()
        # reasoning-gym draws entry i from seed + i: neighbouring seeds would share all but one entry.
        self.dataset_seed = int.from_bytes(digest[:6], "big")
        self._size = size
        self._dataset = reasoning_gym.create_dataset(task.name, seed=self.dataset_seed, size=size, **task.arguments)

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, index: int) -> Problem: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Problem]: ...
    def __getitem__(self, index: int | slice) -> Problem | Sequence[Problem]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._size))]
        if not 0 <= index < self._size:
            raise IndexError(f"{self.task.line}: entry {index} of {self._size}")
        entry = self._dataset[index]
        answer = entry["answer"]
        return Problem(
            id=f"{self.task.name}-{self.dataset_seed:012x}-{index}",
            domain=self.task.name,
            messages=({"role": "user", "content": entry["question"]},),
            answer=None if answer is None else str(answer),
            grader="reasoning_gym",
            metadata={
                "question": entry["question"],
                "task": self.task.name,
                "arguments": self.task.arguments,
                "seed": self.dataset_seed,
                "size": self._size,
                "index": index,
            },
        )


def parse_task(line: str) -> Task:
    """Read one task line. ConfigError (with close matches) for an unknown name or argument or a refused value,
    and for a dataset whose scorer would run a model's answer as code (config/gym_tasks.py)."""
    name, _, tail = line.partition(":")
    name = name.strip()
    if name not in DATASETS:
        raise ConfigError(f"data.tasks: {name!r} is no reasoning-gym dataset{_suggest(name, DATASETS)}")
    if (reason := refusal(name)) is not None:
        raise ConfigError(f"data.tasks: {line!r}: {reason}")
    config_class = DATASETS[name][1]
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    arguments: dict[str, Any] = {}
    for part in filter(None, (piece.strip() for piece in tail.split(","))):
        key, equals, value = (text.strip() for text in part.partition("="))
        if not equals:
            raise ConfigError(f"data.tasks: {line!r}: {part!r} is not arg=value")
        if key in ("seed", "size"):
            raise ConfigError(f"data.tasks: {line!r}: {key} belongs to the run; set data.seed or data.task_size")
        if key not in fields:
            raise ConfigError(f"data.tasks: {line!r}: {name} has no argument {key!r}{_suggest(key, fields)}")
        arguments[key] = _read_value(value, fields[key])
    try:
        config = config_class(**arguments)
        if hasattr(config, "validate"):
            config.validate()
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigError(f"data.tasks: {line!r}: {name} refuses these arguments: {error}") from error
    return Task(line=line, name=name, arguments=arguments)


def _read_value(text: str, field: dataclasses.Field) -> Any:
    default = field.default if field.default is not dataclasses.MISSING else None
    if default is None and field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    if isinstance(default, list | tuple):
        return [_literal(item.strip()) for item in text.split("|")]
    return _literal(text)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _suggest(name: str, known: Sequence[str] | dict[str, Any]) -> str:
    close = difflib.get_close_matches(name, list(known), n=3)
    return f"; did you mean {', '.join(close)}?" if close else f"; known: {', '.join(sorted(known))}"
