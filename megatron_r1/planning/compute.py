"""Work and traffic of one microbatch on one rank: FLOPs, all-to-all and tensor-parallel bytes, per layer.

FLOPs of a matmul are 2 * rows * columns a token forward, twice that backward. Causal attention over a sequence of s
tokens costs s * H * (dk + dv) a token forward (2 * s / 2 keys, two products), as in DeepSeek-V3's accounting.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_r1.config.schema import ParallelConfig
from megatron_r1.config.shape import ModelShape
from megatron_r1.planning.hardware import GPU, Assumptions
from megatron_r1.planning.parameters import count_parameters
from megatron_r1.planning.stages import Chunk
from megatron_r1.planning.tensors import layer_numbers

BF16 = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Passes:
    """Seconds of one microbatch through one pipeline rank. `traffic` of them wait for the network."""

    forward: float
    backward: float
    forward_traffic: float
    backward_traffic: float

    @property
    def both(self) -> float:
        return self.forward + self.backward


def flops_per_token(shape: ModelShape, context: float) -> float:
    """Forward FLOPs per token, the whole model without MTP: 2 * active parameters (no embedding) + attention."""
    active = count_parameters(shape).active - shape.vocab_size * shape.hidden_size * (0 if shape.tie_embeddings else 1)
    return 2 * active + shape.num_layers * attention_flops(shape, context)


def attention_flops(shape: ModelShape, context: float) -> float:
    """Forward FLOPs per token of one layer's softmax(q k) v in a sequence of `context` tokens."""
    value = shape.mla.v_dim if shape.mla else shape.head_dim
    return context * shape.num_heads * (shape.head_dim + value)


def rank_passes(
    shape: ModelShape,
    parallel: ParallelConfig,
    chunks: list[Chunk],
    gpu: GPU,
    assume: Assumptions,
    *,
    row_tokens: float,
    context: float,
    recompute: bool,
    flops: float,
    dispatch_bytes: int = BF16,
) -> Passes:
    """A microbatch of `row_tokens` through all chunks of one pipeline rank. `flops`: the peak rate that is used."""
    shares = parallel.tensor * parallel.context
    layers = [layer for chunk in chunks for layer in chunk.layers]
    sparse = sum(shape.is_moe_layer(layer) for layer in layers)
    work = 0.0
    for kind, count in ((False, len(layers) - sparse), (True, sparse)):
        if count:
            fixed, routed = layer_numbers(shape, kind)
            work += count * (2 * (fixed + assume.expert_imbalance * routed) + attention_flops(shape, context))
    head = 2.0 * shape.vocab_size * shape.hidden_size if any(chunk.loss for chunk in chunks) else 0.0
    rate = flops * assume.matmul_efficiency
    seconds = row_tokens * work / shares / rate
    head_seconds = row_tokens * head / shares / rate
    local_tokens = row_tokens / shares
    exchange = sparse * all_to_all_seconds(shape, parallel, gpu, assume, local_tokens, dispatch_bytes)
    exchange += len(layers) * tensor_parallel_seconds(shape, parallel, gpu, assume, row_tokens / parallel.context)
    exchange += len(layers) * context_parallel_seconds(shape, parallel, gpu, assume, row_tokens)
    border = local_tokens * BF16 * shape.hidden_size / (gpu.network * assume.network_efficiency)
    borders = border * len(chunks) if parallel.pipeline_parallel > 1 else 0.0
    # Backward is twice the forward work; recomputation repeats a layer's forward, and the head's chunks always do.
    again = 1.0 if recompute else 0.0
    return Passes(
        forward=seconds + head_seconds + exchange + borders,
        backward=(2 + again) * seconds + 3 * head_seconds + (1 + again) * exchange + borders,
        forward_traffic=exchange + borders,
        backward_traffic=(1 + again) * exchange + borders,
    )


def all_to_all_seconds(
    shape: ModelShape, parallel: ParallelConfig, gpu: GPU, assume: Assumptions, tokens: float, dispatch_bytes: int
) -> float:
    """Dispatch and combine of one layer forward, for a rank's own `tokens`: k copies of h numbers each way. The copies
    that leave the node cross the network, the others NVLink (ranks of an expert-parallel group are neighbours)."""
    moe = shape.moe
    ranks = parallel.expert * parallel.expert_tensor
    if moe is None or ranks == 1:
        return 0.0
    sent = assume.expert_imbalance * tokens * moe.top_k * shape.hidden_size * (dispatch_bytes + BF16)
    inside = min(ranks, gpu.per_node)
    far, near = 1 - inside / ranks, (inside - 1) / ranks
    return sent * (far / gpu.network + near / gpu.nvlink) / assume.network_efficiency


def tensor_parallel_seconds(
    shape: ModelShape, parallel: ParallelConfig, gpu: GPU, assume: Assumptions, tokens: float
) -> float:
    """Two gathers and two reductions of [tokens, h] a layer forward (sequence parallel: arXiv 2205.05198, 4.2.2)."""
    tp = parallel.tensor
    if tp == 1:
        return 0.0
    link = gpu.nvlink if tp <= gpu.per_node else gpu.network
    return 4 * tokens * BF16 * shape.hidden_size * (tp - 1) / tp / (link * assume.network_efficiency)


def context_parallel_seconds(
    shape: ModelShape, parallel: ParallelConfig, gpu: GPU, assume: Assumptions, row_tokens: float
) -> float:
    """Keys and values of the rest of the row, gathered once a layer forward."""
    cp = parallel.context
    if cp == 1:
        return 0.0
    if shape.mla:
        width = shape.num_heads * (shape.head_dim + shape.mla.v_dim)
    else:
        width = 2 * shape.num_kv_heads * shape.head_dim
    link = gpu.nvlink if cp * parallel.tensor <= gpu.per_node else gpu.network
    received = row_tokens * (cp - 1) / cp * BF16 * width / parallel.tensor
    return received / (link * assume.network_efficiency)
