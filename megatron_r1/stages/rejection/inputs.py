"""What a stage of rejection sampling reads, all of it checked before anything is sampled.

Problems that overlap an evaluation problem, repeat an earlier question or leave no room for an answer are counted and
left out here; samples are decided about in stages/rejection/select.py.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_r1.data.decontaminate import EvaluationIndex, index_files, overlap_of
from megatron_r1.data.problems import normalised_text
from megatron_r1.data.tokenizer import Tokenizer, load_tokenizer
from megatron_r1.rewards.judge import Judge
from megatron_r1.rewards.wiring import check_problems
from megatron_r1.stages.common.sampling import given_problems, model_folder, with_room
from megatron_r1.stages.rejection.config import RejectionConfig
from megatron_r1.stages.rejection.mix import OtherData, check_source
from megatron_r1.types import Problem

EXAMPLES = 20
"""Overlapping problems that yield.json names for each evaluation file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RejectionInputs:
    """`counts`: problems given, left out by reason, and sampled. `contamination`: of each evaluation file."""

    folder: Path
    tokenizer: Tokenizer
    index: EvaluationIndex
    others: list[OtherData]
    judge: Judge | None
    problems: list[Problem]
    counts: dict[str, int]
    contamination: dict[str, Any]


def read_inputs(config: RejectionConfig) -> RejectionInputs:
    """ConfigError, DataError or JudgeError for what cannot be used as it is."""
    index = index_files(config.decontaminate, config.decontaminate_ngram)
    others = [check_source(source, index) for source in config.mix]
    given = given_problems(config.data, of_each_task=config.num_problems)
    if config.num_problems and config.data.files:
        given = given[: config.num_problems]
    check_problems(given, config.rewards, reward_models=False)
    judge = Judge(config.judge) if config.judge else None
    if judge is not None:
        judge.check()
    folder = model_folder(config.model, config.run_dir / "model")
    tokenizer = load_tokenizer(folder, thinking=config.data.thinking)
    owner = {problem.id: overlap_of(problem.messages, index) for problem in given}
    clean = [problem for problem in given if owner[problem.id] is None]
    different: dict[str, Problem] = {}
    for problem in clean:
        different.setdefault(normalised_text(problem), problem)
    problems = with_room(
        list(different.values()), template=config.data.template, rollout=config.rollout, tokenizer=tokenizer
    )
    counts = {
        "given": len(given),
        "contaminated": len(given) - len(clean),
        "repeated": len(clean) - len(different),
        "no_room": len(different) - len(problems),
        "sampled": len(problems),
    }
    contamination = _contamination(config, index, {name: found for name, found in owner.items() if found is not None})
    return RejectionInputs(
        folder=folder, tokenizer=tokenizer, index=index, others=others, judge=judge, problems=problems, counts=counts,
        contamination=contamination,
    )  # fmt: skip


def _contamination(config: RejectionConfig, index: EvaluationIndex, owner: dict[str, str]) -> dict[str, Any]:
    """Of each evaluation file: how many given problems overlap how many of its own, and the first of them."""
    found: dict[str, Any] = {}
    for file in map(str, config.decontaminate):
        pairs = {name: other for name, other in owner.items() if index.file_of[other] == file}
        found[file] = {
            "problems": len(pairs),
            "evaluation_problems": len(Counter(pairs.values())),
            "examples": dict(itertools.islice(pairs.items(), EXAMPLES)),
        }
    return found
