"""A reward of one's own, by import path: `--rewards.custom my_module:brevity=0.5` (docs/extending.md).

    def brevity(problem: Problem, completion: Completion) -> float: ...
    def brevity(problem: Problem, completion: Completion, group: tuple[Completion, ...]) -> float: ...

It sees the completion as the engine gave it: text, token ids, logprobs, finish reason; with a third parameter all
completions of the problem too. It runs in a grading worker, which cannot write files and is killed past
rewards.timeout_seconds: the score is then 0, and counted. What it raises stops the run with the file and line, as a
reward that fails silently would be trained on.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from megatron_r1.config.custom_reward import CustomReward
from megatron_r1.rewards.grader import WorkerFunction
from megatron_r1.types import Completion, Problem


def job_of(
    problem: Problem, completion: Completion, group: Sequence[Completion], reward: CustomReward
) -> Mapping[str, Any]:
    """What the worker is told, as plain JSON."""
    return {
        "problem": plain_problem(problem),
        "completion": _plain(completion),
        "group": [_plain(one) for one in group] if reward.sees_group else [],
    }


def in_worker(reward: CustomReward) -> WorkerFunction:
    """What the worker is to import."""
    function = f"{__name__}:grade"
    return WorkerFunction(name=reward.grader, function=function, user=reward.path, field="rewards.custom")


def grade(function: Callable[..., Any], answer: str, reference: str | None, job: Mapping[str, Any]) -> float:
    """The function's score, in the worker. Raises what the function raises; TypeError if it gives no number."""
    arguments: list[Any] = [problem_of(job["problem"]), _completion(job["completion"])]
    if job["group"]:
        arguments.append(tuple(_completion(one) for one in job["group"]))
    return number_in(function(*arguments), "a reward is a number")


def number_in(score: object, expected: str) -> float:
    """A number that a user's function gave, also one of numpy's. TypeError for anything else."""
    if isinstance(score, np.ndarray) and score.ndim == 0:
        score = score.item()
    if isinstance(score, bool | int | float | np.bool_ | np.number):
        return float(score)
    raise TypeError(f"it gave {score!r}; {expected}")


def plain_problem(problem: Problem) -> dict[str, Any]:
    """As plain JSON."""
    fields = ("id", "domain", "answer", "grader", "language")
    return {name: getattr(problem, name) for name in fields} | {
        "messages": [dict(message) for message in problem.messages],
        "metadata": dict(problem.metadata),
    }


def problem_of(found: Mapping[str, Any]) -> Problem:
    """What plain_problem made plain."""
    fields: dict[str, Any] = {**found, "messages": tuple(found["messages"])}
    return Problem(**fields)


def _plain(completion: Completion) -> dict[str, Any]:
    return {
        "token_ids": base64.b64encode(np.asarray(completion.token_ids, np.int32).tobytes()).decode(),
        "logprobs": base64.b64encode(np.asarray(completion.logprobs, np.float32).tobytes()).decode(),
        "finish_reason": completion.finish_reason,
        "weight_version": completion.weight_version,
        "text": completion.text,
    }


def _completion(found: Mapping[str, Any]) -> Completion:
    arrays: dict[str, Any] = {
        name: np.frombuffer(base64.b64decode(found[name]), dtype)
        for name, dtype in (("token_ids", np.int32), ("logprobs", np.float32))
    }
    return Completion(**dict(found) | arrays)
