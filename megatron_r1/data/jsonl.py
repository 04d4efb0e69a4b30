"""Problems from files of JSON lines, strictly: a line that is not a problem stops the run.

A line has `question` (text) or `messages` (chat turns, the last one the user's), and `answer` (text or
number; in GSM8K's style only what follows the last `####` counts). Optional: id, grader ("math", "exact", "code"
with `tests`, or "preference", which has no answer), domain, language. Lines of IFEval's own files (prompt,
instruction_id_list, kwargs) are read too. Other keys are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_r1.data.lines import read_rows
from megatron_r1.errors import DataError
from megatron_r1.types import Message, Problem

GRADERS = ("math", "exact", "code", "preference", "instructions")
WITHOUT_ANSWER = ("code", "preference", "instructions")
ROLES = ("system", "user", "assistant")


def read_problems(paths: Sequence[Path]) -> tuple[Problem, ...]:
    """All problems of all files, in order. DataError names file, line and reason; ids are unique over all
    files."""
    stems = [Path(path).stem for path in paths]
    first_line: dict[str, str] = {}
    problems: list[Problem] = []
    for path in map(Path, paths):
        prefix = path.stem if stems.count(path.stem) == 1 else str(path)
        for row in read_rows(path, what="problems", holds="question and answer"):
            problem = _read_row(row.fields, where=row.where, default_id=f"{prefix}:{row.number}")
            if problem.id in first_line:
                raise DataError(f"{row.where}: id {problem.id!r} was used at {first_line[problem.id]}")
            first_line[problem.id] = row.where
            problems.append(problem)
    return tuple(problems)


def _read_row(row: dict[str, Any], *, where: str, default_id: str) -> Problem:
    # IFEval's own files say `prompt`, and which instructions it holds.
    is_ifeval = "instruction_id_list" in row
    if is_ifeval:
        row = {**row, "question": row.get("prompt")}
    grader = row.get("grader", "instructions" if is_ifeval else "math")
    if grader not in GRADERS:
        raise DataError(f"{where}: grader {grader!r}; expected one of {', '.join(GRADERS)}")
    return Problem(
        id=read_text(row, "id", where, default=default_id),
        domain=read_text(row, "domain", where, default="math"),
        messages=read_messages(row, where),
        answer=None if grader in WITHOUT_ANSWER else _read_answer(row, where),
        grader=grader,
        metadata=_read_metadata(grader, row, where),
        language=read_text(row, "language", where) if "language" in row else None,
    )


def read_messages(row: Mapping[str, Any], where: str) -> tuple[Message, ...]:
    """The turns of a line with `question` or `messages`; the last one is the user's."""
    if ("question" in row) == ("messages" in row):
        found = ", ".join(sorted(row)) or "nothing"
        raise DataError(f"{where}: has {found}; expected exactly one of question and messages")
    if "question" in row:
        return ({"role": "user", "content": read_text(row, "question", where)},)
    turns = row["messages"]
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where}: messages must be a non-empty list of turns")
    for turn in turns:
        if not isinstance(turn, dict) or turn.get("role") not in ROLES:
            raise DataError(f"{where}: every turn needs a role out of {', '.join(ROLES)}; got {turn!r}")
        read_text(turn, "content", where)
    if turns[-1]["role"] != "user":
        raise DataError(f"{where}: the last turn is {turns[-1]['role']!r}; expected 'user'")
    return tuple({"role": turn["role"], "content": turn["content"]} for turn in turns)


def _read_metadata(grader: str, row: Mapping[str, Any], where: str) -> dict[str, Any]:
    if grader == "code":
        return {"tests": _read_tests(row, where)}
    if grader == "instructions":
        return {"instructions": _read_instructions(row, where)}
    return {}


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


def _read_answer(row: Mapping[str, Any], where: str) -> str:
    answer = row.get("answer")
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        return str(answer)
    text = read_text(row, "answer", where)
    if "####" in text:
        text = text.rpartition("####")[2]
        if not text.strip():
            raise DataError(f"{where}: nothing follows '####' in answer; expected the final answer")
    return text.strip()


def read_text(row: Mapping[str, Any], key: str, where: str, default: str | None = None) -> str:
    """The text at `key`. DataError if it is none or empty."""
    value = row.get(key, default)
    if not isinstance(value, str) or not value.strip():
        got = "missing" if key not in row else repr(value)
        raise DataError(f"{where}: {key} is {got}; expected non-empty text")
    return value
