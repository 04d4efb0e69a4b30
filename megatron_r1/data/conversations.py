"""Conversations from jsonl files, one object a line, strictly: a line that is none stops the run.

A line has `messages`: optionally a system turn, then user and assistant turns in alternation, the last one the
assistant's. Other keys (id, domain, source, provenance) are for people and are not read. A file is streamed, so its
size does not matter. Left out: token ids (answers.py), and any judgement of the content.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_r1.data.jsonl import ROLES
from megatron_r1.errors import DataError
from megatron_r1.types import Message


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """`where` names file and line, for errors; the last of `messages` is an answer."""

    where: str
    messages: tuple[Message, ...]


def read_conversations(path: Path) -> Iterator[Conversation]:
    """The file's conversations in order. DataError names file, line and reason."""
    number = 0
    try:
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                where = f"{path}, line {number}"
                yield Conversation(where=where, messages=_read_line(line, where))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; check the data's files") from error
    if number == 0:
        raise DataError(f"{path}: the file has no conversations; expected one JSON object a line")


def _read_line(line: bytes, where: str) -> tuple[Message, ...]:
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
    turns = row.get("messages")
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where}: messages is {turns!r:.80}; expected a non-empty list of turns")
    messages = tuple(_read_turn(turn, where) for turn in turns)
    roles = [message["role"] for message in messages]
    spoken = roles[1:] if roles[0] == "system" else roles
    if not spoken or len(spoken) % 2 or spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise DataError(
            f"{where}: the turns are {roles}; expected an optional system turn, then user and assistant in "
            "alternation, ending with the assistant"
        )
    return messages


def _read_turn(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict) or turn.get("role") not in ROLES:
        raise DataError(f"{where}: every turn needs a role out of {', '.join(ROLES)}; got {turn!r:.80}")
    content = turn.get("content")
    if not isinstance(content, str) or not content.strip():
        raise DataError(f"{where}: a {turn['role']} turn's content is {content!r:.80}; expected non-empty text")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can write half of a surrogate pair, which no tokenizer takes
        raise DataError(f"{where}: a {turn['role']} turn's content has an unpaired surrogate") from error
    return {"role": turn["role"], "content": content}
