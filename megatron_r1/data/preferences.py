"""Preference pairs from jsonl files, and the part of a response that a reward model sees.

A line has `messages` (turns before the answer, the last one the user's), `chosen` and `rejected` (texts of the
answer). Other keys are not read. Left out: what makes one answer better; who judged it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from megatron_r1.data.jsonl import read_messages, read_text
from megatron_r1.data.lines import read_rows
from megatron_r1.data.template import Template, render_prompt
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import DataError
from megatron_r1.types import Message, Problem, TrainingSequence

Part = Literal["answer", "response"]
"""What is judged: the final answer only (helpfulness), or thought and answer (harmlessness). Paper, section 2.3.3."""

ANSWER = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """`where` names file and line."""

    where: str
    messages: tuple[Message, ...]
    chosen: str
    rejected: str


def judged_text(response: str, part: Part) -> str:
    """The part of a response that is judged. The answer: what stands in <answer> after the thought, else all that
    follows the thought; nothing if the thought does not end. A response without a thought is an answer."""
    if part == "response":
        return response
    _, closed, after = response.rpartition("</think>")
    if not closed and "<think>" in response:
        return ""
    # Not in the whole response: an <answer> inside the thought is not what the user sees.
    found = ANSWER.search(after)
    return (found[1] if found else after).strip()


def read_pairs(paths: Sequence[Path]) -> list[Pair]:
    """All pairs of all files, in order. DataError names file, line and reason."""
    return [pair for path in paths for pair in _read_file(path)]


def _read_file(path: Path) -> Iterator[Pair]:
    for row in read_rows(path, what="pairs", holds="messages, chosen and rejected"):
        texts = {key: read_text(row.fields, key, row.where) for key in ("chosen", "rejected")}
        if texts["chosen"] == texts["rejected"]:
            raise DataError(
                f"{row.where}: chosen and rejected are the same text; a pair must differ: leave the line out"
            )
        yield Pair(where=row.where, messages=read_messages(row.fields, row.where), **texts)


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedEncoder:
    """Prompt and judged part as token ids: what a reward model is trained on, and what its server is sent."""

    template: Template
    tokenizer: Tokenizer
    part: Part

    def encode(self, messages: Sequence[Message], response: str, *, where: str) -> np.ndarray:
        """Token ids i32[L]; the value of the last one is the response's."""
        prompt = Problem(id=where, domain="", messages=tuple(messages))
        text = render_prompt(prompt, self.template, self.tokenizer)
        prompt_ids = self.tokenizer.encode(text, start=self.template != "chat")
        return np.concatenate([prompt_ids, self.tokenizer.encode(judged_text(response, self.part))])

    def pair(self, pair: Pair) -> tuple[TrainingSequence, TrainingSequence]:
        """(chosen, rejected)."""
        chosen, rejected = (
            _valued(self.encode(pair.messages, text, where=pair.where)) for text in (pair.chosen, pair.rejected)
        )
        return chosen, rejected


def _valued(token_ids: np.ndarray) -> TrainingSequence:
    """A sequence whose last token's value counts. A row is shifted: position j stands for token j + 1, so a token is
    added that is masked in and never seen."""
    token_ids = np.append(token_ids, token_ids[-1]).astype(np.int32)
    last = np.arange(len(token_ids)) == len(token_ids) - 1
    return TrainingSequence(token_ids=token_ids, loss_mask=last, token_weight=last.astype(np.float32))
