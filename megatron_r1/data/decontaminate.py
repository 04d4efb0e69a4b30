"""Which texts share words with an evaluation problem: training on them would flatter the evaluation.

The index holds the evaluation questions' n-grams, so memory grows with the evaluation sets and not with the data, which
is looked at one text at a time. A question of fewer words than an n-gram has is looked for as a whole, wherever it
stands, so that words before or after it do not hide it; how seldom unrelated texts hold one is measured by
tools/measure_contamination.py (docs/rejection.md). Left out: paraphrases and translations, which n-grams do not find.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_r1.data.jsonl import read_problems
from megatron_r1.data.turns import THOUGHT
from megatron_r1.data.words import ngrams, words_of
from megatron_r1.types import Message

LEAST_WORDS = 5
"""A question of fewer words (`What is 17?`) counts only where it is all of a turn: it says too little."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationIndex:
    """`owner` maps every n-gram of `size` words, and every shorter question as a whole, to the id of the first
    evaluation problem that has it; `file_of` names that problem's file; `short` gives the lengths in words of the
    shorter questions by their first word."""

    size: int
    owner: Mapping[str, str]
    file_of: Mapping[str, str]
    short: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def overlap(self, text: str) -> str | None:
        """The id of an evaluation problem that shares a run of `size` words with `text`, or whose question is shorter
        and stands in it, or is all of it. None if there is none."""
        words = words_of(text)
        runs = itertools.chain(ngrams(words, min(self.size, len(words))), self._short_runs(words))
        return next((self.owner[run] for run in runs if run in self.owner), None)

    def _short_runs(self, words: Sequence[str]) -> Iterator[str]:
        return (
            " ".join(words[start : start + length])
            for start, word in enumerate(words)
            for length in self.short.get(word, ())
        )


def index_files(paths: Sequence[Path], size: int) -> EvaluationIndex:
    """The index of the questions in jsonl files of problems (data/jsonl.py). DataError for a malformed line."""
    return index_turns(
        (
            (problem.id, str(path), turn)
            for path in paths
            for problem in read_problems([path])
            for turn in spoken_turns(problem.messages)
        ),
        size,
    )


def index_turns(turns: Iterable[tuple[str, str, str]], size: int) -> EvaluationIndex:
    """The index of (problem's id, its file, text of a turn); equal ids of several files stay apart."""
    owner: dict[str, str] = {}
    file_of: dict[str, str] = {}
    short: dict[str, set[int]] = {}
    for name, file, turn in turns:
        if file_of.setdefault(name, file) != file:
            name = f"{file}: {name}"
            file_of[name] = file
        words = words_of(turn)
        if LEAST_WORDS <= len(words) < size:
            short.setdefault(words[0], set()).add(len(words))
        for run in ngrams(words, min(size, len(words))):
            owner.setdefault(run, name)
    by_first = {word: tuple(sorted(lengths)) for word, lengths in short.items()}
    return EvaluationIndex(size=size, owner=owner, file_of=file_of, short=by_first)


def overlap_of(messages: Sequence[Message], index: EvaluationIndex) -> str | None:
    """The id of an evaluation problem that one of the turns overlaps; instructions to the model are not looked at."""
    found = (index.overlap(turn) for turn in spoken_turns(messages))
    return next((owner for owner in found if owner is not None), None)


def spoken_turns(messages: Sequence[Message]) -> list[str]:
    """The texts of the turns, an answer's thought too; without instructions to the model."""
    spoken = [message for message in messages if message["role"] != "system"]
    return [text for message in spoken for text in (message.get(THOUGHT), message["content"]) if text]
