"""What DeepSeek-V2 and V3 share: latent attention, and experts chosen from groups."""

from __future__ import annotations

from megatron_r1.config.architectures.base import Limits
from megatron_r1.config.model_shape import MLAShape, MoEShape
from megatron_r1.config.reader import Reader

HONOURED = (
    "moe_intermediate_size", "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "n_group", "topk_group",
    "first_k_dense_replace", "routed_scaling_factor", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim",
    "qk_rope_head_dim", "v_head_dim",
)  # fmt: skip
LIMITED: Limits = {
    "index_topk": ((None,), "the sparse attention of DeepSeek-V3.2"),
    "llama_4_scaling": ((None,), "vLLM alone reads it, and scales queries by their position"),
    "moe_layer_freq": ((1,), "every layer after the dense ones has experts"),
}
WITHOUT_EFFECT = {"moe_router_dtype": "vLLM alone reads it: the precision in which it routes"}


def read_attention(read: Reader) -> MLAShape:
    return MLAShape(
        q_lora_rank=read.optional_integer("q_lora_rank"),
        kv_lora_rank=read.integer("kv_lora_rank"),
        qk_nope_dim=read.integer("qk_nope_head_dim"),
        qk_rope_dim=read.integer("qk_rope_head_dim"),
        v_dim=read.integer("v_head_dim"),
    )


def read_experts(read: Reader, *, router: str, groups: int, kept: int | None, normalise_topk: bool) -> MoEShape:
    """`groups` of experts, of which a token may go to `kept` (None: to all)."""
    first = read.count("first_k_dense_replace", nullable=False)
    limited = groups > 1 and kept is not None
    return MoEShape(
        num_experts=read.integer("n_routed_experts"),
        top_k=read.integer("num_experts_per_tok"),
        expert_ffn_size=read.integer("moe_intermediate_size"),
        num_shared_experts=read.count("n_shared_experts", nullable=False),
        dense_layers=frozenset(range(min(first, read.integer("num_hidden_layers")))),
        router=router,
        num_groups=groups if limited else 1,
        topk_groups=kept if limited and kept else 1,
        routed_scaling=read.number("routed_scaling_factor"),
        normalise_topk=normalise_topk,
    )


def refuse_groups_of_heads(read: Reader) -> None:
    heads, groups = read.integer("num_attention_heads"), read.optional_integer("num_key_value_heads")
    if groups not in (None, heads):
        read.refuse(f"num_key_value_heads is {groups}; with latent attention it must be num_attention_heads, {heads}")


def refuse_groups(read: Reader) -> None:
    """What the group-limited router cannot choose from."""
    experts, top_k = read.count("n_routed_experts"), read.count("num_experts_per_tok")
    kept, all_groups = read.optional_integer("topk_group"), read.optional_integer("n_group")
    if not (experts and all_groups and kept):
        return
    if kept > all_groups:
        read.refuse(f"topk_group is {kept}; there are only {all_groups} groups (n_group)")
    if all_groups == 1:
        return
    if experts % all_groups or experts < 2 * all_groups:
        read.refuse(f"n_group is {all_groups}; groups must be equal, of two or more of the {experts} experts")
    if top_k > kept * (experts // all_groups):
        read.refuse(
            f"num_experts_per_tok is {top_k}; topk_group {kept} leaves {kept * (experts // all_groups)} experts"
        )
