"""The gate before the first update: do rollout engine and trainer agree on what the policy is?

A wrong weight name, a stale cache or a different rotary convention shows as different logprobs of the same tokens. RL
on such data learns noise and looks like bad luck, so a run stops here with the tokens that differ most.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch.distributed as dist

from megatron_r1.errors import MismatchError
from megatron_r1.policy.policy import Policy
from megatron_r1.policy.topology import data_parallel
from megatron_r1.types import PackedMicrobatch

WORST_TOKENS = 8


def check_mismatch(
    policy: Policy, rows: Sequence[PackedMicrobatch], *, bound: float, decode: Callable[[Sequence[int]], str]
) -> float:
    """Mean |logprob(engine) - logprob(trainer)| over all ranks' trained tokens.

    Raises MismatchError on every rank if it exceeds `bound` or is no number, naming the worst tokens.
    """
    own = policy.logprobs(rows)
    total, count, worst = 0.0, 0, []
    for row, logprobs in zip(rows, own, strict=True):
        difference = np.where(row.loss_mask[0], np.abs(logprobs - row.behaviour_logprobs[0]), 0.0)
        total += float(difference.sum())
        count += int(row.loss_mask.sum())
        ranks = np.where(np.isnan(difference), np.inf, difference)
        for position in np.argsort(-ranks)[:WORST_TOKENS]:
            context = decode(row.token_ids[0, max(0, position - 12) : position + 1].tolist())
            token = decode([int(row.labels[0, position])])
            pair = (float(row.behaviour_logprobs[0, position]), float(logprobs[position]))
            worst.append((float(ranks[position]), token, pair, context))
    gathered: list[tuple] = [()] * dist.get_world_size()
    dist.all_gather_object(gathered, (data_parallel()[0], total, count, worst))
    by_rank = {item[0]: item[1:] for item in gathered}  # ranks of one data-parallel rank report the same
    mean = sum(item[0] for item in by_rank.values()) / max(1, sum(item[1] for item in by_rank.values()))
    if not mean <= bound:  # NaN too
        found = sorted((entry for item in by_rank.values() for entry in item[2]), reverse=True)[:WORST_TOKENS]
        lines = [
            f"  {token!r} after {context!r}: rollout {pair[0]:.4f}, trainer {pair[1]:.4f}"
            for _, token, pair, context in found
        ]
        raise MismatchError(
            f"rollout and trainer disagree: mean |logprob difference| is {mean:.4f}, grpo.mismatch_bound is {bound}. "
            "Training on this would learn noise. Check weight sync and precision (rollout.dtype, train.dtype), or "
            "raise the bound if the difference is explained. Worst tokens:\n" + "\n".join(lines)
        )
    return mean
