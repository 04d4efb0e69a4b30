"""What a rollout server holds and how long one decoding step takes.

A step reads the weights that its tokens meet and the keys and values of every running sequence, so at few sequences
the memory bandwidth is a floor: seconds >= bytes / bandwidth. Of the experts, 1 - (1 - k / E)^B are met by B tokens
that choose k of E evenly.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Protocol

from megatron_r1.config.schema import ParallelConfig
from megatron_r1.config.shape import ModelShape
from megatron_r1.planning.compute import BF16, flops_per_token
from megatron_r1.planning.hardware import GIB, GPU, Assumptions
from megatron_r1.planning.stages import pipeline_chunks
from megatron_r1.planning.tensors import chunk_numbers

PREFILL_BUFFERS_GIB = 3.0
"""vLLM's profiled peak of activations, CUDA graphs included; an assumption."""
FP8_BLOCK = 128
"""DeepSeek's."""


class StepCost(Protocol):
    """Seconds of one decoding step of `batch` sequences that hold `context_tokens` together, and of reading prompts."""

    def decode(self, batch: int, context_tokens: float) -> float: ...
    def prefill(self, tokens: float) -> float: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerMemory:
    """Bytes on one GPU of a server, and how many tokens of keys and values its cache holds."""

    weights: int
    cache_bytes_per_token: int
    cache: float
    """What remains for the cache; negative where the weights alone do not fit."""

    @property
    def cache_tokens(self) -> int:
        return max(0, int(self.cache // self.cache_bytes_per_token))


def server_memory(
    shape: ModelShape,
    gpu: GPU,
    *,
    tensor: int,
    memory_fraction: float,
    weight_bytes: int = BF16,
    expert_parallel: bool = False,
    cache_bytes: int = BF16,
) -> ServerMemory:
    """One GPU of a server of `tensor` GPUs. MLA's compressed keys and values are whole on every one of them."""
    weights = server_weights(shape, tensor, weight_bytes, expert_parallel=expert_parallel)
    per_token = cache_bytes_per_token(shape, tensor, cache_bytes)
    cache = memory_fraction * gpu.memory_gib * GIB - weights - PREFILL_BUFFERS_GIB * GIB
    return ServerMemory(weights=weights, cache_bytes_per_token=per_token, cache=cache)


def server_weights(shape: ModelShape, tensor: int, weight_bytes: int, *, expert_parallel: bool = False) -> int:
    """Bytes of weights on one GPU. In FP8 (1 byte) embedding, head and routers stay in bf16, and each block of
    128 x 128 has a scale of 4 bytes."""
    numbers = server_numbers(shape, tensor, expert_parallel=expert_parallel)
    if weight_bytes > 1:
        return weight_bytes * numbers
    kept = shape.vocab_size * shape.hidden_size * (1 if shape.tie_embeddings else 2) // tensor
    if shape.moe:
        sparse = sum(shape.is_moe_layer(layer) for layer in range(shape.num_layers))
        kept += sparse * shape.moe.num_experts * shape.hidden_size
    return numbers + kept + 4 * (numbers - kept) // FP8_BLOCK**2


def server_numbers(shape: ModelShape, tensor: int, *, expert_parallel: bool = False) -> int:
    """Parameters on one GPU of a tensor-parallel server, without MTP. A GPU has a part of every expert, or, expert
    parallel, its share of the experts whole."""
    alone = dataclasses.replace(shape, num_mtp_layers=0)
    layout = server_layout(tensor, expert_parallel=expert_parallel)
    (chunks,) = pipeline_chunks(alone, layout)
    return sum(sum(chunk_numbers(alone, layout, chunk)) for chunk in chunks)


def server_layout(tensor: int, *, expert_parallel: bool) -> ParallelConfig:
    """How a server's GPUs divide the model, in the trainer's terms."""
    return ParallelConfig(
        world_size=tensor,
        tensor=tensor,
        expert=tensor if expert_parallel else 1,
        expert_tensor=1 if expert_parallel else tensor,
        sequence=True,
    )


def cache_bytes_per_token(shape: ModelShape, tensor: int, cache_bytes: int = BF16) -> int:
    """Keys and values of all layers on one GPU: 70,272 for DeepSeek-V3 in bf16 (61 x (512 + 64) x 2)."""
    if shape.mla:
        return shape.num_layers * (shape.mla.kv_lora_rank + shape.mla.qk_rope_dim) * cache_bytes
    return shape.num_layers * 2 * max(1, shape.num_kv_heads // tensor) * shape.head_dim * cache_bytes


def _attention_flops(shape: ModelShape) -> int:
    """Of one new token and layer, for each token of its context; MLA works on the compressed keys (arXiv 2405.04434,
    section 2.1: the up projections are absorbed)."""
    mla = shape.mla
    return 2 * shape.num_heads * (2 * mla.kv_lora_rank + mla.qk_rope_dim if mla else 2 * shape.head_dim)


class RooflineCost:
    """StepCost of a server of `tensor` GPUs from bytes, FLOPs and the latency of its all-reduces."""

    def __init__(
        self,
        shape: ModelShape,
        gpu: GPU,
        assume: Assumptions,
        tensor: int,
        weight_bytes: int = BF16,
        *,
        expert_parallel: bool = False,
        cache_bytes: int = BF16,
    ) -> None:
        self.tensor = tensor
        self._cache_bytes = cache_bytes_per_token(shape, tensor, cache_bytes)
        self._bandwidth = gpu.memory_bandwidth * assume.memory_efficiency
        self._flops = tensor * gpu.bf16_flops * assume.matmul_efficiency
        # Products with FP8 weights run at FP8's rate; attention does not.
        faster = gpu.fp8_flops / gpu.bf16_flops if weight_bytes == 1 else 1.0
        moe = shape.moe
        sparse = sum(shape.is_moe_layer(layer) for layer in range(shape.num_layers))
        expert = 3 * shape.hidden_size * moe.expert_ffn_size if moe else 0
        # The GPU whose experts are asked for most holds the others up.
        uneven = (assume.expert_imbalance - 1) * 2 * sparse * moe.top_k * expert if moe and expert_parallel else 0.0
        self._token_flops = (flops_per_token(shape, 0.0) + uneven) / faster
        self._context_flops = shape.num_layers * _attention_flops(shape)
        # Two all-reduces a layer of [batch, h].
        inside = tensor <= gpu.per_node
        link = (gpu.nvlink if inside else gpu.network) * assume.network_efficiency
        reductions = 2 * shape.num_layers if tensor > 1 else 0
        self._latency = reductions * assume.collective_seconds * (1 if inside else 3)
        self._latency_per_token = reductions * 2 * shape.hidden_size * BF16 / link
        experts = sparse * moe.num_experts * expert / tensor if moe else 0
        self._weights = server_weights(shape, tensor, weight_bytes, expert_parallel=expert_parallel)
        self._experts = weight_bytes * experts
        self._missed = 1 - moe.top_k / moe.num_experts if moe else 0.0

    def decode(self, batch: int, context_tokens: float) -> float:
        read = (self.met_weights(batch) + context_tokens * self._cache_bytes) / self._bandwidth
        compute = (batch * self._token_flops + context_tokens * self._context_flops) / self._flops
        return max(read, compute) + self._latency + batch * self._latency_per_token

    def met_weights(self, batch: int) -> float:
        """Bytes of weights that `batch` tokens read on one GPU."""
        return self._weights - self._experts * self._missed**batch

    def prefill(self, tokens: float) -> float:
        return tokens * self._token_flops / self._flops


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearCost:
    """StepCost of a server that was measured: seconds a decoding step, a sampled token and a prompt token."""

    step: float
    token: float
    prompt_token: float = 0.0

    def decode(self, batch: int, context_tokens: float) -> float:
        return self.step + self.token * batch

    def prefill(self, tokens: float) -> float:
        return self.prompt_token * tokens
