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
from megatron_r1.types import Completion, Problem


def job_of(
    problem: Problem, completion: Completion, group: Sequence[Completion], reward: CustomReward
) -> Mapping[str, Any]:
    """What the worker is told, as plain JSON."""
    fields = ("id", "domain", "answer", "grader", "language")
    return {
        "problem": {name: getattr(problem, name) for name in fields}
        | {"messages": [dict(message) for message in problem.messages], "metadata": dict(problem.metadata)},
        "completion": _plain(completion),
        "group": [_plain(one) for one in group] if reward.sees_group else [],
    }


def call(function: Callable[..., Any], job: Mapping[str, Any]) -> float:
    """The function's score, in the worker. Raises what the function raises; TypeError if it gives no number."""
    problem = Problem(**job["problem"] | {"messages": tuple(job["problem"]["messages"])})
    arguments: list[Any] = [problem, _completion(job["completion"])]
    if job["group"]:
        arguments.append(tuple(_completion(one) for one in job["group"]))
    score = function(*arguments)
    if isinstance(score, np.ndarray) and score.ndim == 0:
        score = score.item()
    if isinstance(score, bool | int | float | np.bool_ | np.number):
        return float(score)
    raise TypeError(f"it gave {score!r}; a reward is a number")


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
