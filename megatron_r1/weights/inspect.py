"""Say what a model folder holds, from its headers."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

from megatron_r1.config.model_folder import mtp_left_out
from megatron_r1.weights.folders import open_checkpoint, open_raw, read_shape
from megatron_r1.weights.inventory import take_inventory
from megatron_r1.weights.manifest import read_manifest
from megatron_r1.weights.torch_dist_reader import TorchDistFolder


def describe(folder: Path) -> str:
    """A few lines of text. Raises CheckpointError if the folder is damaged or is not what its config.json says."""
    shape = read_shape(folder)
    raw = open_raw(folder, shape)
    inventory = take_inventory(open_checkpoint(folder, shape), shape, folder)
    kind = "torch_dist checkpoint" if isinstance(raw, TorchDistFolder) else "Hugging Face folder"
    unique = {name: raw.tensors[name] for name in raw.tensors if name not in _aliases(inventory)}
    numbers: Counter[str] = Counter()
    for info in unique.values():
        numbers[str(info.dtype).removeprefix("torch.")] += math.prod(info.shape)
    files = [file for file in folder.iterdir() if file.is_file()]
    largest = max(unique, key=lambda name: unique[name].num_bytes)
    lines = [
        f"{folder}: {kind}, {shape.architecture}",
        f"  {shape.num_layers} layers, hidden {shape.hidden_size}, {shape.num_heads} heads, vocabulary "
        f"{shape.vocab_size:,}" + (f", {shape.moe.num_experts} experts (top {shape.moe.top_k})" if shape.moe else ""),
        f"  {len(unique):,} tensors, {sum(numbers.values()):,} numbers: "
        + ", ".join(f"{count:,} {dtype}" for dtype, count in numbers.most_common()),
        f"  {sum(file.stat().st_size for file in files) / 1e9:.3f} GB in {len(files)} files; largest tensor {largest} "
        f"{list(unique[largest].shape)}, {unique[largest].num_bytes / 1e6:,.1f} MB",
    ]
    left_out = mtp_left_out(folder)
    if shape.num_mtp_layers:
        present = any(entry.name.startswith("mtp.") for entry in inventory.entries)
        lines.append(
            f"  multi-token prediction: {shape.num_mtp_layers} layer(s) in config.json, "
            + "present" * present
            + "absent" * (not present)
        )
    elif left_out:
        lines.append(f"  {left_out}")
    if shape.fp8_block:
        lines.append(f"  FP8 (e4m3) linear weights with a scale for each {shape.fp8_block} x {shape.fp8_block} block")
    manifest = read_manifest(folder)
    if manifest is not None:
        bad = [name for name, record in manifest.tensors.items() if record.nonfinite]
        marked = f"; NaN or infinite in {', '.join(bad)}" if bad else ""
        lines.append(f"  manifest: hashes of {len(manifest.tensors):,} tensors{marked}")
    raw.close()
    return "\n".join(lines)


def _aliases(inventory) -> set[str]:
    return {alias for names in inventory.aliases.values() for alias in names}
