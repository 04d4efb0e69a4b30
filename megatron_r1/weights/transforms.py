"""How Hugging Face tensors become one tensor-parallel shard, and back. Pure tensor functions.

`shard` takes a reader of rows or columns rather than whole tensors, so that a rank reads only the bytes of its shard.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from megatron_r1.config.shape import ModelShape
from megatron_r1.weights.table import Entry

Reader = Callable[[str, int, int, int], torch.Tensor]
"""(hf name, dimension, start, stop) -> that slice; dimension -1 means the whole tensor."""


def shard(entry: Entry, shape: ModelShape, read: Reader, index: int, count: int) -> torch.Tensor:
    """Shard `index` of `count` of the parameter. Raises ValueError if the split does not divide."""
    if entry.kind == "vocabulary":
        return _shard_vocabulary(entry, read, index, count)
    if entry.kind == "qkv" and count > shape.num_kv_heads:
        return _shard_of_group(entry, shape, read, index, count)
    if entry.partition is None or count == 1:
        parts = [read(name, -1, 0, 0) for name in entry.hf]
    else:
        parts = []
        for name, full in zip(entry.hf, entry.hf_shapes, strict=True):
            size, rest = divmod(full[entry.partition], count)
            if rest:
                raise ValueError(f"{name}: dimension {full[entry.partition]} does not divide into {count} shards")
            parts.append(read(name, entry.partition, index * size, (index + 1) * size))
    if entry.kind == "qkv":
        return _interleave_qkv(parts, shape)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def unshard(entry: Entry, shape: ModelShape, shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The Hugging Face tensors, in entry.hf's order, from all shards in rank order (one shard if replicated)."""
    if entry.kind == "vocabulary":
        return [
            torch.cat(list(shards))[: entry.hf_shapes[0][0]] if len(shards) > 1 else shards[0][: entry.hf_shapes[0][0]]
        ]
    if entry.kind == "plain":
        return [shards[0] if len(shards) == 1 else torch.cat(list(shards), dim=entry.partition or 0)]
    if entry.kind == "qkv" and len(shards) > shape.num_kv_heads:  # a shard is a part of a query group
        shards = [torch.cat(list(shards))]
    split = _split_qkv if entry.kind == "qkv" else _split_gated
    pieces = [split(piece, shape) for piece in shards]
    return [torch.cat(list(part)) for part in zip(*pieces, strict=True)]


def _shard_vocabulary(entry: Entry, read: Reader, index: int, count: int) -> torch.Tensor:
    rows, _ = entry.hf_shapes[0]
    size = -(-rows // count)
    part = read(entry.hf[0], 0, min(index * size, rows), min((index + 1) * size, rows))
    missing = size - part.shape[0]
    return torch.cat([part, part.new_zeros(missing, part.shape[1])]) if missing else part


def _interleave_qkv(parts: Sequence[torch.Tensor], shape: ModelShape) -> torch.Tensor:
    """[q rows], [k rows], [v rows] -> for each query group: its queries, its key, its value."""
    width, tail = shape.head_dim, parts[0].shape[1:]
    groups = parts[1].shape[0] // width
    grouped = [part.reshape(groups, -1, *tail) for part in parts]
    return torch.cat(grouped, dim=1).reshape(-1, *tail)


def _shard_of_group(entry: Entry, shape: ModelShape, read: Reader, index: int, count: int) -> torch.Tensor:
    """Rows of one query group, cut wherever they fall: with more ranks than groups Megatron splits the interleaved rows
    evenly, and gathers the activations. A rank then computes its own queries with its group's key and value."""
    ranks, rest = divmod(count, shape.num_kv_heads)
    if rest:
        raise ValueError(f"{entry.name}: {count} shards are no multiple of {shape.num_kv_heads} key-value heads")
    group, part = divmod(index, ranks)
    sizes = [full[0] // shape.num_kv_heads for full in entry.hf_shapes]
    parts = [read(name, 0, group * size, (group + 1) * size) for name, size in zip(entry.hf, sizes, strict=True)]
    size, rest = divmod(sum(sizes), ranks)
    if rest:
        raise ValueError(f"{entry.name}: {sum(sizes)} rows of a query group do not divide into {ranks} shards")
    return torch.cat(parts)[part * size : (part + 1) * size]


def _split_qkv(qkv: torch.Tensor, shape: ModelShape) -> list[torch.Tensor]:
    width, tail = shape.head_dim, qkv.shape[1:]
    query_rows = shape.num_heads // shape.num_kv_heads * width
    groups = qkv.shape[0] // (query_rows + 2 * width)
    parts = qkv.reshape(groups, -1, *tail).split([query_rows, width, width], dim=1)
    return [part.reshape(-1, *tail) for part in parts]


def _split_gated(gated: torch.Tensor, shape: ModelShape) -> list[torch.Tensor]:
    return list(gated.chunk(2))
