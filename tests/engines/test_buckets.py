"""Byte buckets: sizes, alignment and round trip, by hand-computed values."""

from __future__ import annotations

import torch

from megatron_r1.engines.buckets import plan_buckets, view


def test_buckets_keep_order_and_the_limit() -> None:
    specs = [
        ("a", torch.bfloat16, (3,)),  # 6 bytes, padded to 16
        ("b", torch.float32, (4,)),  # 16
        ("c", torch.float32, (100,)),  # 400, more than the limit: alone
        ("d", torch.float32, (2, 2)),  # 16
    ]
    buckets = plan_buckets(specs, limit_bytes=64)
    assert [[spec[0] for spec in bucket.specs] for bucket in buckets] == [["a", "b"], ["c"], ["d"]]
    assert [bucket.offsets for bucket in buckets] == [(0, 16), (0,), (0,)]
    assert [bucket.num_bytes for bucket in buckets] == [32, 400, 16]


def test_tensors_of_mixed_dtypes_survive_a_bucket() -> None:
    tensors = {"a": torch.randn(3).bfloat16(), "b": torch.randn(5, 7), "c": torch.randn(1).bfloat16()}
    specs = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    (bucket,) = plan_buckets(specs, limit_bytes=1024)
    buffer = torch.zeros(bucket.num_bytes, dtype=torch.uint8)
    for offset, spec in zip(bucket.offsets, bucket.specs):
        view(buffer, offset, spec).copy_(tensors[spec[0]])
    for offset, spec in zip(bucket.offsets, bucket.specs):
        assert torch.equal(view(buffer, offset, spec), tensors[spec[0]])


def test_no_parameters_make_no_bucket() -> None:
    assert plan_buckets([], limit_bytes=64) == []
