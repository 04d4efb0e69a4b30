"""Conversations from jsonl files, one object a line, strictly: a line that is none stops the run.

A line has the turns in one of several forms (turns.py): optionally a system turn, then user and assistant turns in
alternation, the last one the assistant's. Fields that are not read are counted. A file is streamed, so its size does
not matter. Left out: token ids (answers.py), and any judgement of the content.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_r1.data.lines import read_rows
from megatron_r1.data.turns import read_turns
from megatron_r1.types import Message


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """`where` names file and line, for errors; the last of `messages` is an answer. `not_read`: fields of the line."""

    where: str
    messages: tuple[Message, ...]
    not_read: tuple[str, ...] = ()


def read_conversations(path: Path) -> Iterator[Conversation]:
    """The file's conversations in order. DataError names file, line and reason."""
    for row in read_rows(path, what="conversations", holds="messages"):
        turns = read_turns(row.fields, row.where)
        yield Conversation(where=row.where, messages=turns.messages, not_read=turns.not_read)
