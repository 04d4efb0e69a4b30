"""Does a folder hold what its config.json promises? Names and shapes, from headers, before any tensor is read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from megatron_r1.config.shape import ModelShape
from megatron_r1.errors import CheckpointError
from megatron_r1.weights.reader import CheckpointReader
from megatron_r1.weights.table import Entry, build_table

_DERIVED = re.compile(r"\.rotary_emb\.inv_freq$")
"""Buffers that old checkpoints hold and every loader computes anew."""

_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Inventory:
    """`entries`: those that the folder holds, in the table's order; `aliases`: the further names present, by entry
    name; `skipped`: names that carry nothing of their own."""

    entries: tuple[Entry, ...]
    aliases: dict[str, tuple[str, ...]]
    skipped: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        """Hugging Face names in the table's order, each entry's aliases behind it."""
        return [name for entry in self.entries for name in (*entry.hf, *self.aliases[entry.name])]


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
    aliases = {entry.name: tuple(name for name in _aliases(entry, shape) if name in present) for entry in table}
    known = {name for entry in table for name in (*entry.hf, *aliases[entry.name])}
    others = [name for name in present if name not in known]
    skipped = tuple(name for name in others if _DERIVED.search(name))
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
                if info.shape != expected:
                    raise CheckpointError(
                        f"{info.file}: {alias} has shape {list(info.shape)}, config.json implies {list(expected)}"
                    )
    return Inventory(tuple(table), aliases, skipped)


def _aliases(entry: Entry, shape: ModelShape) -> tuple[str, ...]:
    """Some folders repeat a tied head."""
    if shape.tie_embeddings and entry.name == "embedding.word_embeddings.weight":
        return (*entry.aliases, "lm_head.weight")
    return entry.aliases


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
