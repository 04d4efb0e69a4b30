"""What lies in a model folder beside config.json, by the names of its tensors and files. No torch.

Where transformers and vLLM would not load the same weights out of a folder, it is refused: the trainer and its servers
would work on two models.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_r1.config.architectures import architecture_of
from megatron_r1.config.safetensors import read_header
from megatron_r1.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
SCALE_FORMAT_NOTE = "fp8_scale_fmt"
"""Field of a converted folder's config.json: the quantization_config.scale_fmt that its FP8 form had."""

MTP_FIELDS = ("num_nextn_predict_layers", "num_mtp_layers")


def hf_files(folder: Path) -> Path:
    """Where a model folder keeps config.json and the tokenizer: itself, or hf/ in a torch_dist checkpoint."""
    inside = folder / "hf"
    return inside if not (folder / "config.json").exists() and (inside / "config.json").exists() else folder


def folder_faults(folder: Path) -> list[str]:
    """Files beside the weights that change the model, or make it two."""
    found = [name for name in ADAPTER_FILES if (folder / name).is_file()]
    faults = []
    if found:
        faults.append(
            f"{folder}: holds an adapter ({', '.join(found)}), which transformers (with peft) would load and vLLM "
            "would not; merge it into the weights (peft's merge_and_unload), or move its files elsewhere"
        )
    if not (folder / SINGLE).is_file():
        return faults
    if (folder / INDEX).is_file():
        others = sorted({file for file in _weight_map(folder).values() if isinstance(file, str) and file != SINGLE})
        if others:
            faults.append(
                f"{folder}: holds {SINGLE} and {INDEX}, which names {others[0]} and others; transformers would load "
                f"the first and vLLM the second: remove {SINGLE}, or {INDEX} with its files"
            )
    elif others := sorted(path.name for path in folder.glob("*.safetensors") if path.name not in (SINGLE, *found)):
        faults.append(
            f"{folder}: holds {SINGLE} and, without an index, {', '.join(others)}; transformers would load the first "
            "alone and vLLM all: move the others elsewhere"
        )
    return faults


def tensor_names(folder: Path) -> set[str]:
    """Those that the index of a Hugging Face folder names, or its single file; none where neither can be read (whoever
    reads the weights says why)."""
    return set(_weight_map(folder) if (folder / INDEX).is_file() else _names(folder / SINGLE))


def lacks_layers(folder: Path, first: int, number: int) -> bool:
    """Whether the safetensors have no tensor of decoder layers `first` to `first + number - 1`, which MTP layers are
    among; False if there are none to look at."""
    prefixes = tuple(f"model.layers.{layer}." for layer in range(first, first + number))
    weight_map = _weight_map(folder)
    if any(name.startswith(prefixes) for name in weight_map):
        return False
    # An index may forget tensors, which transformers and vLLM load all the same.
    files = {file for file in weight_map.values() if isinstance(file, str) and "/" not in file} or {SINGLE}
    names = [_names(folder / file) for file in files]
    return all(names) and not any(name.startswith(prefixes) for some in names for name in some)


def mtp_left_out(folder: Path) -> str | None:
    """The word to say where config.json, which load_shape has read, promises MTP layers that the weights lack."""
    if not (folder / "config.json").is_file():
        return None
    config = _config(folder)
    number = next((config[field] for field in MTP_FIELDS if config.get(field)), 0)
    architecture = architecture_of(config.get("model_type"))
    if not number or architecture is None or not set(MTP_FIELDS) & set(architecture.honoured):
        return None
    first = config["num_hidden_layers"]
    if not lacks_layers(folder, first, number):
        return None
    names = f"model.layers.{first}.*" + (f" to model.layers.{first + number - 1}.*" if number > 1 else "")
    return (
        f"{folder}: config.json has {number} MTP layer(s), but {names} are not among the weights (transformers 5 "
        "leaves them out when it saves): the model goes without"
    )


def without_mtp(config: Mapping[str, Any]) -> dict[str, Any]:
    """A parsed config.json that promises no MTP layers."""
    return dict(config) | {field: 0 for field in MTP_FIELDS if config.get(field)}


def power_of_two_scales(folder: Path) -> bool:
    """Whether the model's FP8 form has scales that are powers of two (DeepSeek-V3.1: scale_fmt "ue8m0")."""
    config = _config(folder)
    quantisation = config.get("quantization_config")
    found = quantisation.get("scale_fmt") if isinstance(quantisation, dict) else config.get(SCALE_FORMAT_NOTE)
    return found == "ue8m0"


def _config(folder: Path) -> dict[str, Any]:
    return json.loads((hf_files(folder) / "config.json").read_text(encoding="utf-8"))


def _weight_map(folder: Path) -> dict[str, Any]:
    """Empty where there is no index that can be read: whoever reads the weights says what is wrong with it."""
    try:
        found = json.loads((folder / INDEX).read_bytes()) if (folder / INDEX).is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    weight_map = found.get("weight_map") if isinstance(found, dict) else None
    return weight_map if isinstance(weight_map, dict) else {}


def _names(file: Path) -> Iterable[str]:
    """Names in a safetensors file's header; none if it cannot be read."""
    if not file.is_file():
        return ()
    try:
        return read_header(file)[0]
    except (OSError, CheckpointError):
        return ()
