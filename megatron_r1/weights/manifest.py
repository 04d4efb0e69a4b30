"""What a conversion leaves beside the weights: each tensor's dtype, shape and hash. Read without trust."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_r1.errors import CheckpointError
from megatron_r1.weights.files import read_json
from megatron_r1.weights.pieces import TensorRecord

MANIFEST = "megatron_r1_manifest.json"
_FORMAT = 2
"""1 had another hash: of such a manifest only the aliases are read."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """`aliases`: names under which the converted folder repeated a tensor, and that tensor's name."""

    aliases: Mapping[str, str]
    tensors: Mapping[str, TensorRecord]


def manifest_json(manifest: Manifest, *, kind: str, architecture: str) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "kind": kind,
        "architecture": architecture,
        "hash": "XXH3 (128 bits) of the tensor's bytes in Hugging Face's layout",
        "aliases": dict(manifest.aliases),
        "tensors": {name: record.to_json() for name, record in manifest.tensors.items()},
    }


def read_manifest(folder: Path) -> Manifest | None:
    """The folder's manifest, None if it has none. CheckpointError if it is not one."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    value = read_json(path)
    aliases, tensors = value.get("aliases"), value.get("tensors")
    if value.get("format") == 1:
        tensors = {}
    try:
        if not isinstance(aliases, dict) or not all(isinstance(name, str) for name in aliases.values()):
            raise ValueError("aliases must be an object of names")
        if not isinstance(tensors, dict):
            raise ValueError("tensors must be an object")
        return Manifest(aliases, {name: TensorRecord.from_json(record) for name, record in tensors.items()})
    except ValueError as error:
        raise CheckpointError(f"{path}: not a conversion's manifest ({error}); remove it, or fetch it again") from None


def check_hashes(manifest: Manifest, found: Mapping[str, TensorRecord], folder: Path, partial: Path) -> None:
    """CheckpointError naming the first tensor that is not what it was when `folder` was written. A tensor that was
    converted to another dtype on the way is not compared."""
    for name, record in found.items():
        promised = manifest.tensors.get(name)
        same_form = promised is not None and (promised.dtype, promised.shape) == (record.dtype, record.shape)
        if promised is not None and same_form and promised.xxh3_128 != record.xxh3_128:
            raise CheckpointError(
                f"{folder}: {name} is not what {MANIFEST} says: the data is damaged; remove {partial} and fetch the "
                f"source again (if it was changed on purpose, remove its {MANIFEST})"
            )
