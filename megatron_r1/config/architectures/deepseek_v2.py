"""DeepSeek-V2 and V2-Lite: latent attention, a softmax router whose groups are ranked by their best expert."""

from __future__ import annotations

from typing import Any

from megatron_r1.config.architectures.base import Architecture, plain
from megatron_r1.config.architectures.latent import (
    HONOURED,
    LIMITED,
    WITHOUT_EFFECT,
    read_attention,
    read_experts,
    refuse_groups,
    refuse_groups_of_heads,
)
from megatron_r1.config.laws import turns_in_pairs, whole_heads
from megatron_r1.config.reader import Reader, short


def read(given: Reader) -> dict[str, Any]:
    mla = read_attention(given)
    groups, kept = _groups(given)
    moe = read_experts(given, router="softmax", groups=groups, kept=kept, normalise_topk=False)
    return plain(given, mla=mla, moe=moe, head_dim=mla.qk_nope_dim + mla.qk_rope_dim)


def refuse(given: Reader) -> None:
    refuse_groups_of_heads(given)
    if given.raw.get("topk_method") == "group_limited_greedy":
        refuse_groups(given)


def _groups(given: Reader) -> tuple[int, int | None]:
    """(groups of experts, how many of them a token may go to), where topk_method says that there are groups."""
    method = given.raw.get("topk_method")
    if method == "greedy":
        return 1, None
    if method != "group_limited_greedy":
        given.refuse(f"topk_method is {short(method)}; supported are greedy and group_limited_greedy")
    groups, kept = given.optional_integer("n_group"), given.optional_integer("topk_group")
    if groups is None or kept is None:
        given.refuse("topk_method is group_limited_greedy; it needs n_group and topk_group")
    return groups, kept


ARCHITECTURE = Architecture(
    name="deepseek_v2",
    classifier="DeepseekV2ForSequenceClassification",
    read=read,
    defaults={
        "n_shared_experts": 2, "routed_scaling_factor": 1.0, "q_lora_rank": 1536, "n_group": None, "topk_group": None,
        "first_k_dense_replace": 0, "topk_method": "greedy",
    },
    honoured=(*HONOURED, "num_experts", "topk_method"),
    limited={
        **LIMITED,
        "scoring_func": (("softmax",), "DeepSeek-V2's router"),
        "norm_topk_prob": ((False,), "vLLM alone reads it"),
    },
    without_effect={**WITHOUT_EFFECT, "head_dim": "set from qk_rope_head_dim"},
    aliases={"num_experts": "n_routed_experts"},
    laws=(whole_heads(), turns_in_pairs("qk_rope_head_dim")),
    refuse=refuse,
)  # fmt: skip
