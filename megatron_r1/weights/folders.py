"""Open a model folder of either kind, and the small files that travel with the weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from megatron_r1.config.model_folder import SCALE_FORMAT_NOTE, without_mtp
from megatron_r1.config.shape import ModelShape, hf_files, load_shape
from megatron_r1.errors import CheckpointError
from megatron_r1.weights.files import read_json
from megatron_r1.weights.fp8_reader import DequantisedReader
from megatron_r1.weights.hf_folder import HFFolder, is_hf_folder
from megatron_r1.weights.reader import CheckpointReader
from megatron_r1.weights.torch_dist_metadata import METADATA, is_torch_dist
from megatron_r1.weights.torch_dist_reader import TorchDistFolder

_SIDE_SUFFIXES = (".json", ".txt", ".jinja", ".model", ".md", ".tiktoken", ".bpe")
_NOT_SIDE = ("model.safetensors", "pytorch_model", "megatron_r1_", "adapter_")
_TEMPLATES = "additional_chat_templates"
_SAVE_ROOT = "latest_checkpointed_iteration.txt"


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
    if (hf_files(folder) / "config.json").exists():
        return load_shape(folder)
    if is_torch_dist(folder):
        raise CheckpointError(
            f"{folder}: a torch_dist checkpoint without the model's config.json; put that (and the tokenizer's files) "
            f"into {folder / 'hf'}"
        )
    raise CheckpointError(f"{folder}: holds no config.json; {_expected(folder)}")


def check_kind(folder: Path, wanted: Literal["torch_dist", "hf"]) -> None:
    """CheckpointError, with the command that fits, if the folder is of the other kind."""
    if not folder.is_dir():
        return  # read_shape says so
    if wanted == "hf" and is_torch_dist(folder):
        raise CheckpointError(f"{folder}: is a torch_dist checkpoint; the command for that is megatron-to-hf")
    if wanted == "torch_dist" and not is_torch_dist(folder):
        if is_hf_folder(folder):
            raise CheckpointError(
                f"{folder}: is a Hugging Face folder; the commands for that are hf-to-megatron and hf-to-hf"
            )
        raise CheckpointError(f"{folder}: holds no {METADATA}, so it is no torch_dist checkpoint; {_expected(folder)}")


def _expected(folder: Path) -> str:
    if (folder / _SAVE_ROOT).is_file():
        found = sorted(path.name for path in folder.glob("iter_*") if path.is_dir())
        return f"it is where Megatron saves: give one checkpoint in it ({found[-1] if found else 'iter_...'})"
    return "give a Hugging Face folder, or a torch_dist checkpoint"


def side_files(source: Path) -> dict[str, Path]:
    """What travels with the weights, but for config.json: tokenizer, chat templates, generation config, licence, and
    megatron_r1.json (a reward model is of no use without its scale). By the name that each has in its folder.

    Programs (.py) are left behind: nothing here or in vLLM's and transformers' own models needs them. CheckpointError
    for a link that leads out of the folder (Hugging Face's cache aside): the folder may be a stranger's.
    """
    files = hf_files(source)
    found = [file for file in files.iterdir() if _is_side_file(file)]
    found += (files / _TEMPLATES).glob("*.jinja")
    allowed = (files.resolve(), files.resolve().parent.parent / "blobs")
    result: dict[str, Path] = {}
    for file in sorted(found):
        if not file.is_file():
            continue
        if not any(file.resolve().is_relative_to(folder) for folder in allowed):
            raise CheckpointError(f"{file}: is a link to {file.resolve()}, outside the folder; put a copy in its place")
        result[file.relative_to(files).as_posix()] = file
    return result


def _is_side_file(file: Path) -> bool:
    named = file.suffix in _SIDE_SUFFIXES or file.name.startswith("tokenizer")
    known = named or file.name.upper().startswith(("LICENSE", "NOTICE"))
    return known and not file.name.startswith(_NOT_SIDE) and file.name != "config.json" and file.suffix != ".py"


def copy_side_files(
    source: Path,
    target: Path,
    files: Mapping[str, Path],
    *,
    dtype: torch.dtype | None,
    fp8_block: int | None,
    power_of_two: bool,
    mtp: bool,
) -> None:
    """Copy `side_files`, and config.json as the written weights now are: their dtype, `fp8_block`, the block size (None
    if they are not FP8), whether the scales of their FP8 form are powers of two, whether there are MTP layers."""
    target.mkdir(parents=True, exist_ok=True)
    for name, file in files.items():
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target / name)
    config = read_json(hf_files(source) / "config.json")
    config.pop("auto_map", None)  # names programs, which are left behind
    config.pop(SCALE_FORMAT_NOTE, None)
    if fp8_block is None:
        config.pop("quantization_config", None)
        config |= {SCALE_FORMAT_NOTE: "ue8m0"} if power_of_two else {}
    elif "quantization_config" not in config:
        config["quantization_config"] = {
            "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
            "weight_block_size": [fp8_block, fp8_block],
        } | ({"scale_fmt": "ue8m0"} if power_of_two else {})  # fmt: skip
    config = config if mtp else without_mtp(config)
    if dtype is not None:
        field = "dtype" if "dtype" in config else "torch_dtype"
        config[field] = str(dtype).removeprefix("torch.")
    (target / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def without_fp8(shape: ModelShape) -> ModelShape:
    return replace(shape, fp8_block=None)
