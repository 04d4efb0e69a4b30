"""Every parameter that one rank holds, with its size, in the order in which Megatron's modules have them.

The order matters: the distributed optimizer cuts a rank's parameters, laid end to end, into equal shards. Sizes hold
for Megatron's local spec and for Transformer Engine's (which fuses norms into linears, but holds the same numbers).
h: hidden size; tp splits attention, dense and shared feed-forward and the vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_r1.config.schema import ParallelConfig
from megatron_r1.config.shape import ModelShape
from megatron_r1.planning.stages import Chunk


@dataclass(frozen=True, slots=True)
class Parameter:
    """`size` in numbers; `expert`: its gradients are summed over the expert-data-parallel group; `trained`: it has a
    gradient; `own_bucket`: Megatron gives it a bucket alone (an embedding that first and last stage share)."""

    name: str
    size: int
    expert: bool = False
    trained: bool = True
    own_bucket: bool = False


def chunk_parameters(
    shape: ModelShape, parallel: ParallelConfig, chunk: Chunk, *, train_mtp: bool = False
) -> list[Parameter]:
    """The parameters of `chunk` on one tensor- and expert-parallel rank. MTP layers are frozen unless `train_mtp`."""
    h, tp = shape.hidden_size, parallel.tensor
    rows = -(-shape.vocab_size // tp) * h
    tied = shape.tie_embeddings and not shape.reward_head
    shared = parallel.pipeline_parallel > 1 and (tied or shape.num_mtp_layers > 0)
    found: list[Parameter] = []
    if chunk.embedding or chunk.mtp:
        alone = shared and not (chunk.embedding and chunk.loss)
        found.append(Parameter("embedding.word_embeddings.weight", rows, own_bucket=alone))
    for layer in chunk.layers:
        found += _layer(shape, parallel, shape.is_moe_layer(layer), f"decoder.layers.{layer}")
    if chunk.loss:
        found.append(Parameter("decoder.final_layernorm.weight", h))
    for number in range(chunk.mtp):
        found += [
            Parameter(item.name, item.size, item.expert, train_mtp)
            for item in _mtp(shape, parallel, f"mtp.layers.{number}")
        ]
    if chunk.loss and shape.reward_head:
        found.append(Parameter("reward_head.weight", h))
    elif chunk.loss and not (tied and (chunk.embedding or chunk.mtp)):
        found.append(Parameter("output_layer.weight", rows, own_bucket=tied and shared))
    return found


def router_bias_numbers(shape: ModelShape, chunk: Chunk) -> int:
    """fp32 numbers in buffers: the router's score-correction bias and its count of tokens, an expert each."""
    if shape.moe is None or shape.moe.router != "sigmoid":
        return 0
    layers = sum(shape.is_moe_layer(layer) for layer in chunk.layers) + chunk.mtp
    return 2 * layers * shape.moe.num_experts


def _layer(shape: ModelShape, parallel: ParallelConfig, sparse: bool, at: str) -> Iterator[Parameter]:
    h, tp = shape.hidden_size, parallel.tensor
    yield Parameter(f"{at}.input_layernorm.weight", h)
    for name, size in _attention(shape, tp):
        yield Parameter(f"{at}.self_attention.{name}", size)
    yield Parameter(f"{at}.pre_mlp_layernorm.weight", h)
    if not sparse:
        yield Parameter(f"{at}.mlp.linear_fc1.weight", 2 * h * shape.ffn_size // tp)
        yield Parameter(f"{at}.mlp.linear_fc2.weight", h * shape.ffn_size // tp)
        return
    moe = shape.moe
    assert moe is not None
    yield Parameter(f"{at}.mlp.router.weight", moe.num_experts * h)
    width = moe.expert_ffn_size // parallel.expert_tensor
    # Megatron sums experts' gradients over a group of their own only if experts are split.
    apart = parallel.expert > 1
    for expert in range(moe.num_experts // parallel.expert):
        yield Parameter(f"{at}.mlp.experts.local_experts.{expert}.linear_fc1.weight", 2 * h * width, apart)
        yield Parameter(f"{at}.mlp.experts.local_experts.{expert}.linear_fc2.weight", h * width, apart)
    if moe.num_shared_experts:
        width = moe.num_shared_experts * moe.expert_ffn_size // tp
        yield Parameter(f"{at}.mlp.shared_experts.linear_fc1.weight", 2 * h * width)
        yield Parameter(f"{at}.mlp.shared_experts.linear_fc2.weight", h * width)


def _mtp(shape: ModelShape, parallel: ParallelConfig, at: str) -> Iterator[Parameter]:
    """DeepSeek-V3, section 2.2: two norms, a projection of two hidden states to one, a decoder layer, a norm."""
    h = shape.hidden_size
    yield Parameter(f"{at}.enorm.weight", h)
    yield Parameter(f"{at}.hnorm.weight", h)
    yield Parameter(f"{at}.eh_proj.weight", 2 * h * h // parallel.tensor)
    yield from _layer(shape, parallel, shape.moe is not None, f"{at}.transformer_layer")
    yield Parameter(f"{at}.final_layernorm.weight", h)


def _attention(shape: ModelShape, tp: int) -> Iterator[tuple[str, int]]:
    h, heads, mla = shape.hidden_size, shape.num_heads // tp, shape.mla
    if mla is None:
        d = shape.head_dim
        rows = (shape.num_heads + 2 * shape.num_kv_heads) * d // tp
        yield "linear_proj.weight", heads * d * h
        if shape.output_bias:
            yield "linear_proj.bias", h
        yield "linear_qkv.weight", rows * h
        if shape.qkv_bias:
            yield "linear_qkv.bias", rows
        if shape.qk_norm:
            yield "q_layernorm.weight", d
            yield "k_layernorm.weight", d
        return
    d = mla.qk_nope_dim + mla.qk_rope_dim
    yield "linear_proj.weight", heads * mla.v_dim * h
    if mla.q_lora_rank is None:
        yield "linear_q_proj.weight", h * heads * d
    else:
        # The down projections are whole on every tensor-parallel rank.
        yield "linear_q_down_proj.weight", h * mla.q_lora_rank
        yield "linear_q_up_proj.weight", mla.q_lora_rank * heads * d
    yield "linear_kv_down_proj.weight", h * (mla.kv_lora_rank + mla.qk_rope_dim)
    yield "linear_kv_up_proj.weight", mla.kv_lora_rank * heads * (mla.qk_nope_dim + mla.v_dim)
    if mla.q_lora_rank is not None:
        yield "q_layernorm.weight", mla.q_lora_rank
    yield "kv_layernorm.weight", mla.kv_lora_rank


def layer_numbers(shape: ModelShape, sparse: bool) -> tuple[int, int]:
    """Numbers of one whole decoder layer that a token meets: (outside routed experts, in its own routed experts)."""
    whole = ParallelConfig()
    fixed = sum(item.size for item in _layer(shape, whole, sparse, "") if ".local_experts." not in item.name)
    moe = shape.moe
    routed = 3 * shape.hidden_size * moe.expert_ffn_size * moe.top_k if sparse and moe is not None else 0
    return fixed, routed


def chunk_numbers(shape: ModelShape, parallel: ParallelConfig, chunk: Chunk) -> tuple[int, int, int]:
    """(dense, expert, frozen) numbers of a chunk with frozen MTP: the sums of `chunk_parameters`, counted by kind of
    layer for speed."""
    dense = expert = 0
    for sparse in (False, True):
        layers = sum(shape.is_moe_layer(layer) == sparse for layer in chunk.layers)
        if layers:
            fixed, routed = _layer_sums(shape, parallel, sparse)
            expert += layers * (routed if parallel.expert > 1 else 0)
            dense += layers * (fixed if parallel.expert > 1 else fixed + routed)
    rest = chunk_parameters(shape, parallel, dataclasses.replace(chunk, layers=()))
    frozen = sum(item.size for item in rest if not item.trained)
    return dense + sum(item.size for item in rest if item.trained), expert, frozen


def _layer_sums(shape: ModelShape, parallel: ParallelConfig, sparse: bool) -> tuple[int, int]:
    """Numbers of one decoder layer on a rank: (outside routed experts, in its routed experts)."""
    moe = shape.moe
    if not sparse or moe is None:
        return sum(item.size for item in _layer(shape, parallel, sparse, "")), 0
    # Experts are alike: one is listed, and counted as often as the rank has it.
    one = list(_layer(shape, dataclasses.replace(parallel, expert=moe.num_experts), sparse, ""))
    routed = sum(item.size for item in one if ".local_experts." in item.name)
    return sum(item.size for item in one) - routed, routed * (moe.num_experts // parallel.expert)
