"""Which problems a run trains on and which it is judged by, decided once and the same after every restart.

The held-out problems are drawn first; the training side is the rest *by question text*, because procedural
tasks repeat questions and files repeat rows. Left out: order and epochs (stream.py), prompts (template.py).
"""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_r1.config.schema import DataConfig
from megatron_r1.data.jsonl import read_problems
from megatron_r1.data.source import problems_from
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.types import Problem

HELD_OUT_STREAM = 0x484F4C44
"""Separates the held-out draw's random numbers from the training order's under one seed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProblemSplit:
    """`sources` hold every problem (procedural ones lazily); `held_out` and `validation` are for evaluation only.

    `kept_texts` are their normalised questions: the training stream skips any problem whose text is in it, and any that
    is not `usable` (its prompt leaves no room for an answer).
    """

    sources: tuple[Sequence[Problem], ...]
    held_out: tuple[Problem, ...]
    validation: tuple[Problem, ...]
    kept_texts: frozenset[str]
    usable: Callable[[Problem], bool] | None = None
    num_unusable: int = 0
    """Of the files' problems; procedural ones are looked at when they are drawn."""
    num_overlapping: int = 0
    """Of the files' problems, those whose question is one of holdout_files'."""

    def known(self) -> list[Problem]:
        """The files' problems, held-out ones too, and one of each procedural task: what a scorer is made for."""
        listed = [problem for source in self.sources if isinstance(source, tuple) for problem in source]
        tasks = [source[0] for source in self.sources if not isinstance(source, tuple)]
        return [*listed, *tasks, *self.held_out]

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def problem(self, index: int) -> Problem:
        """Problem `index` of the sources laid end to end."""
        for source in self.sources:
            if index < len(source):
                return source[index]
            index -= len(source)
        raise IndexError(f"problem index past the last of {len(self)}")

    def is_trainable(self, problem: Problem) -> bool:
        return normalised_text(problem) not in self.kept_texts and (self.usable is None or self.usable(problem))


def has_what_is_right(problem: Problem) -> bool:
    """Whether it says what is right: by an answer, or by what its grader needs instead."""
    return problem.answer is not None or bool(problem.metadata)


def load_problems(
    config: DataConfig,
    usable: Callable[[Problem], bool] | None = None,
    judged: Callable[[Problem], bool] = has_what_is_right,
) -> ProblemSplit:
    """Open the configured tasks or files and split off `config.holdout` held-out and `config.validation` validation
    problems with distinct questions.

    Problems that are not `usable` are left out, and those that are not `judged` are only trained on; with files, all
    are asked about now, so that a problem whose prompt cannot be made is found before the run. ConfigError for a bad
    task line or when nothing is left to train on; DataError for a malformed file, or what `usable` raises.
    """
    num_unusable = 0
    if sum(map(bool, (config.tasks, config.files, config.source))) != 1:
        raise ConfigError("data: expected exactly one of tasks, files and source")
    listed = bool(config.files or config.source)
    if listed:
        problems = read_problems(config.files) if config.files else problems_from(config.source)
        num_unusable = sum(not usable(problem) for problem in problems) if usable else 0
        if num_unusable == len(problems):
            raise DataError(
                f"data: none of the {len(problems)} problems leaves room for an answer; lower "
                "rollout.sampling.max_new_tokens or raise rollout.max_model_len"
            )
        sources: tuple[Sequence[Problem], ...] = (problems,)
    else:
        from megatron_r1.data.tasks import TaskProblems, parse_task  # reasoning-gym takes seconds to import

        tasks = [parse_task(line) for line in config.tasks]
        if len(set(config.tasks)) < len(tasks):
            raise ConfigError(f"data.tasks: a line is listed twice in {list(config.tasks)}; list each once")
        sources = tuple(TaskProblems(task, seed=config.seed, size=config.task_size) for task in tasks)
    given = read_problems(config.holdout_files) if config.holdout_files else ()
    given_texts = frozenset(map(normalised_text, given))
    split = split_problems(
        sources,
        holdout=0 if given else config.holdout,
        validation=config.validation,
        seed=config.seed,
        usable=usable,
        judged=judged,
        given_texts=given_texts,
    )
    overlapping = [p for p in sources[0] if normalised_text(p) in given_texts] if listed else []
    held_out = tuple(problem for problem in given if usable is None or usable(problem)) or split.held_out
    return dataclasses.replace(split, held_out=held_out, num_unusable=num_unusable, num_overlapping=len(overlapping))


def split_problems(
    sources: Sequence[Sequence[Problem]],
    *,
    holdout: int,
    seed: int,
    validation: int = 0,
    usable: Callable[[Problem], bool] | None = None,
    judged: Callable[[Problem], bool] = has_what_is_right,
    given_texts: frozenset[str] = frozenset(),
) -> ProblemSplit:
    """Hold out `holdout`, then `validation` problems with pairwise different normalised questions, drawn with `seed`.
    Problems that are not `judged`, as they have no right answer, are not drawn; those with `given_texts` are neither
    drawn nor trained on.

    ConfigError when there are not that many different questions, or when no other question is left.
    """
    whole = ProblemSplit(sources=tuple(sources), held_out=(), validation=(), kept_texts=frozenset(), usable=usable)
    chosen: dict[str, Problem] = {}
    left: set[str] = set()
    order = np.random.default_rng([HELD_OUT_STREAM, seed]).permutation(len(whole))
    for problem in _problems_in_order(whole, order):
        text = normalised_text(problem)
        if text in chosen or text in given_texts or not (usable is None or usable(problem)):
            continue
        if len(chosen) == holdout + validation or not judged(problem):
            left.add(text)
        else:
            chosen[text] = problem
        if len(chosen) == holdout + validation and left - set(chosen):  # something is left for training: it is done
            kept = tuple(chosen.values())
            return dataclasses.replace(
                whole, held_out=kept[:holdout], validation=kept[holdout:], kept_texts=frozenset(chosen) | given_texts
            )
    raise ConfigError(
        f"data.holdout: {holdout} (and data.validation {validation}) of {len(chosen)} different questions leaves none "
        f"to train on; expected at most {max(len(chosen) - 1, 0)} together; lower them or give more data"
    )


def normalised_text(problem: Problem) -> str:
    """All turns, compatibility-normalised, lower-cased, white space collapsed: equal means the same
    question."""
    if not problem.messages:
        raise DataError(f"problem {problem.id}: it has no messages")
    text = "\n".join(f"{message['role']}: {message['content']}" for message in problem.messages)
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _problems_in_order(split: ProblemSplit, order: np.ndarray) -> Iterator[Problem]:
    for index in order:
        yield split.problem(int(index))
