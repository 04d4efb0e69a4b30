"""Which completions are kept for people, and what is kept of each."""

import numpy as np
import pytest

from megatron_r1.observe.rollouts import rollout_records
from megatron_r1.types import Completion, Problem, Reward, RolloutGroup


def group(name, texts):
    completions = tuple(
        Completion(
            token_ids=np.arange(len(text), dtype=np.int32), logprobs=np.zeros(len(text), np.float32),
            finish_reason="stop", weight_version=4, text=text,
        )
        for text in texts
    )  # fmt: skip
    rewards = tuple(Reward(total=len(text) + 0.5, parts={"accuracy": 1.0}) for text in texts)
    problem = Problem(id=name, domain="d", messages=(), answer="9")
    return RolloutGroup(problem=problem, prompt_ids=np.zeros(2, np.int32), completions=completions, rewards=rewards)


def test_records_go_round_the_groups():
    groups = [group("a", ["x", "yy"]), group("b", ["zzz"]), group("c", ["u", "vv"])]
    records = list(
        rollout_records(
            step=3,
            groups=groups,
            advantages=[[1, -1], [0], [2, -2]],
            prompt_texts=["pa", "pb", "pc"],
            limit=4,
        )
    )
    assert [(r["problem_id"], r["completion"], r["advantage"]) for r in records] == [
        ("a", "x", 1.0), ("b", "zzz", 0.0), ("c", "u", 2.0), ("a", "yy", -1.0),
    ]  # fmt: skip
    assert records[1] == {
        "step": 3, "problem_id": "b", "prompt": "pb", "completion": "zzz", "answer": "9", "reward": 3.5,
        "parts": {"accuracy": 1.0}, "advantage": 0.0, "tokens": 3,
        "finish_reason": "stop", "weight_version": 4,
    }  # fmt: skip


def test_limit_zero_writes_none_and_lengths_must_agree():
    groups = [group("a", ["x"])]
    assert list(rollout_records(step=0, groups=groups, advantages=[[1]], prompt_texts=["p"], limit=0)) == []
    with pytest.raises(ValueError, match="1 groups, 2 lists"):
        list(rollout_records(step=0, groups=groups, advantages=[[1], [2]], prompt_texts=["p"], limit=1))
