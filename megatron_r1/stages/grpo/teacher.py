"""A teacher's logprobs of the student's samples, by its server (algorithms/on_policy_distill.py)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from megatron_r1.engines.base import Engine
from megatron_r1.types import Completion, RolloutGroup

REQUESTS_AT_ONCE = 64


def add_teacher_logprobs(engine: Engine, groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
    """The groups with every completion's tokens scored by the teacher's server, at temperature 1.

    EngineError if the server fails; ValueError for a sequence that has no room in it."""

    def score(group: RolloutGroup, completion: Completion) -> Completion:
        logprobs = engine.client.score([*group.prompt_ids.tolist(), *completion.token_ids.tolist()])
        return dataclasses.replace(completion, teacher_logprobs=logprobs[len(group.prompt_ids) :])

    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
        waiting = [[pool.submit(score, group, one) for one in group.completions] for group in groups]
        return [
            dataclasses.replace(group, completions=tuple(future.result() for future in futures))
            for group, futures in zip(groups, waiting, strict=True)
        ]
