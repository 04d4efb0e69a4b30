"""From a problem and a response to the reward that GRPO sees: total = sum of weight * part (paper, section
2.2.2).

Cheap verdicts are reached here; everything else goes to the grading pool, so that grading overlaps
generation. Reward models are somebody else's to run: a Preference is asked for its score.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from megatron_r1.config.custom_reward import CustomReward
from megatron_r1.config.schema import RewardConfig
from megatron_r1.errors import DataError, RewardError
from megatron_r1.rewards.custom import in_worker, job_of
from megatron_r1.rewards.format import format_score
from megatron_r1.rewards.grader import Grader, Runner, WorkerFunction
from megatron_r1.rewards.pool import GradingPool, PoolCounts, Verdict
from megatron_r1.rewards.preference import Preference
from megatron_r1.rewards.table import grader_of, graders_of
from megatron_r1.types import Completion, Problem, Reward

REMEMBERED = 8192
"""Verdicts that are kept, so that equal answers of a group are graded once."""

LANGUAGE = WorkerFunction(name="language", function="megatron_r1.rewards.language:grade")


class Scorer:
    """Scores responses with the configured weights. Owns its workers: close it, or use it as a context
    manager."""

    def __init__(
        self,
        config: RewardConfig,
        problems: Sequence[Problem],
        *,
        preferences: Sequence[Preference] = (),
        custom: Sequence[CustomReward] = (),
    ) -> None:
        """`problems` to come: their graders are made ready now, be it a worker's imports or a sandbox. `preferences`
        score the problems of their domains.

        DataError for problems that a grader's runner refuses, ConfigError where this machine has no sandbox that is
        allowed."""
        self.config = config
        graders = graders_of(problems)
        self._runners: dict[str, Runner] = {
            grader.name: grader.runner(config, [one for one in problems if one.grader == grader.name])
            for grader in graders
            if grader.runner is not None
        }
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
        functions = [grader.worker for grader in graders if grader.worker is not None]
        functions += [LANGUAGE] if self._needs_language else []
        functions += [in_worker(reward) for reward in custom]
        self._pool = GradingPool(
            num_workers=config.num_workers, timeout_seconds=config.timeout_seconds, functions=functions
        )
        self._in_worker = {function.name for function in functions}
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
        those parts that apply: accuracy (unless only reward models score the problem) and format, each 0 or 1 (of
        rewards.graders, accuracy may be a share); language, the share of the thought's words in the problem's language,
        if it is asked for; the scores of the reward models for the problem's domain; and rewards.custom, whose failure
        is raised as a RewardError, as is that of rewards.graders.

        DataError for a problem whose grader is unknown or has no reference answer to compare with.
        """
        if isinstance(completion, str):
            completion = completion_of(completion)
        response = completion.text
        parts = {"format": format_score(response)}
        waiting: dict[str, Future[Verdict] | Future[float]] = {}
        grader = grader_of(problem)
        answer = grader.reads(response, self.config.answer_from) if grader.has_accuracy else None
        quick = grader.quick(problem, answer)
        for preference in self._preferences:
            if problem.domain in preference.config.domains:
                waiting[preference.config.name] = preference.submit(problem, response)
        if not grader.has_accuracy:
            if not waiting:
                raise DataError(f"problem {problem.id}: no reward model scores domain {problem.domain!r}")
        elif quick is None:
            waiting["accuracy"] = self._submitted(grader, problem, answer)
        else:
            parts["accuracy"] = float(quick)
        if self._needs_language:
            language = problem.language or self.config.language
            waiting["language"] = self._pool.submit("language", response, reference=language)
        for reward in self._custom:
            job = job_of(problem, completion, group or (completion,), reward)
            waiting[reward.name] = self._pool.submit(reward.grader, "", reference=None, metadata=job, bounded=False)
        return self._when_done(parts, waiting, problem)

    def submit_vote(self, problem: Problem, answer: str, other: str) -> Future[Verdict]:
        """Whether two answers to a problem, taken out of their responses, are the same in a majority vote."""
        grader = grader_of(problem)
        grader = grader.votes_as or grader
        asked = dataclasses.replace(problem, grader=grader.name, answer=answer)
        quick = grader.quick(asked, other)
        if quick is None:
            return self._submitted(grader, asked, other)
        return _known(float(quick))

    def _submitted(self, grader: Grader, problem: Problem, answer: str | None) -> Future[Verdict]:
        """The verdict of the grader's runner or worker function."""
        if grader.name in self._runners:
            return self._runners[grader.name].submit(problem, answer)
        if grader.worker is None or grader.worker.name not in self._in_worker:
            raise DataError(
                f"problem {problem.id}: grader {problem.grader!r}, but this scorer was made for problems without it; "
                "give it such a problem when it is made"
            )
        if answer is None:
            return _known(0.0)
        if grader.once:
            return self._graded_once(grader.worker, problem, answer, grader.metadata(problem))
        return self._pool.submit(
            grader.worker.name, answer, reference=problem.answer, metadata=grader.metadata(problem)
        )

    def _graded_once(
        self, function: WorkerFunction, problem: Problem, answer: str, metadata: Mapping[str, Any]
    ) -> Future[Verdict]:
        """The verdict on an answer, shared with whoever gave the same one. Verdicts for lack of time are not shared."""
        key = (problem.grader, problem.id, problem.answer, answer)
        with self._lock:  # responses are submitted by several threads
            known = self._verdicts.get(key)
            if known is not None and not _is_lost(known):
                return known
            future = self._pool.submit(function.name, answer, reference=problem.answer, metadata=metadata)
            self._verdicts[key] = future
            if len(self._verdicts) > REMEMBERED:
                del self._verdicts[next(iter(self._verdicts))]  # the oldest
            return future

    def check_started(self) -> None:
        """Wait until every grading worker runs; WorkerStartError if one cannot. Call it at the start of a run."""
        self._pool.check_started()

    def counts(self) -> PoolCounts:
        """Answers that needed a worker, and how many of them timed out or raised: cumulative, never reset."""
        return sum((runner.counts() for runner in self._runners.values()), self._pool.counts())

    def close(self) -> None:
        self._pool.close()
        for runner in self._runners.values():
            runner.close()

    def _when_done(
        self, parts: dict[str, float], waiting: Mapping[str, Future[Verdict] | Future[float]], problem: Problem
    ) -> Future[Reward]:
        """The reward of `parts` and of the verdicts that are still being reached."""
        future: Future[Reward] = Future()
        left = set(waiting)
        own = {reward.name: f"rewards.custom {reward.path}" for reward in self._custom}
        worker = grader_of(problem).worker
        if worker is not None and worker.user:
            own["accuracy"] = worker.name
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


def _known(score: float) -> Future[Verdict]:
    """A verdict that is there already."""
    future: Future[Verdict] = Future()
    future.set_result(Verdict(score=score))
    return future


def _is_lost(graded: Future[Verdict]) -> bool:
    """Is there no verdict, and will there be none?"""
    return graded.done() and (graded.cancelled() or graded.exception() is not None or graded.result().timed_out)
