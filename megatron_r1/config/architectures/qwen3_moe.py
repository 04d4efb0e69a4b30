"""Qwen3-MoE (30B-A3B, 235B-A22B): Qwen3 with experts chosen by a softmax router, none of them shared."""

from __future__ import annotations

from typing import Any

from megatron_r1.config.architectures.base import CHUNKS, PAIRS, WINDOW, Architecture, plain
from megatron_r1.config.model_shape import MoEShape
from megatron_r1.config.reader import Reader, short


def read(given: Reader) -> dict[str, Any]:
    moe = MoEShape(
        num_experts=given.integer("num_experts"),
        top_k=given.integer("num_experts_per_tok"),
        expert_ffn_size=given.integer("moe_intermediate_size"),
        num_shared_experts=0,
        dense_layers=_dense_layers(given),
        router="softmax",
        num_groups=1,
        topk_groups=1,
        routed_scaling=1.0,
        normalise_topk=given.boolean("norm_topk_prob"),
    )
    return plain(given, qk_norm=True, moe=moe, num_kv_heads=given.integer("num_key_value_heads"))


def _dense_layers(given: Reader) -> frozenset[int]:
    """Qwen3-MoE: layers that are listed, and those whose number (from 1) is no multiple of decoder_sparse_step."""
    listed = given.raw.get("mlp_only_layers") or []
    if not isinstance(listed, list) or any(isinstance(each, bool) or not isinstance(each, int) for each in listed):
        given.refuse(f"mlp_only_layers is {short(listed)}; it must be a list of layers' numbers")
    layers, step = given.integer("num_hidden_layers"), given.integer("decoder_sparse_step")
    dense = frozenset(layer for layer in range(layers) if layer in set(listed) or (layer + 1) % step)
    if len(dense) == layers:
        given.refuse("mlp_only_layers and decoder_sparse_step leave no layer with experts; one at least must have some")
    return dense


ARCHITECTURE = Architecture(
    name="qwen3_moe",
    classifier="Qwen3MoeForSequenceClassification",
    read=read,
    defaults={"num_key_value_heads": 4, "norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": None},
    honoured=(
        "head_dim", "moe_intermediate_size", "num_experts", "num_local_experts", "num_experts_per_tok",
        "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers",
    ),
    limited={**CHUNKS, "shared_expert_intermediate_size": ((0,), "vLLM alone reads it")},
    without_effect=WINDOW,
    aliases={"num_local_experts": "num_experts"},
    laws=(PAIRS,),
)  # fmt: skip
