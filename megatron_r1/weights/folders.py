"""Open a model folder of either kind, and the small files that travel with the weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from megatron_r1.config.shape import ModelShape, hf_files, load_shape
from megatron_r1.errors import CheckpointError
from megatron_r1.weights.fp8_reader import DequantisedReader
from megatron_r1.weights.hf_folder import HFFolder
from megatron_r1.weights.reader import CheckpointReader
from megatron_r1.weights.torch_dist import TorchDistFolder, is_torch_dist

_SIDE_SUFFIXES = (".json", ".txt", ".jinja", ".model", ".md", ".tiktoken")
_NOT_SIDE = ("model.safetensors", "pytorch_model", "megatron_r1")


def open_raw(folder: Path, shape: ModelShape) -> CheckpointReader:
    """The folder's tensors as they are stored: FP8 weights and their scales are tensors of their own."""
    return TorchDistFolder(folder, shape) if is_torch_dist(folder) else HFFolder(folder)


def open_checkpoint(folder: Path, shape: ModelShape) -> CheckpointReader:
    """The folder's tensors for computing with: FP8 weights come out in bfloat16."""
    raw = open_raw(folder, shape)
    return DequantisedReader(raw, block=shape.fp8_block) if shape.fp8_block else raw


def read_shape(folder: Path) -> ModelShape:
    """load_shape, and an error that says what a model folder is if this is none."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: is not a folder; give a Hugging Face or a torch_dist folder")
    return load_shape(folder)


def copy_side_files(source: Path, target: Path, *, dtype: torch.dtype | None, fp8_block: int | None) -> None:
    """Tokenizer, chat template, generation config and config.json, the last with the dtype that the weights now have.

    Programs (.py) are left behind: nothing here or in vLLM's and transformers' own models needs them. `fp8_block` is
    the block size of the written weights, None if they are not FP8.
    """
    files = hf_files(source)
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(files.iterdir()):
        side = file.suffix in _SIDE_SUFFIXES or file.name.upper().startswith(("LICENSE", "NOTICE"))
        if file.is_file() and side and not file.name.startswith(_NOT_SIDE) and file.name != "config.json":
            shutil.copyfile(file, target / file.name)
    config = json.loads((files / "config.json").read_text(encoding="utf-8"))
    if fp8_block is None:
        config.pop("quantization_config", None)
    elif "quantization_config" not in config:
        config["quantization_config"] = {
            "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
            "weight_block_size": [fp8_block, fp8_block],
        }  # fmt: skip
    if dtype is not None:
        field = "dtype" if "dtype" in config else "torch_dtype"
        config[field] = str(dtype).removeprefix("torch.")
    (target / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def without_fp8(shape: ModelShape) -> ModelShape:
    return replace(shape, fp8_block=None)
