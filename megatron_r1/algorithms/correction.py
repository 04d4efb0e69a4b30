"""What is done about samples that come from another policy than the one that is trained.

Three policies stand behind a token: p, which is trained; p_old, the trainer's before the rollout's first optimizer step
(the proximal policy); p_rollout, the engine's that sampled it. p_old and p_rollout differ by numerics (kernels,
precision, a router that chooses other experts) and, with sync_every above 1, by the steps since the last weight sync.

ratio_against trainer (decoupled PPO: arXiv 2110.00641; for stale samples of language models arXiv 2505.24298): the
ratio p / p_old is clipped, and a constant weight w stands before the clipped loss,

    token        w_t = p_old / p_rollout at token t
    sequence     w   = product of its sequence's w_t
    geometric    w   = (product of its sequence's w_t) ^ (1 / length)

which is truncated, min(w, high) (IMPALA, arXiv 1802.01561; for engines of language models:
fengyao.notion.site/off-policy-rl), or masked, w where low <= w <= high and else 0 (IcePop, arXiv 2510.18855, token by
token; richardli.xyz/rl-collapse has sequences).

ratio_against rollout (the coupled form, PPO's own): p / p_rollout is clipped and nothing is weighed.

A penalty for leaving the reference policy is not weighed, and stays where a token is masked. The default follows from
an experiment (docs/corrections.md). Here are the settings; the weights are computed in token_losses.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from megatron_r1.bounds import Share, at_least

METRICS = {
    "correction_weight": "mean weight p_old / p_rollout, after truncation or mask; 1 without a correction",
    "correction_cut": "share of tokens whose weight was truncated or masked",
}
"""What a loss with a correction reports."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """How a loss corrects for the policy that sampled: numerics of the engine, and age of the samples."""

    ratio_against: Literal["trainer", "rollout"] = "trainer"
    """What the policy's probability is divided by in the clipped ratio. trainer: its own before the rollout's first
    optimizer step. rollout: the engine's that sampled; then nothing is weighed, and no pass made for old logprobs."""
    weight: Literal["auto", "none", "token", "sequence", "geometric"] = "auto"
    """What a token's loss is weighed with: p_old / p_rollout (trainer over engine) of the token, its product over the
    sequence, or its geometric mean there. auto: token where samples may be stale (sync_every above 1, or recorded ones
    of older weights), else none."""
    beyond: Literal["truncate", "mask"] = "truncate"
    """truncate: a weight above `high` counts as `high`. mask: a weight below `low` or above `high` counts as 0, so the
    token (or sequence) is dropped."""
    low: Share = 0.5
    """Least weight that a mask keeps; IcePop's."""
    high: Annotated[float, at_least(1)] = 2.0
    """Largest weight. IcePop has 5; 1e9 is no limit, as in decoupled PPO."""

    def weight_of(self, *, stale: bool) -> Literal["none", "token", "sequence", "geometric"]:
        """`weight`, and what auto is for samples that may be `stale`."""
        if self.weight != "auto":
            return self.weight
        return "token" if stale and self.ratio_against == "trainer" else "none"

    def faults(self, field: str, *, stale: bool) -> list[str]:
        """A weight that would correct twice, and settings of a weight that there is not; `stale` as in `weight_of`."""
        if self.ratio_against == "rollout" and self.weight not in ("auto", "none"):
            return [
                f"{field}.weight is {self.weight} with ratio_against rollout, whose ratio corrects for the sampler "
                "already: use weight none, or ratio_against trainer"
            ]
        changed = [name for name in ("beyond", "low", "high") if getattr(self, name) != getattr(Correction(), name)]
        if self.weight_of(stale=stale) != "none":
            if self.beyond == "mask" or "low" not in changed:
                return []
            return [f"{field}.low is {self.low}, and only a mask has a least weight: use beyond mask, or leave low out"]
        why = "ratio_against is rollout" if self.ratio_against == "rollout" else f"weight is {self.weight}"
        why += " and sync_every 1" if why == "weight is auto" else ""
        return [
            f"{field}.{name} is {getattr(self, name)}, and no token has a weight, since {why}: use weight token, "
            f"sequence or geometric with ratio_against trainer, or leave {name} out"
            for name in changed
        ]
