"""Conversations from jsonl files, one object a line, strictly: a line that is none stops the run.

A line has the turns in one of several forms (turns.py): optionally a system turn, then user and assistant turns in
alternation, the last one the assistant's. Fields that are not read are counted. A file is streamed, so its size does
not matter. Left out: token ids (answers.py), and any judgement of the content.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_r1.data.turns import Turns, read_turns
from megatron_r1.errors import DataError
from megatron_r1.types import Message


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """`where` names file and line, for errors; the last of `messages` is an answer. `not_read`: fields of the line."""

    where: str
    messages: tuple[Message, ...]
    not_read: tuple[str, ...] = ()


def read_conversations(path: Path) -> Iterator[Conversation]:
    """The file's conversations in order. DataError names file, line and reason."""
    number = 0
    try:
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                where = f"{path}, line {number}"
                turns = _read_line(line, where)
                yield Conversation(where=where, messages=turns.messages, not_read=turns.not_read)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; check the data's files") from error
    if number == 0:
        raise DataError(f"{path}: the file has no conversations; expected one JSON object a line")


def _read_line(line: bytes, where: str) -> Turns:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text") from error
    if not text.strip():
        raise DataError(f"{where}: empty line; expected a JSON object with messages")
    try:
        row = json.loads(text)
    except ValueError as error:
        raise DataError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: a JSON {type(row).__name__}; expected an object with messages")
    return read_turns(row, where)
