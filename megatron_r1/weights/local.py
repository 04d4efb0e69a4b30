"""This rank's parameters under the table's names.

Megatron numbers layers and experts locally, and Transformer Engine fuses norms into linears and stacks experts; the
differences end here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_r1.weights.table import Entry, shard_shape

# Transformer Engine's fused names -> the table's.
_FUSED = (
    ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
    ("self_attention.linear_q_up_proj.layer_norm_weight", "self_attention.q_layernorm.weight"),
    ("self_attention.linear_kv_up_proj.layer_norm_weight", "self_attention.kv_layernorm.weight"),
    ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
)
_LOCAL_EXPERT = re.compile(r"experts\.local_experts\.(\d+)\.(linear_fc[12])\.weight$")
_GROUPED_EXPERT = re.compile(r"experts\.(linear_fc[12])\.weight(\d+)$")


@dataclass(frozen=True, slots=True)
class LocalTensor:
    """One parameter (or buffer) of this rank: shard `index` of `count`."""

    entry: Entry
    tensor: torch.Tensor
    index: int
    count: int


def local_tensors(chunks: Sequence[torch.nn.Module], table: Sequence[Entry]) -> dict[str, LocalTensor]:
    """Every parameter and router bias of this rank's model chunks, by the table's name.

    Raises KeyError if the model holds a parameter that the table lacks, ValueError for one of another size. A tied
    head's copy on the last pipeline stage appears under "output_layer.weight" with the embedding's entry.
    """
    entries = {entry.name: entry for entry in table}
    found: dict[str, LocalTensor] = {}
    for chunk in chunks:
        for name, tensor in _named_tensors(chunk):
            entry = entries.get(name)
            if entry is None and name == "output_layer.weight":
                entry = entries["embedding.word_embeddings.weight"]
            if entry is None:
                raise KeyError(f"no entry in the weight table for Megatron parameter {name}")
            index, count = _position(entry)
            if tensor.numel() != math.prod(shard_shape(entry, count)):
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}; the table says {shard_shape(entry, count)}")
            found[name] = LocalTensor(entry, tensor, index, count)
    return found


def _named_tensors(chunk: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    offsets = {
        path: module.layer_number - 1
        for path, module in chunk.named_modules()
        if isinstance(module, TransformerLayer) and path.startswith("decoder.layers.")
    }
    first_expert = _first_local_expert(chunk)
    named = list(chunk.named_parameters())
    named += [(name, buffer) for name, buffer in chunk.named_buffers() if name.endswith("router.expert_bias")]
    return [(_global_name(name, offsets, first_expert), tensor) for name, tensor in named]


def _first_local_expert(chunk: torch.nn.Module) -> int:
    """Global number of this expert-parallel rank's first expert (experts are split into contiguous runs)."""
    for module in chunk.modules():
        if isinstance(module, MoELayer):
            return module.local_expert_indices[0]
    return 0


def _global_name(name: str, offsets: dict[str, int], first_expert: int) -> str:
    name = name.replace(".mtp_model_layer.", ".transformer_layer.")
    if name.startswith("decoder.layers."):
        _, _, layer, rest = name.split(".", 3)
        name = f"decoder.layers.{offsets[f'decoder.layers.{layer}']}.{rest}"
    for fused, plain in _FUSED:
        name = name.replace(fused, plain)
    name = _LOCAL_EXPERT.sub(lambda m: f"experts.{first_expert + int(m[1])}.{m[2]}.weight", name)
    return _GROUPED_EXPERT.sub(lambda m: f"experts.{first_expert + int(m[2])}.{m[1]}.weight", name)


def _position(entry: Entry) -> tuple[int, int]:
    """(shard index, number of shards) of this rank's part."""
    if entry.partition is None:
        return 0, 1
    if entry.expert:
        rank = parallel_state.get_expert_tensor_parallel_rank()
        size = parallel_state.get_expert_tensor_parallel_world_size()
    else:
        rank = parallel_state.get_tensor_model_parallel_rank()
        size = parallel_state.get_tensor_model_parallel_world_size()
    return rank, size  # pyright: ignore[reportReturnType]
