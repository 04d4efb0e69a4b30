"""The header of a safetensors file, without torch: a length, a JSON object, then the tensors' bytes."""

from __future__ import annotations

import json
import struct
from collections import Counter
from pathlib import Path
from typing import Any

from megatron_r1.errors import CheckpointError

MOST_HEADER_BYTES = 100_000_000
"""The format's own limit."""


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """({tensor name: its entry, as found}, where the tensors' bytes begin). CheckpointError naming the file if it has
    no such header; the entries are the caller's to check."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(MOST_HEADER_BYTES, size - 8):
            raise CheckpointError(f"{path}: truncated or not a safetensors file ({size:,} bytes)")
        header = parse_object(file.read(length), f"{path}: not a safetensors header")
    header.pop("__metadata__", None)
    return header, 8 + length


def parse_object(text: bytes, what: str) -> dict[str, Any]:
    """The JSON object in `text`. Two values under one name are a fault: readers disagree on which one counts."""
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{what}: holds a JSON {type(value).__name__}; it must be an object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{name!r} appears twice")
    return value
