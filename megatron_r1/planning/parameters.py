"""Parameter counts of a ModelShape, by where they live. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_r1.config.schema import ParallelConfig
from megatron_r1.config.shape import ModelShape
from megatron_r1.planning.state import optimizer_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterCount:
    """Numbers of weights: `routed` in routed experts, `dense` in everything else (router biases included), `mtp` in
    multi-token-prediction layers beyond their shared embedding and head, `active` used by one token (without MTP)."""

    dense: int
    routed: int
    mtp: int
    active: int

    @property
    def total(self) -> int:
        """Without MTP, as model cards count."""
        return self.dense + self.routed


def count_parameters(shape: ModelShape) -> ParameterCount:
    hidden, vocab = shape.hidden_size, shape.vocab_size
    head = hidden if shape.reward_head else 0 if shape.tie_embeddings else vocab * hidden
    embedding = vocab * hidden + head
    dense, routed, active = embedding + hidden, 0, embedding + hidden
    for layer in range(shape.num_layers):
        fixed, experts, used = _layer(shape, shape.is_moe_layer(layer))
        dense, routed, active = dense + fixed, routed + experts, active + fixed + used
    fixed, experts, _ = _layer(shape, shape.moe is not None)
    mtp = shape.num_mtp_layers * (fixed + experts + 2 * hidden * hidden + 3 * hidden)
    return ParameterCount(dense=dense, routed=routed, mtp=mtp, active=active)


def bytes_per_rank(
    shape: ModelShape,
    parallel: ParallelConfig,
    *,
    fp32: bool = False,
    distributed_optimizer: bool = True,
    moments: str = "fp32",
) -> int:
    """Weights, gradients and optimizer state of one rank, in bytes. Per weight 2 (bf16) + 4 (fp32 gradient) + 12 (fp32
    master and two Adam moments; 8 with moments in bf16), in fp32 4 + 4 + 8 (the weight is its own master); the
    distributed optimizer divides the last term by the data-parallel size. Activations are not included, nor the
    reference policy's copy in host memory."""
    held, sharded = 8 if fp32 else 6, optimizer_bytes(fp32=fp32, moments=moments)
    count = count_parameters(shape)
    expert_data = parallel.world_size / (parallel.expert * parallel.expert_tensor * parallel.pipeline_parallel)
    dense_data = parallel.data * parallel.context
    if not distributed_optimizer:
        dense_data = expert_data = 1
    dense = (held + sharded / dense_data) * count.dense / (parallel.tensor * parallel.pipeline_parallel)
    shards = parallel.pipeline_parallel * parallel.expert * parallel.expert_tensor
    return round(dense + (held + sharded / expert_data) * count.routed / shards)


def _layer(shape: ModelShape, sparse: bool) -> tuple[int, int, int]:
    """(weights outside routed experts, weights in routed experts, routed weights that one token uses)."""
    hidden = shape.hidden_size
    fixed = _attention(shape) + 2 * hidden
    if not sparse:
        return fixed + 3 * hidden * shape.ffn_size, 0, 0
    moe = shape.moe
    assert moe is not None
    expert = 3 * hidden * moe.expert_ffn_size
    bias = moe.num_experts if moe.router == "sigmoid" else 0
    fixed += moe.num_shared_experts * expert + moe.num_experts * hidden + bias
    return fixed, moe.num_experts * expert, moe.top_k * expert


def _attention(shape: ModelShape) -> int:
    hidden, heads, mla = shape.hidden_size, shape.num_heads, shape.mla
    if mla is None:
        queries, keys = heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        bias = (queries + 2 * keys if shape.qkv_bias else 0) + (hidden if shape.output_bias else 0)
        return hidden * (2 * queries + 2 * keys) + bias + (2 * shape.head_dim if shape.qk_norm else 0)
    width = mla.qk_nope_dim + mla.qk_rope_dim
    if mla.q_lora_rank is None:
        query = hidden * heads * width
    else:
        query = hidden * mla.q_lora_rank + mla.q_lora_rank * heads * width + mla.q_lora_rank
    key_value = hidden * (mla.kv_lora_rank + mla.qk_rope_dim) + mla.kv_lora_rank
    key_value += mla.kv_lora_rank * heads * (mla.qk_nope_dim + mla.v_dim)
    return query + key_value + heads * mla.v_dim * hidden
