"""Problems from files of JSON lines, strictly: a line that is not a problem stops the run.

A line has `question` (text) or `messages` (chat turns, the last one the user's), and `answer` (text or number; of a
solution only what follows the last `####`, or its last box). Optional: id (text or number), domain, language, and
grader, with what it needs instead of an answer (`tests`, instructions or nothing) or beside it (`metadata`, where it is
an import path); null stands for a key that is not there. Other keys are ignored. Which graders there are, and whether a
problem has what its grader needs, is looked at where graders are wired (rewards/wiring.py). Public sets are read in
their publishers' own forms (forms.py).
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_r1.boxed import boxed_contents, final_boxes
from megatron_r1.data.forms import our_fields
from megatron_r1.data.lines import read_rows
from megatron_r1.errors import DataError
from megatron_r1.plugins import is_import_path
from megatron_r1.types import Message, Problem

KNOWN = ("question", "messages", "answer", "id", "grader", "tests", "domain", "language", "solution")
LEFT_OUT = ("reasoning_content", "reasoning", "thinking", "id", "timestamp")
"""Of a turn: earlier thoughts, which chat templates leave out too, and what is for people."""

TURN_FIELDS = frozenset(["role", "content", *LEFT_OUT])

ROLES = ("system", "user", "assistant")


def read_problems(paths: Sequence[Path]) -> tuple[Problem, ...]:
    """All problems of all files, in order. DataError names file, line and reason. Ids are unique over all files: a
    number that another file has too gets its file's name."""
    return tuple(problem for _, problem in placed_problems(paths))


def placed_problems(
    paths: Sequence[Path], on_fault: Callable[[DataError], None] | None = None
) -> Iterator[tuple[str, Problem]]:
    """(file and line, problem) of all files, in order. With `on_fault`, it is told of a line that is no problem, and
    the next one is read."""
    stems = [Path(path).stem for path in paths]
    first: dict[str, tuple[str, Path]] = {}
    for path in map(Path, paths):
        prefix = path.stem if stems.count(path.stem) == 1 else str(path)
        for row in read_rows(path, what="problems", holds="question and answer", on_fault=on_fault):
            try:
                fields = our_fields(row.fields, row.where)
                problem = _read_row(fields, where=row.where, default_id=f"{prefix}:{row.number}")
                if problem.id in first and first[problem.id][1] != path and not isinstance(fields.get("id"), str):
                    problem = dataclasses.replace(problem, id=f"{prefix}:{problem.id}")
                if problem.id in first:
                    raise DataError(f"{row.where}: id {problem.id!r} was used at {first[problem.id][0]}")
            except DataError as error:
                if on_fault is None:
                    raise
                on_fault(error)
                continue
            first[problem.id] = row.where, path
            yield row.where, problem


def _read_row(row: Mapping[str, Any], *, where: str, default_id: str) -> Problem:
    named = {"grader": read_text(row, "grader", where)} if "grader" in row else {}
    grader = named.get("grader", "")
    if grader in INSTEAD:
        answer, metadata = None, INSTEAD[grader](row, where)
    else:
        own = is_import_path(grader)
        answer = None if own and "answer" not in row else _read_answer(row, where)
        metadata = _read_metadata(row, where) if own else {}
    return Problem(
        id=_read_id(row, where, default_id),
        domain=read_text(row, "domain", where, default="math"),
        messages=read_messages(row, where),
        answer=answer,
        metadata=metadata,
        language=read_text(row, "language", where) if "language" in row else None,
        **named,
    )


def _read_id(row: Mapping[str, Any], where: str, default: str) -> str:
    """Text, or a whole number as text."""
    value = row.get("id", default)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return read_text(row, "id", where, default=default)


def read_messages(row: Mapping[str, Any], where: str) -> tuple[Message, ...]:
    """The turns of a line with `question` or `messages`; the last one is the user's."""
    if ("question" in row) == ("messages" in row):
        found = ", ".join(sorted(row)) or "nothing"
        raise DataError(
            f"{where}: has {found}; expected exactly one of question and messages{misspelt('question', row)}"
        )
    if "question" in row:
        return ({"role": "user", "content": read_text(row, "question", where)},)
    turns = row["messages"]
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where}: messages must be a non-empty list of turns")
    for turn in turns:
        if not isinstance(turn, dict) or turn.get("role") not in ROLES:
            raise DataError(f"{where}: every turn needs a role out of {', '.join(ROLES)}; got {turn!r}")
        read_text(turn, "content", where)
        strange = [key for key, value in turn.items() if value is not None and key not in TURN_FIELDS]
        if strange:
            raise DataError(
                f"{where}: a turn has {strange[0]!r}, which no prompt here could show; a turn is role and content "
                f"(left out where they are there: {', '.join(LEFT_OUT)})"
            )
    if turns[-1]["role"] != "user":
        raise DataError(f"{where}: the last turn is {turns[-1]['role']!r}; expected 'user'")
    return tuple({"role": turn["role"], "content": turn["content"]} for turn in turns)


def _read_metadata(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a user's grader is told beside the answer."""
    metadata = row.get("metadata", {})
    if not isinstance(metadata, dict):
        raise DataError(f"{where}: metadata is {metadata!r:.80}; expected an object for grader {row['grader']}")
    return metadata


def _read_instructions(row: Mapping[str, Any], where: str) -> list[tuple[str, dict[str, Any]]]:
    """(name, arguments) of each of IFEval's instructions; arguments that are null are left out, as in its files."""
    names, arguments = row.get("instruction_id_list"), row.get("kwargs")
    if not isinstance(names, list) or not names or not isinstance(arguments, list) or len(arguments) != len(names):
        raise DataError(f"{where}: instruction_id_list and kwargs must be lists of one length, as in IFEval's files")
    if any(not isinstance(given, dict) for given in arguments):
        raise DataError(f"{where}: kwargs holds what is no object; expected the arguments of each instruction")
    return [
        (str(name), {key: value for key, value in given.items() if value is not None})
        for name, given in zip(names, arguments, strict=True)
    ]


def _read_tests(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The tests of a coding problem; what they must look like is checked when graders are made (rewards/code.py)."""
    tests = row.get("tests")
    if not isinstance(tests, dict) or not tests:
        raise DataError(f"{where}: tests is {tests!r:.80}; expected an object, see docs/code_rewards.md")
    return tests


INSTEAD: Mapping[str, Callable[[Mapping[str, Any], str], dict[str, Any]]] = {
    "code": lambda row, where: {"tests": _read_tests(row, where)},
    "instructions": lambda row, where: {"instructions": _read_instructions(row, where)},
    "preference": lambda row, where: {},
}
"""By grader: our columns that stand in place of an answer, as metadata. An answer beside them is a solution, which is
not read. Any other grader has the answer, and a user's own the column metadata."""


def _read_answer(row: Mapping[str, Any], where: str) -> str:
    answer = row.get("answer")
    if isinstance(answer, float) and answer.is_integer() and abs(answer) < 2**53:
        answer = int(answer)  # 27.0, as files say that were made from tables
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        return str(answer)
    text = read_text(row, "answer", where)
    if "####" in text:
        text = text.rpartition("####")[2]
        if not text.strip():
            raise DataError(f"{where}: nothing follows '####' in answer; expected the final answer")
    return _without_solution(text.strip(), where)


def _without_solution(text: str, where: str) -> str:
    r"""What a solution's last \boxed{...} holds; all boxes where nothing but separators stands between them."""
    if "\\boxed" not in text and "\\fbox" not in text:
        return text
    found = final_boxes(text)
    if not found or not boxed_contents(text)[-1].strip():
        raise DataError(
            f"{where}: answer has a \\boxed that is empty or is never closed, so no answer could match it; write the "
            "final answer alone"
        )
    return found


def read_text(row: Mapping[str, Any], key: str, where: str, default: str | None = None) -> str:
    """The text at `key`. DataError if it is none or empty."""
    value = row.get(key, default)
    if not isinstance(value, str) or not value.strip():
        got = f"{value!r:.80}" if key in row else f"missing{misspelt(key, row)}"
        raise DataError(f"{where}: {key} is {got}; expected non-empty text")
    return value


def misspelt(key: str, row: Mapping[str, Any]) -> str:
    """A question about a key that looks like the one that is missing, or nothing."""
    close = difflib.get_close_matches(key, [name for name in row if name not in KNOWN], n=1, cutoff=0.75)
    return f" (did you mean {key} by {close[0]!r}?)" if close else ""
