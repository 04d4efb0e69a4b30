"""DeepSeek-V3 and R1, and what has their classes: Kimi-K2, Moonlight. A sigmoid router with a bias that corrects the
choice, whose groups are ranked by their best two experts; multi-token prediction."""

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
from megatron_r1.config.laws import Law, turns_in_pairs
from megatron_r1.config.reader import Reader


def read(given: Reader) -> dict[str, Any]:
    mla = read_attention(given)
    moe = read_experts(
        given,
        router="sigmoid",
        # To any of them, where either number is null.
        groups=given.optional_integer("n_group") or 1,
        kept=given.optional_integer("topk_group"),
        normalise_topk=given.boolean("norm_topk_prob"),
    )
    layers = given.count("num_nextn_predict_layers")
    return plain(given, mla=mla, moe=moe, num_mtp_layers=layers, head_dim=mla.qk_nope_dim + mla.qk_rope_dim)


def refuse(given: Reader) -> None:
    if "rope_interleave" in given.raw and given.raw["rope_interleave"] is None:
        given.refuse("rope_interleave is null, which transformers takes for false; only True is supported")
    refuse_groups_of_heads(given)
    refuse_groups(given)
    dense, layers = given.count("first_k_dense_replace"), given.integer("num_hidden_layers")
    if dense > layers and given.count("num_nextn_predict_layers"):
        given.refuse(
            f"first_k_dense_replace is {dense}; beside MTP layers, which are built with experts, it must be at "
            f"most num_hidden_layers {layers}"
        )


ARCHITECTURE = Architecture(
    name="deepseek_v3",
    classifier="DeepseekV3ForSequenceClassification",
    read=read,
    other_names=("kimi_k2",),
    defaults={
        "n_shared_experts": 1, "routed_scaling_factor": 2.5, "q_lora_rank": 1536, "n_group": 8, "topk_group": 4,
        "first_k_dense_replace": 3, "norm_topk_prob": True,
    },
    honoured=(*HONOURED, "num_local_experts", "norm_topk_prob", "num_nextn_predict_layers", "num_mtp_layers"),
    limited={
        **LIMITED,
        "rope_interleave": ((True,), "Megatron-Core and vLLM pair neighbours"),
        "scoring_func": (("sigmoid",), "DeepSeek-V3's router"),
        "topk_method": (("noaux_tc",), "DeepSeek-V3's router"),
    },
    without_effect=WITHOUT_EFFECT,
    aliases={"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"},
    laws=(
        turns_in_pairs("qk_rope_head_dim"),
        Law(
            "head_dim",
            lambda value, all_: value == all_["qk_rope_head_dim"],
            "be qk_rope_head_dim, or be left out",
        ),
    ),
    refuse=refuse,
)  # fmt: skip
