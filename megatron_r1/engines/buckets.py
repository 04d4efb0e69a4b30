"""Many tensors as few messages: how weights are laid out in byte buckets for a broadcast.

Sender and receiver compute the same plan from the same metadata, so only bytes cross. Every tensor starts at
a multiple of 16 bytes, so that its bytes can be viewed as any dtype in place. Transport is not here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

ALIGNMENT_BYTES = 16

ParamSpec = tuple[str, torch.dtype, tuple[int, ...]]
"""(Hugging Face name, dtype on the wire, full shape)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Consecutive parameters and where their bytes lie: offsets[i] .. offsets[i] + size of specs[i]."""

    specs: tuple[ParamSpec, ...]
    offsets: tuple[int, ...]
    num_bytes: int


def plan_buckets(specs: Sequence[ParamSpec], limit_bytes: int) -> list[Bucket]:
    """Consecutive buckets of at most `limit_bytes`; one larger tensor is a bucket of its own."""
    buckets: list[Bucket] = []
    members: list[ParamSpec] = []
    offsets: list[int] = []
    end = 0
    for spec in specs:
        size = num_bytes(spec)
        if members and end + size > limit_bytes:
            buckets.append(Bucket(specs=tuple(members), offsets=tuple(offsets), num_bytes=end))
            members, offsets, end = [], [], 0
        members.append(spec)
        offsets.append(end)
        end += -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    if members:
        buckets.append(Bucket(specs=tuple(members), offsets=tuple(offsets), num_bytes=end))
    return buckets


def num_bytes(spec: ParamSpec) -> int:
    _, dtype, shape = spec
    return math.prod(shape) * dtype.itemsize


def view(buffer: torch.Tensor, offset: int, spec: ParamSpec) -> torch.Tensor:
    """The tensor of `spec` inside `buffer` (u8[bytes]) at `offset`, sharing its memory."""
    _, dtype, shape = spec
    return buffer[offset : offset + num_bytes(spec)].view(dtype).view(shape)


def fill(buffer: torch.Tensor, bucket: Bucket, stream: Iterator[tuple[str, torch.Tensor]]) -> None:
    """Copy the bucket's tensors from the stream into `buffer`, u8[>= bucket.num_bytes]."""
    for offset, spec in zip(bucket.offsets, bucket.specs):
        name, dtype, shape = spec
        got_name, tensor = next(stream, (None, None))
        if tensor is None or got_name != name or tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
            got = "the end" if tensor is None else f"{got_name!r} {tensor.dtype} {tuple(tensor.shape)}"
            raise ValueError(f"the weight source announced {name!r} {dtype} {tuple(shape)} and yielded {got}")
        view(buffer, offset, spec).copy_(tensor.detach())
