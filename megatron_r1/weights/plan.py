"""What a conversion will write: which tensors, in which dtypes and files. Decided from headers, before any work."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from megatron_r1.config.model_folder import power_of_two_scales
from megatron_r1.config.shape import ModelShape
from megatron_r1.errors import CheckpointError
from megatron_r1.weights.folders import open_checkpoint, open_raw
from megatron_r1.weights.fp8 import FP8, SCALE_SUFFIX, fp8_entries
from megatron_r1.weights.hf_sink import HFSink, OutputTensor
from megatron_r1.weights.inventory import Inventory, take_inventory
from megatron_r1.weights.placement import place
from megatron_r1.weights.reader import CheckpointReader
from megatron_r1.weights.torch_dist_sink import TorchDistSink

FP8_BLOCK = 128
"""The block of DeepSeek's format, for weights that were not FP8 before."""

Target = Literal["torch_dist", "hf"]
Precision = Literal["keep", "bf16", "fp32", "fp8"]
ScaleFormat = Literal["auto", "float32", "ue8m0"]
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8": FP8}


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertOptions:
    """`precision` "keep" writes what is stored (for torch_dist: FP8 becomes bf16, which every model loads).
    `file_bytes` is for Hugging Face folders. Without `sync` nothing waits for the disk: a power cut may damage what
    was written lately, as it may with cp. `scale_format` is that of scales which are made here: ue8m0 are powers of
    two, "auto" what the source's config.json says of the model's FP8 form."""

    target: Target
    precision: Precision = "keep"
    workers: int = 2
    file_bytes: int = 2_000_000_000
    resume: bool = False
    allow_nonfinite: bool = False
    sync: bool = True
    scale_format: ScaleFormat = "auto"


@dataclass(frozen=True, slots=True)
class Plan:
    """`raw`: FP8 weights are copied as they are stored. `dtype`: what weights are cast to (None: nothing). `reader` is
    open while the plan is entered."""

    sink: HFSink | TorchDistSink
    reader: CheckpointReader
    raw: bool
    shape: ModelShape
    names: tuple[str, ...]
    source_bytes: int
    dtype: torch.dtype | None
    fp8_block: int | None
    power_of_two: bool
    mtp: bool
    aliases: dict[str, str]
    skipped: tuple[str, ...]

    def __enter__(self) -> Plan:
        return self

    def __exit__(self, *_: object) -> None:
        self.reader.close()


def make_plan(source: Path, partial: Path, shape: ModelShape, options: ConvertOptions) -> Plan:
    """How to convert `source` into the folder `partial`. CheckpointError if the source cannot be converted so."""
    computing = open_checkpoint(source, shape)
    inventory = take_inventory(computing, shape, source)
    keep_fp8 = bool(shape.fp8_block) and (
        options.precision == "fp8" or (options.precision == "keep" and options.target == "hf")
    )
    if options.target == "torch_dist" and options.precision == "fp8" and not shape.fp8_block:
        raise CheckpointError(
            f"{source}: is not FP8; a torch_dist checkpoint keeps FP8 weights but is not quantised: quantise on export"
        )
    power_of_two = power_of_two_scales(source)
    if options.scale_format != "auto":
        if keep_fp8 or options.precision != "fp8":
            raise CheckpointError(
                f"{source}: scale_format is {options.scale_format}, but no scales are made here; it is of --precision "
                "fp8 from a folder that is not FP8"
            )
        power_of_two = options.scale_format == "ue8m0"
    reader = open_raw(source, shape) if keep_fp8 else computing
    dtype = None if keep_fp8 or options.precision == "keep" else _DTYPES[options.precision]
    make = _plan_hf if options.target == "hf" else _plan_torch_dist
    options = replace(options, scale_format="ue8m0" if power_of_two else "float32")
    sink, names = make(partial, reader, shape, inventory, dtype, keep_fp8, options)
    block = (shape.fp8_block or FP8_BLOCK) if keep_fp8 or dtype == FP8 else None
    source_bytes = sum(reader.tensors[name].num_bytes for name in names)
    if reader is not computing:
        computing.close()
    aliases = {alias: entry.hf[0] for entry in inventory.entries for alias in inventory.aliases[entry.name]}
    mtp = any(entry.name.startswith("mtp.") for entry in inventory.entries)
    return Plan(
        sink,
        reader,
        keep_fp8,
        shape,
        tuple(names),
        source_bytes,
        dtype,
        block,
        power_of_two,
        mtp,
        aliases,
        inventory.skipped,
    )


def _plan_hf(
    partial: Path,
    reader: CheckpointReader,
    shape: ModelShape,
    inventory: Inventory,
    dtype: torch.dtype | None,
    keep_fp8: bool,
    options: ConvertOptions,
) -> tuple[HFSink, list[str]]:
    tensors = []
    for entry in inventory.entries:
        for name in (*entry.hf, *inventory.aliases[entry.name]):
            info = reader.tensors[name]
            quantised = dtype == FP8 and entry.fp8
            if entry.float32 and dtype is not None:
                target = torch.float32
            elif dtype is None:
                target = info.dtype
            else:
                target = torch.bfloat16 if dtype == FP8 and not quantised else dtype
            tensors.append(OutputTensor(name, target, info.shape, quantised))
            if keep_fp8 and name + SCALE_SUFFIX in reader.tensors:
                scales = reader.tensors[name + SCALE_SUFFIX]
                tensors.append(OutputTensor(name + SCALE_SUFFIX, scales.dtype, scales.shape))
    sink = HFSink(
        partial,
        tensors,
        file_bytes=options.file_bytes,
        fp8_block=shape.fp8_block or FP8_BLOCK,
        power_of_two=options.scale_format == "ue8m0",
    )
    return sink, [tensor.name for tensor in tensors]


def _plan_torch_dist(
    partial: Path,
    reader: CheckpointReader,
    shape: ModelShape,
    inventory: Inventory,
    dtype: torch.dtype | None,
    keep_fp8: bool,
    options: ConvertOptions,
) -> tuple[TorchDistSink, list[str]]:
    entries = []
    for entry in inventory.entries:
        for alias in inventory.aliases[entry.name]:
            first, copy = reader.tensors[entry.hf[0]], reader.tensors[alias]
            if copy.dtype != first.dtype:
                raise CheckpointError(
                    f"{copy.file}: {alias} is {copy.dtype} and {entry.hf[0]} {first.dtype}; Megatron has one tensor "
                    "for both"
                )
        if keep_fp8 and reader.tensors[entry.hf[0]].dtype == FP8:
            if entry.kind == "qkv" or shape.fp8_block is None:
                raise CheckpointError(
                    f"{entry.hf[0]}: Megatron fuses query, key and value, which FP8 blocks do not survive; use bf16"
                )
            entries += fp8_entries(entry, shape.fp8_block)
        else:
            entries.append(entry)
    placements = [place(entry, shape) for entry in entries]
    dtypes: dict[str, torch.dtype] = {}
    for placement in placements:
        for name in placement.entry.hf:
            target = reader.tensors[name].dtype if dtype is None else dtype
            if placement.entry.float32 and dtype is not None:
                target = torch.float32
            if dtypes.setdefault(placement.key, target) != target:
                raise CheckpointError(
                    f"{reader.tensors[name].file}: {name} is {target} and other parts of Megatron's {placement.key} "
                    f"are {dtypes[placement.key]}; choose one precision (bf16 or fp32)"
                )
    names = [name for placement in placements for name in placement.entry.hf]
    return TorchDistSink(partial, placements, dtypes, inventory.aliases), names
