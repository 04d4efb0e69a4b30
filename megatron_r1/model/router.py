"""The router as transformers computes it, where Megatron-Core's differs.

Megatron ranks a group of experts by its best top_k // topk_group scores; DeepSeek-V3 always by its best two. Megatron
always renormalises the probabilities of a sigmoid router, and never those of a single expert. A scaling of 0 it takes
for none.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.transformer.moe.router import TopKRouter

from megatron_r1.config.shape import MoEShape


def megatron_routes_alike(moe: MoEShape) -> bool:
    """Whether Megatron's own router computes this one; it is used if so."""
    if moe.routed_scaling == 0:
        return False
    limited = moe.topk_groups < moe.num_groups
    if moe.router == "softmax":
        return (moe.top_k > 1 or not moe.normalise_topk) and not limited
    return moe.normalise_topk and moe.top_k > 1 and (not limited or moe.top_k // moe.topk_groups == 2)


class SpecifiedRouter(TopKRouter):
    """TopKRouter without its auxiliary losses and capacities, none of which is used here."""

    def __init__(self, *args: object, moe: MoEShape, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # pyright: ignore[reportArgumentType]
        self.moe = moe

    def routing(self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None, **_: object):
        """logits f32[S, B, E] -> probabilities f32[T, E], 0 where not chosen, and the choice bool[T, E]."""
        logits_TE = logits.view(-1, self.moe.num_experts)
        chosen = getattr(self.router_replay, "choose", None)  # routing.py's, where Megatron has its own
        weights_TK, experts_TK = route(logits_TE, self.expert_bias, self.moe, chosen=chosen)
        rows_T1 = torch.arange(len(logits_TE), device=logits.device)[:, None]
        # Assignment by index is deterministic on GPUs, as each place is written once.
        probabilities_TE = torch.zeros_like(logits_TE).index_put((rows_T1, experts_TK), weights_TK)
        chosen_TE = torch.zeros_like(logits_TE, dtype=torch.bool)
        chosen_TE[rows_T1, experts_TK] = True
        self._apply_expert_bias(chosen_TE, padding_mask=padding_mask)
        return probabilities_TE, chosen_TE


def route(
    logits_TE: torch.Tensor,
    bias_E: torch.Tensor | None,
    moe: MoEShape,
    *,
    chosen: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights [T, K], experts i64[T, K]): DeepSeek-V3 (arXiv 2412.19437, section 2.1.2), DeepSeek-V2 or
    Qwen3-MoE, as in transformers' DeepseekV3TopkRouter, DeepseekV2TopkRouter and Qwen3MoeTopKRouter. `chosen` may put
    others in the place of the best."""
    sigmoid = moe.router == "sigmoid"
    scores_TE = logits_TE.float().sigmoid() if sigmoid else logits_TE.float().softmax(dim=-1)
    ranked_TE = scores_TE.detach() if bias_E is None else scores_TE.detach() + bias_E
    if moe.topk_groups < moe.num_groups:
        ranked_TE = _within_best_groups(ranked_TE, moe)
    experts_TK = ranked_TE.topk(moe.top_k, dim=-1).indices
    if chosen is not None:
        experts_TK = chosen(experts_TK)
    weights_TK = scores_TE.gather(1, experts_TK)
    if moe.normalise_topk:
        weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + (1e-20 if sigmoid else 0.0))
    return (weights_TK * moe.routed_scaling).to(logits_TE.dtype), experts_TK


def _within_best_groups(ranked_TE: torch.Tensor, moe: MoEShape) -> torch.Tensor:
    """-inf outside the topk_groups groups with the largest sums of their two best experts, or (softmax) the largest
    best expert."""
    grouped_TGE = ranked_TE.view(len(ranked_TE), moe.num_groups, -1)
    best_TG = (
        grouped_TGE.topk(2 if moe.router == "sigmoid" else 1, dim=-1)
        .values.sum(dim=-1)
        .topk(moe.topk_groups, dim=-1)
        .indices
    )
    outside_TG = torch.ones(grouped_TGE.shape[:2], dtype=torch.bool, device=ranked_TE.device).scatter(1, best_TG, False)
    return grouped_TGE.masked_fill(outside_TG[:, :, None], float("-inf")).flatten(1)
