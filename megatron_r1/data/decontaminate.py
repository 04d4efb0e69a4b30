"""Which texts share words with an evaluation problem: training on them would flatter the evaluation.

The index holds the evaluation questions' n-grams, so memory grows with the evaluation sets and not with the data, which
is looked at one text at a time. Left out: paraphrases and translations, which n-grams do not find.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_r1.data.jsonl import read_problems
from megatron_r1.data.turns import THOUGHT
from megatron_r1.data.words import ngrams, words_of
from megatron_r1.types import Message


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationIndex:
    """`owner` maps every n-gram of `size` words, and every shorter question as a whole, to the id of the first
    evaluation problem that has it; `file_of` names that problem's file."""

    size: int
    owner: Mapping[str, str]
    file_of: Mapping[str, str]

    def overlap(self, text: str) -> str | None:
        """The id of an evaluation problem that shares a run of `size` words with `text`, or, where either is shorter,
        has the same words. None if there is none."""
        words = words_of(text)
        runs = ngrams(words, min(self.size, len(words)))
        return next((self.owner[run] for run in runs if run in self.owner), None)


def index_files(paths: Sequence[Path], size: int) -> EvaluationIndex:
    """The index of the questions in jsonl files of problems (data/jsonl.py). DataError for a malformed line."""
    owner: dict[str, str] = {}
    file_of: dict[str, str] = {}
    for path in paths:
        for problem in read_problems([path]):
            name = problem.id if problem.id not in file_of else f"{path}: {problem.id}"
            file_of[name] = str(path)
            for turn in spoken_turns(problem.messages):
                words = words_of(turn)
                for run in ngrams(words, min(size, len(words))):
                    owner.setdefault(run, name)
    return EvaluationIndex(size=size, owner=owner, file_of=file_of)


def overlap_of(messages: Sequence[Message], index: EvaluationIndex) -> str | None:
    """The id of an evaluation problem that one of the turns overlaps; instructions to the model are not looked at."""
    found = (index.overlap(turn) for turn in spoken_turns(messages))
    return next((owner for owner in found if owner is not None), None)


def spoken_turns(messages: Sequence[Message]) -> list[str]:
    """The texts of the turns, an answer's thought too; without instructions to the model."""
    spoken = [message for message in messages if message["role"] != "system"]
    return [text for message in spoken for text in (message.get(THOUGHT), message["content"]) if text]
