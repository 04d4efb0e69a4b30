"""Which of the samples are kept, and why each other one is not.

The rules run in the order of REASONS and the first that a sample breaks is its reason: first what costs nothing, then
the judge, last what depends on what was kept before. Samples are taken in the order of problems and of their numbers,
which is as good as a draw, since all samples of a problem come from one distribution; so the same samples give the same
result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_r1.data.decontaminate import EvaluationIndex
from megatron_r1.data.dedup import SeenTexts
from megatron_r1.rewards.format import extract_answer
from megatron_r1.rewards.judge import Judgement
from megatron_r1.rewards.table import grader_of
from megatron_r1.stages.rejection.config import RejectionConfig
from megatron_r1.stages.rejection.readability import prose_reason, structural_reason
from megatron_r1.types import Problem

REASONS = {
    "truncated": "cut off at the most new tokens",
    "missing_tags": "not exactly one thought and one answer",
    "incorrect": "the rule found it wrong",
    "mixed_language": "thought not in the problem's language",
    "long_paragraph": "a paragraph that is too long",
    "code_block": "code where no program was asked for",
    "repetition": "lines or phrases that repeat",
    "judged_incorrect": "the judge found it wrong",
    "judge_failed": "the judge came to no verdict",
    "contaminated": "overlaps an evaluation problem",
    "over_limit": "the problem has its samples already",
    "duplicate": "the same as a kept one of the problem",
    "near_duplicate": "nearly the same as a kept one",
}
"""Every reason with its meaning, in the order in which they are looked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One graded completion; `parts` are its rewards (accuracy, format and, where it is looked at, language)."""

    problem: Problem
    number: int
    text: str
    finish_reason: str
    num_tokens: int
    parts: Mapping[str, float]

    @property
    def key(self) -> tuple[str, int]:
        return self.problem.id, self.number


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """`reason` None: kept. `correct_by`: who found a sample right that got so far."""

    sample: Sample
    reason: str | None
    correct_by: str | None = None


def first_reason(sample: Sample, config: RejectionConfig) -> str | None:
    """The first reason to drop a sample that its own text and rewards give. A sample that the judge may still find
    right is not yet "incorrect"."""
    reason = structural_reason(sample.text, finish_reason=sample.finish_reason)
    if reason is None and sample.parts["accuracy"] != 1.0 and not may_be_judged(sample, config):
        reason = "incorrect"
    return reason or prose_reason(
        sample.text,
        config.filters,
        language_score=sample.parts.get("language", 1.0),
        is_code=grader_of(sample.problem).writes_code,
    )


def may_be_judged(sample: Sample, config: RejectionConfig) -> bool:
    """Whether a judge is asked about a sample that its rule did not find right: there is a reference, and an answer
    that could say the same in other words. Programs and procedural tasks have rules that know better."""
    judge, problem = config.judge, sample.problem
    if judge is None or not grader_of(problem).may_be_judged or problem.answer is None:
        return False
    return (not judge.domains or problem.domain in judge.domains) and bool(
        extract_answer(sample.text, config.rewards.answer_from)
    )


def select(
    samples: Sequence[Sample],
    reasons: Sequence[str | None],
    *,
    config: RejectionConfig,
    seen: SeenTexts,
    index: EvaluationIndex,
    judgements: Mapping[tuple[str, int], Judgement],
) -> list[Decision]:
    """A decision about each sample, in order. All samples of a problem come in one call.

    `reasons`: first_reason of each. `judgements`: by sample key, of those that were judged. `seen` holds what earlier
    calls kept and gets what this one keeps.
    """
    kept: dict[str, int] = {}
    decisions = []
    for sample, reason in zip(samples, reasons, strict=True):
        judgement = judgements.get(sample.key)
        if reason is None and judgement is not None:
            reason = "judge_failed" if judgement.failure else None if judgement.value else "judged_incorrect"
        name = sample.problem.id
        if reason is None and index.overlap(sample.text) is not None:
            reason = "contaminated"
        if reason is None and kept.get(name, 0) == config.keep_per_problem:
            reason = "over_limit"
        reason = reason or seen.add(sample.text, scope=name)
        kept[name] = kept.get(name, 0) + (reason is None)
        correct_by = None if reason else "rule" if judgement is None else "judge"
        decisions.append(Decision(sample=sample, reason=reason, correct_by=correct_by))
    return decisions
