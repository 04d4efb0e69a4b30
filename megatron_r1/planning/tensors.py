"""Every parameter that one rank holds, with its size, in the order in which Megatron's modules have them.

Names and sizes are the weight table's (weights/table.py). The order matters: the distributed optimizer cuts a rank's
parameters, laid end to end, into equal shards. Sizes hold for Megatron's local spec and for Transformer Engine's (which
fuses norms into linears, but holds the same numbers).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_r1.config.schema import ParallelConfig
from megatron_r1.config.shape import ModelShape
from megatron_r1.planning.stages import Chunk
from megatron_r1.weights.table import Entry, embedding_entry, head_entry, layer_entries, mtp_entries, shard_shape

ATTENTION = (
    "linear_proj",
    "linear_qkv",
    "linear_q_proj",
    "linear_q_down_proj",
    "linear_q_up_proj",
    "linear_kv_down_proj",
    "linear_kv_up_proj",
    "q_layernorm",
    "k_layernorm",
    "kv_layernorm",
)
"""Megatron's order of an attention's modules; elsewhere its order is the table's."""


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
    tied = shape.tie_embeddings and not shape.reward_head
    shared = parallel.pipeline_parallel > 1 and (tied or shape.num_mtp_layers > 0)
    found: list[Parameter] = []
    if chunk.embedding or chunk.mtp:
        alone = shared and not (chunk.embedding and chunk.loss)
        found.append(_parameter(embedding_entry(shape), parallel, own_bucket=alone))
    for layer in chunk.layers:
        found += _layer(shape, parallel, shape.is_moe_layer(layer), f"decoder.layers.{layer}")
    if chunk.loss:
        found.append(Parameter("decoder.final_layernorm.weight", shape.hidden_size))
    for number in range(chunk.mtp):
        entries = mtp_entries(shape, number, _own_experts(shape, parallel))
        found += _in_order(entries, parallel, trained=train_mtp)
    if chunk.loss and not (tied and (chunk.embedding or chunk.mtp)):
        head = head_entry(shape) or embedding_entry(shape)
        found.append(_parameter(head, parallel, name="output_layer.weight" if tied else "", own_bucket=tied and shared))
    return found


def router_bias_numbers(shape: ModelShape, chunk: Chunk) -> int:
    """fp32 numbers in buffers: the router's score-correction bias and its count of tokens, an expert each."""
    if shape.moe is None:
        return 0
    layers = sum(shape.is_moe_layer(layer) for layer in chunk.layers) + chunk.mtp
    return 2 * layers * _buffers(shape)


def _layer(shape: ModelShape, parallel: ParallelConfig, sparse: bool, at: str) -> list[Parameter]:
    return _in_order(layer_entries(shape, at, "", sparse, _own_experts(shape, parallel)), parallel)


def _own_experts(shape: ModelShape, parallel: ParallelConfig) -> Iterable[int]:
    """Those of one expert-parallel rank; ranks have equally many of equal experts."""
    return range(shape.moe.num_experts // parallel.expert) if shape.moe is not None else ()


def _in_order(entries: Iterable[Entry], parallel: ParallelConfig, *, trained: bool = True) -> list[Parameter]:
    """Parameters only: what the table marks float32 (the router's bias) is a buffer."""
    attention: list[Entry] = []
    ordered: list[Entry] = []
    for entry in entries:
        if ".self_attention." in entry.name:
            attention.append(entry)
            continue
        ordered += sorted(attention, key=lambda entry: ATTENTION.index(entry.name.split(".")[-2]))
        attention.clear()
        ordered.append(entry)
    return [_parameter(entry, parallel, trained=trained) for entry in ordered if not entry.float32]


def _parameter(
    entry: Entry, parallel: ParallelConfig, *, name: str = "", trained: bool = True, own_bucket: bool = False
) -> Parameter:
    count = parallel.expert_tensor if entry.expert else parallel.tensor
    return Parameter(
        name or entry.name,
        math.prod(shard_shape(entry, count)),
        # Megatron sums experts' gradients over a group of their own only if experts are split.
        expert=entry.expert and parallel.expert > 1,
        trained=trained,
        own_bucket=own_bucket,
    )


@dataclass(frozen=True, slots=True)
class LayerNumbers:
    """Numbers of one whole decoder layer: outside routed experts (router's bias included), and in all of them."""

    fixed: int
    routed: int


def numbers_of_layer(shape: ModelShape, sparse: bool) -> LayerNumbers:
    one = list(layer_entries(shape, "", "", sparse, range(1)))
    routed = sum(entry.size for entry in one if entry.expert)
    experts = shape.moe.num_experts if shape.moe is not None else 0
    return LayerNumbers(sum(entry.size for entry in one) - routed, routed * experts)


def layer_numbers(shape: ModelShape, sparse: bool) -> tuple[int, int]:
    """Numbers of one whole decoder layer that a token meets: (outside routed experts, in its own routed experts)."""
    found, moe = numbers_of_layer(shape, sparse), shape.moe
    if not sparse or moe is None:
        return found.fixed, 0
    return found.fixed - _buffers(shape), found.routed * moe.top_k // moe.num_experts


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
    one = [entry for entry in layer_entries(shape, "", "", sparse, range(1)) if not entry.float32]
    sizes = [(entry.expert, _parameter(entry, parallel).size) for entry in one]
    routed = sum(size for expert, size in sizes if expert)
    return sum(size for expert, size in sizes if not expert), routed * (moe.num_experts // parallel.expert)


def _buffers(shape: ModelShape) -> int:
    """Numbers of a sparse layer that are no parameters: the router's bias."""
    return sum(entry.size for entry in layer_entries(shape, "", "", True, ()) if entry.float32)
