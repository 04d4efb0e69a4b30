"""From a problem and a response to the reward that GRPO sees: total = sum of weight * part (paper, section
2.2.2).

Cheap verdicts are reached here; everything else goes to the grading pool, so that grading overlaps
generation. Reward models are somebody else's to run: a Preference is asked for its score.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Protocol

import numpy as np

from megatron_r1.config.custom_reward import CustomReward
from megatron_r1.config.schema import PreferenceConfig, RewardConfig
from megatron_r1.errors import DataError, RewardError
from megatron_r1.rewards.code_grader import CodeGrader
from megatron_r1.rewards.custom import job_of
from megatron_r1.rewards.format import after_thought, extract_answer, format_score
from megatron_r1.rewards.pool import GradingPool, PoolCounts, Verdict
from megatron_r1.types import Completion, Problem, Reward

INTEGER = re.compile(r"0|-?[1-9]\d{0,17}")
"""An integer in its one canonical spelling."""

REMEMBERED = 8192
"""Verdicts that are kept, so that equal answers of a group are graded once."""

MAX_QUESTION_CHARACTERS = 4000
"""Of a question's end, which asks; its grader looks for what kind of answer is asked for."""


def check_preference_problems(problems: Iterable[Problem], config: RewardConfig) -> None:
    """DataError for a problem that needs a reward model and whose domain none scores: said before the run, which may
    draw it only after a thousand steps (preference_from_step)."""
    scored = {domain for preference in config.preferences for domain in preference.domains}
    for problem in problems:
        if problem.domain not in scored:
            known = ", ".join(sorted(scored)) or "none"
            raise DataError(
                f"problem {problem.id}: no reward model scores domain {problem.domain!r} (those of "
                f"rewards.preferences: {known}); add the domain to a reward model, or leave the problem out"
            )


class Preference(Protocol):
    """A reward model, wherever it runs."""

    @property
    def config(self) -> PreferenceConfig: ...
    def submit(self, problem: Problem, response: str) -> Future[float]: ...


class Scorer:
    """Scores responses with the configured weights. Owns its workers: close it, or use it as a context
    manager."""

    def __init__(
        self,
        config: RewardConfig,
        *,
        graders: tuple[str, ...] = ("math", "reasoning_gym"),
        programs: Sequence[Problem] = (),
        preferences: Sequence[Preference] = (),
        custom: Sequence[CustomReward] = (),
        instructions: bool = False,
    ) -> None:
        """`programs` are the coding problems to come: their tests are checked and the sandbox is opened now.
        `preferences` score the problems of their domains. `instructions`: problems with that grader are to come.

        DataError for tests that are malformed, ConfigError where this machine has no sandbox that is allowed."""
        self.config = config
        self._programs = CodeGrader(config, programs) if programs else None
        self._preferences = tuple(preferences)
        self._weights = {
            "accuracy": config.accuracy_weight,
            "format": config.format_weight,
            "language": config.language_weight,
            **{preference.config.name: preference.config.weight for preference in preferences},
            **{reward.name: reward.weight for reward in custom},
        }
        self._custom = tuple(custom)
        self._needs_language = bool(config.language_weight) or config.record_language
        if self._needs_language and "language" not in graders:
            graders = (*graders, "language")
        if instructions:
            graders = (*graders, "instructions")
        graders = (*graders, *(reward.grader for reward in custom))
        self._pool = GradingPool(
            num_workers=config.num_workers, timeout_seconds=config.timeout_seconds, graders=graders
        )
        self._verdicts: dict[tuple[str, str, str | None, str], Future[Verdict]] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def submit(
        self, problem: Problem, completion: Completion | str, group: Sequence[Completion] = ()
    ) -> Future[Reward]:
        """Start scoring one completion of `group`; of a bare text no more is known. `.result()` is its Reward with
        those parts that apply: accuracy (unless only reward models score the problem) and format, each 0 or 1;
        language, the share of the thought's words in the problem's language, if it is asked for; the scores of the
        reward models for the problem's domain; and rewards.custom, whose failure is raised as a RewardError.

        DataError for a problem whose grader is unknown or has no reference answer to compare with.
        """
        if isinstance(completion, str):
            completion = completion_of(completion)
        response = completion.text
        parts = {"format": format_score(response)}
        in_box = problem.grader not in ("code", "instructions")  # neither is written in one
        answer = extract_answer(response, self.config.answer_from if in_box else "answer")
        waiting: dict[str, Future[Verdict] | Future[float]] = {}
        by_rule = problem.grader not in ("code", "preference", "instructions")
        quick = _quick_verdict(problem, answer) if by_rule else None
        for preference in self._preferences:
            if problem.domain in preference.config.domains:
                waiting[preference.config.name] = preference.submit(problem, response)
        if problem.grader == "preference":
            if not waiting:
                raise DataError(f"problem {problem.id}: no reward model scores domain {problem.domain!r}")
        elif problem.grader == "instructions":
            said = answer if answer is not None else after_thought(response)
            if said.strip():
                waiting["accuracy"] = self._pool.submit("instructions", said, reference=None, metadata=problem.metadata)
            else:  # cut off in its thought
                parts["accuracy"] = 0.0
        elif problem.grader == "code":
            if answer is None and self.config.answer_from != "answer":
                answer = after_thought(response)  # programs stand in fences, not in boxes
            waiting["accuracy"] = self._submit_program(problem, answer)
        elif quick is None and answer is not None:
            waiting["accuracy"] = self._graded_once(problem, answer)
        else:
            parts["accuracy"] = float(bool(quick))
        if self._needs_language:
            language = problem.language or self.config.language
            waiting["language"] = self._pool.submit("language", response, reference=language)
        for reward in self._custom:
            job = job_of(problem, completion, group or (completion,), reward)
            waiting[reward.name] = self._pool.submit(reward.grader, "", reference=None, metadata=job, bounded=False)
        return self._when_done(parts, waiting, problem)

    def submit_answer(self, problem: Problem, answer: str) -> Future[Verdict]:
        """The verdict of a rule (math, exact or reasoning_gym) on an answer that was taken out of its response."""
        quick = _quick_verdict(problem, answer)
        if quick is None:
            return self._graded_once(problem, answer)
        future: Future[Verdict] = Future()
        future.set_result(Verdict(score=float(quick)))
        return future

    def _graded_once(self, problem: Problem, answer: str) -> Future[Verdict]:
        """The verdict on an answer, shared with whoever gave the same one. Verdicts for lack of time are not shared."""
        key = (problem.grader, problem.id, problem.answer, answer)
        metadata = problem.metadata
        if problem.grader == "math" and problem.messages:
            metadata = {**metadata, "question": problem.messages[-1]["content"][-MAX_QUESTION_CHARACTERS:]}
        with self._lock:  # responses are submitted by several threads
            known = self._verdicts.get(key)
            if known is not None and not _is_lost(known):
                return known
            future = self._pool.submit(problem.grader, answer, reference=problem.answer, metadata=metadata)
            self._verdicts[key] = future
            if len(self._verdicts) > REMEMBERED:
                del self._verdicts[next(iter(self._verdicts))]  # the oldest
            return future

    def _submit_program(self, problem: Problem, answer: str | None) -> Future[Verdict]:
        if self._programs is None:
            raise DataError(f"problem {problem.id}: grader 'code', but this scorer was made without a sandbox")
        return self._programs.submit(problem.metadata["tests"], answer)

    def check_started(self) -> None:
        """Wait until every grading worker runs; WorkerStartError if one cannot. Call it at the start of a run."""
        self._pool.check_started()

    def counts(self) -> PoolCounts:
        """Answers that needed a worker, and how many of them timed out or raised: cumulative, never reset."""
        counts = self._pool.counts()
        return counts if self._programs is None else counts + self._programs.counts()

    def close(self) -> None:
        self._pool.close()
        if self._programs is not None:
            self._programs.close()

    def _when_done(
        self, parts: dict[str, float], waiting: Mapping[str, Future[Verdict] | Future[float]], problem: Problem
    ) -> Future[Reward]:
        """The reward of `parts` and of the verdicts that are still being reached."""
        future: Future[Reward] = Future()
        left = set(waiting)
        own = {reward.name: f"rewards.custom {reward.path}" for reward in self._custom}
        lock = threading.Lock()

        def take(name: str, graded: Future[Verdict] | Future[float]) -> None:
            with lock:
                if graded.cancelled():
                    future.cancel()
                elif (error := graded.exception()) is not None:
                    if not future.done():
                        future.set_exception(error)
                else:
                    found = graded.result()
                    if isinstance(found, Verdict):
                        if name in own and found.error is not None and not future.done():
                            future.set_exception(RewardError(f"{own[name]} on problem {problem.id} {found.error}"))
                        found = found.score if name == "language" or name in own else float(found.correct)
                    parts[name] = found
                left.discard(name)
                if not left and not future.done():
                    future.set_result(self._reward(parts))

        if not waiting:
            future.set_result(self._reward(parts))
        for name, graded in waiting.items():
            graded.add_done_callback(functools.partial(take, name))
        return future

    def _reward(self, parts: Mapping[str, float]) -> Reward:
        ordered = {name: parts[name] for name in self._weights if name in parts}
        # 0 * NaN is NaN: a part that is recorded only has no part in the total.
        weighted = [(self._weights[name], part) for name, part in ordered.items()]
        return Reward(total=sum(weight * part for weight, part in weighted if weight), parts=ordered)


def completion_of(text: str) -> Completion:
    """A text of which no tokens are known."""
    nothing = np.zeros(0)
    return Completion(
        token_ids=nothing.astype(np.int32),
        logprobs=nothing.astype(np.float32),
        finish_reason="stop",
        weight_version=0,
        text=text,
    )


def _is_lost(graded: Future[Verdict]) -> bool:
    """Is there no verdict, and will there be none?"""
    return graded.done() and (graded.cancelled() or graded.exception() is not None or graded.result().timed_out)


def _quick_verdict(problem: Problem, answer: str | None) -> bool | None:
    """The verdict where no parser is needed, else None.

    Sound: a reference answer is right by definition, whatever the grader; no answer is wrong; the "exact"
    rule is string equality; and under "math" two canonical integers are equal only if their spellings are.
    The last does not hold for reasoning-gym, where several integers may be right.
    """
    if problem.grader not in ("math", "exact", "reasoning_gym"):
        raise DataError(f"problem {problem.id}: grader {problem.grader!r}; expected math, exact or reasoning_gym")
    if problem.answer is None and problem.grader != "reasoning_gym":
        raise DataError(f"problem {problem.id}: grader {problem.grader!r} needs an answer and there is none")
    if not answer:
        return False
    if problem.answer is not None and answer == problem.answer.strip():
        return True
    if problem.grader == "exact":
        return False
    if problem.grader == "math" and INTEGER.fullmatch(answer) and INTEGER.fullmatch(str(problem.answer).strip()):
        return False
    return None
