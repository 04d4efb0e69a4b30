"""Tensor-parallel shards that are parts of a query group: more ranks than key-value heads."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_r1.config.shape import load_shape
from megatron_r1.recipes import PACKAGED_SHAPES
from megatron_r1.weights.table import build_table, shard_shape
from megatron_r1.weights.transforms import shard, unshard

SHAPE = dataclasses.replace(
    load_shape(PACKAGED_SHAPES["Qwen2.5-7B"]), num_layers=1, hidden_size=8, num_heads=12, num_kv_heads=2, head_dim=4
)
"""A query group has 6 queries, a key and a value: 32 rows, 64 in all."""


@pytest.mark.parametrize("name", ["linear_qkv.weight", "linear_qkv.bias"])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_shards_are_even_cuts_of_the_interleaved_rows_and_go_back(name, count):
    entry = next(entry for entry in build_table(SHAPE) if entry.name.endswith(name))
    tensors = {hf: torch.randn(size) for hf, size in zip(entry.hf, entry.hf_shapes, strict=True)}

    def read(hf: str, dim: int, start: int, stop: int) -> torch.Tensor:
        return tensors[hf] if dim < 0 else tensors[hf].narrow(dim, start, stop - start)

    q, k, v = (tensors[hf] for hf in entry.hf)
    whole = torch.cat([q[:24], k[:4], v[:4], q[24:], k[4:], v[4:]])  # written out: two groups
    shards = [shard(entry, SHAPE, read, index, count) for index in range(count)]
    assert torch.equal(torch.cat(shards), whole)
    assert all(tuple(piece.shape) == shard_shape(entry, count) for piece in shards)
    for found, hf in zip(unshard(entry, SHAPE, shards), entry.hf, strict=True):
        assert torch.equal(found, tensors[hf])


def test_a_number_of_shards_that_cuts_across_groups_is_refused():
    entry = next(entry for entry in build_table(SHAPE) if entry.name.endswith("linear_qkv.weight"))
    with pytest.raises(ValueError, match="no multiple of 2 key-value heads"):
        shard(entry, SHAPE, lambda *_: torch.zeros(0), 0, 3)
