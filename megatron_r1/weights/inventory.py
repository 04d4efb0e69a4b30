"""Does a folder hold what its config.json promises? Names and shapes, from headers, before any tensor is read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_r1.config.shape import ModelShape
from megatron_r1.errors import CheckpointError
from megatron_r1.weights.reader import CheckpointReader
from megatron_r1.weights.table import Entry, build_table

_DERIVED = re.compile(r"\.rotary_emb\.inv_freq$")
"""Buffers that old checkpoints hold and every loader computes anew."""

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Inventory:
    """`entries`: those that the folder holds, in the table's order; `aliases`: the further names present, by entry
    name; `skipped`: names that carry nothing of their own."""

    entries: tuple[Entry, ...]
    aliases: dict[str, tuple[str, ...]]
    skipped: tuple[str, ...]


def take_inventory(reader: CheckpointReader, shape: ModelShape, folder: Path) -> Inventory:
    """Compare a (dequantised) reader with the table. Raises CheckpointError naming what is missing, unknown or of
    another shape. MTP layers may be absent, all of them or none."""
    table = build_table(shape)
    present = reader.tensors
    if not any(name in present for entry in table if entry.name.startswith("mtp.") for name in entry.hf):
        table = [entry for entry in table if not entry.name.startswith("mtp.")]
    missing = [name for entry in table for name in entry.hf if name not in present]
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} tensor(s) that config.json implies are missing: {_some(missing)}; fetch the "
            "folder again, or correct its config.json"
        )
    aliases = {entry.name: tuple(name for name in known_aliases(entry, shape) if name in present) for entry in table}
    known = {name for entry in table for name in (*entry.hf, *aliases[entry.name])}
    others = [name for name in present if name not in known]
    skipped = tuple(name for name in others if is_derived(name))
    unknown = [name for name in others if name not in skipped]
    if unknown:
        files = {present[name].file for name in unknown[:_SHOWN]}
        raise CheckpointError(
            f"{folder}: {len(unknown)} tensor(s) are unknown to the {shape.architecture} table: {_some(unknown)} (in "
            f"{', '.join(sorted(files))}); remove them, or add the architecture (docs/conversion.md)"
        )
    for entry in table:
        for part, name in enumerate(entry.hf):
            for alias in (name, *aliases[entry.name]) if part == 0 else (name,):
                info, expected = present[alias], entry.hf_shapes[part]
                if info.dtype not in _DTYPES:
                    raise CheckpointError(
                        f"{info.file}: {alias} is {info.dtype}; weights must be bf16, fp16, fp32, fp64, or FP8 (e4m3) "
                        "under a quantization_config in config.json"
                    )
                if info.shape != expected:
                    raise CheckpointError(
                        f"{info.file}: {alias} has shape {list(info.shape)}, config.json implies {list(expected)}"
                    )
    return Inventory(tuple(table), aliases, skipped)


def is_derived(name: str) -> bool:
    """Whether a tensor carries nothing of its own, so that folders with and without it hold the same model."""
    return _DERIVED.search(name) is not None


def known_aliases(entry: Entry, shape: ModelShape) -> tuple[str, ...]:
    """The names under which a folder may repeat an entry's first tensor. Some folders repeat a tied head."""
    if shape.tie_embeddings and entry.name == "embedding.word_embeddings.weight":
        return (*entry.aliases, "lm_head.weight")
    return entry.aliases


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
