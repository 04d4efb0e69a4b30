"""Bytes of activations that a rank keeps for the backward pass, layer by layer.

Two inventories of what autograd saves. LOCAL is Megatron's local spec with this project's attention and norms, as on
CPU; it was read from the tensors that autograd saves there and is tested against them. FUSED is Transformer Engine's
modules with flash attention, derived from what those keep and not measured. Both follow the accounting of "Reducing
Activation Recomputation in Large Transformer Models" (arXiv 2205.05198), extended to MLA and experts.

All functions give bytes per token of the row part that a rank works on. a: bytes of the compute dtype; h hidden; N, G
heads and key-value heads of this rank; f feed-forward; k experts a token; norms work in fp32 in LOCAL.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_r1.config.schema import ParallelConfig
from megatron_r1.config.shape import ModelShape


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """Which of the two inventories: `fused` is Transformer Engine's. `math_attention`: torch's unfused attention, which
    the CPU takes for MLA (key and value widths differ) and which keeps the probabilities."""

    dtype_bytes: int = 2
    fused: bool = True
    math_attention: bool = False

    def norm(self, width: float) -> float:
        """x and its normalised form in fp32 with 1 / rms; fused: x as it came and 1 / rms."""
        return self.dtype_bytes * width + 4 if self.fused else 8 * width + 4

    def swiglu(self, width: float) -> float:
        """Gate and up together, then: fused, the product only; local, silu(gate), the other factor, the product."""
        return (3 if self.fused else 5) * self.dtype_bytes * width


def layer_bytes(
    shape: ModelShape,
    parallel: ParallelConfig,
    inventory: Inventory,
    *,
    sparse: bool,
    segment_tokens: int,
    imbalance: float = 1.0,
) -> float:
    """What one decoder layer saves per token. `segment_tokens` is the length of a packed sequence (for unfused
    attention, whose probabilities grow with it); `imbalance` multiplies the routed tokens."""
    a, h, tp = inventory.dtype_bytes, shape.hidden_size, parallel.tensor
    # Sequence parallelism splits what lies between the tensor-parallel parts.
    split = tp if parallel.sequence else 1
    attention = _attention(shape, inventory, tp, split, segment_tokens)
    norms = 2 * inventory.norm(h) / split
    if not sparse:
        return norms + attention + a * h / split + inventory.swiglu(shape.ffn_size / tp)
    return norms + attention + _experts(shape, parallel, inventory, split, imbalance)


def checkpoint_bytes(shape: ModelShape, parallel: ParallelConfig, dtype_bytes: int) -> float:
    """Full recomputation keeps a layer's input alone."""
    return dtype_bytes * shape.hidden_size / (parallel.tensor if parallel.sequence else 1)


def head_bytes(shape: ModelShape, parallel: ParallelConfig, inventory: Inventory) -> float:
    """The last norm, the input of the chunked head (the logits are recomputed chunk by chunk) and the labels."""
    split = parallel.tensor if parallel.sequence else 1
    return inventory.norm(shape.hidden_size) / split + inventory.dtype_bytes * shape.hidden_size + 8


def mtp_bytes(shape: ModelShape, parallel: ParallelConfig, inventory: Inventory) -> float:
    """What a trained MTP layer saves beside its decoder layer: two norms, their joint output, and a head of its own."""
    split = parallel.tensor if parallel.sequence else 1
    h = shape.hidden_size
    own = 2 * inventory.norm(h) + 2 * inventory.dtype_bytes * h
    return own / split + head_bytes(shape, parallel, inventory)


def logits_chunk_bytes(shape: ModelShape, parallel: ParallelConfig, chunk_tokens: int, dtype_bytes: int) -> int:
    """The peak in one chunk's backward pass, model/logprob.py line by line: the logits as they are computed and in
    fp32, then shifted and exp kept, the centred values, their product with the probabilities, the gradient and one
    more operand: in fp32 six numbers for each of chunk x vocabulary / tp, and one in the compute dtype."""
    numbers = chunk_tokens * -(-shape.vocab_size // parallel.tensor)
    return numbers * (6 * 4 + (0 if dtype_bytes == 4 else dtype_bytes))


def _attention(shape: ModelShape, inventory: Inventory, tp: int, split: int, segment_tokens: int) -> float:
    a, h, mla = inventory.dtype_bytes, shape.hidden_size, shape.mla
    heads = shape.num_heads / tp
    total = a * h / split  # the input of the first projections
    if mla is None:
        d, groups = shape.head_dim, max(1.0, shape.num_kv_heads / tp)
        if tp > shape.num_kv_heads:  # keys and values are views of all ranks' gathered projections
            total += a * d * (shape.num_heads + 2 * shape.num_kv_heads)
        norms = heads * inventory.norm(d) + groups * inventory.norm(d) if shape.qk_norm else 0.0
        rotary = 0.0 if inventory.fused else 4 * a * d
        # q, k, v and the output, which is also the next projection's input. LOCAL keeps the joint qkv behind v.
        kept = a * d * (2 * heads + 2 * groups) + 4 * heads
        return total + norms + rotary + kept + (0.0 if inventory.fused else a * d * (heads + groups))
    key, value = mla.qk_nope_dim + mla.qk_rope_dim, mla.v_dim
    query_rank = mla.q_lora_rank or 0
    total += (inventory.norm(query_rank) if query_rank else 0.0) / split + inventory.norm(mla.kv_lora_rank) / split
    total += a * (query_rank + mla.kv_lora_rank) / split
    total += 0 if inventory.fused else 4 * a * mla.qk_rope_dim
    if inventory.math_attention:
        total += 4 * heads * (2 * key + value + segment_tokens)
    else:
        total += a * heads * (2 * key + 2 * value) + 4 * heads
    # Unfused attention keeps no output, fused attention's is the next projection's input.
    return total + (a * heads * value if inventory.math_attention else 0.0)


def _experts(shape: ModelShape, parallel: ParallelConfig, inventory: Inventory, split: int, imbalance: float) -> float:
    moe = shape.moe
    assert moe is not None
    a, h, k, experts = inventory.dtype_bytes, shape.hidden_size, moe.top_k, moe.num_experts
    shared = inventory.swiglu(moe.num_shared_experts * moe.expert_ffn_size / parallel.tensor)
    # Scores, choices and their probabilities; with limited groups also the places and the mask of those.
    router = 4 * experts + experts + 12 * k + 4 + 4 * experts + experts + 8 * k
    if moe.num_groups > 1:
        router += 8 * moe.num_groups * max(1, k // moe.topk_groups) + 8 * moe.topk_groups
    # Each routed token: its copy (the grouped linear's input), SwiGLU, and SwiGLU weighted by its probability. It meets
    # expert_tensor slices, so on each of those ranks it costs h and a slice of the feed-forward.
    routed = a * h + 4 + inventory.swiglu(moe.expert_ffn_size / parallel.expert_tensor)
    if not inventory.fused:
        routed += a * moe.expert_ffn_size / parallel.expert_tensor
    share = imbalance * k * parallel.expert_tensor / split
    return a * h / split + shared + router / split + share * routed
