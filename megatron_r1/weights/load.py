"""Fill a rank's Megatron parameters from a Hugging Face folder, reading only the bytes of its own shards.

safetensors only: no pickle is ever opened. FP8 checkpoints with block scales are refused here with a hint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from megatron_r1.config.shape import ModelShape
from megatron_r1.errors import ConfigError
from megatron_r1.weights.local import LocalTensor
from megatron_r1.weights.transforms import shard, shard_shape


class HFCheckpoint:
    """Read-only view of a folder's safetensors. Use as a context manager; `bytes_read` counts tensor bytes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bytes_read = 0
        self._stack = ExitStack()
        self._open: dict[str, safe_open] = {}
        self._files = _weight_map(folder)

    def __enter__(self) -> HFCheckpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def names(self) -> list[str]:
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def read(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) (dim 0) or columns (dim 1) of a tensor; the whole of it if dim is -1."""
        view = self._slice(name)
        part = view[:] if dim < 0 else (view[start:stop] if dim == 0 else view[:, start:stop])
        self.bytes_read += part.numel() * part.element_size()
        return part

    def _slice(self, name: str):
        if name not in self._files:
            raise ConfigError(f"{self.folder}: tensor {name} is missing; the folder does not match its config.json")
        file = self._files[name]
        if file not in self._open:
            try:
                handle = safe_open(str(self.folder / file), framework="pt")
            except FileNotFoundError:
                raise ConfigError(f"{self.folder}: the index names {file}, which does not exist") from None
            except SafetensorError as error:
                raise ConfigError(f"{self.folder / file}: truncated or not safetensors ({error})") from None
            self._open[file] = self._stack.enter_context(handle)
        return self._open[file].get_slice(name)


def _weight_map(folder: Path) -> dict[str, str]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        for name, file in files.items():
            if Path(file).name != file:
                raise ConfigError(f"{index}: tensor {name} points outside the folder ({file!r})")
        return files
    single = folder / "model.safetensors"
    if not single.exists():
        raise ConfigError(f"model.path: {folder} holds neither model.safetensors nor model.safetensors.index.json")
    try:
        with safe_open(str(single), framework="pt") as handle:
            return dict.fromkeys(handle.keys(), single.name)
    except SafetensorError as error:
        raise ConfigError(f"{single}: truncated or not safetensors ({error})") from None


def load_weights(tensors: Mapping[str, LocalTensor], shape: ModelShape, folder: Path) -> int:
    """Copy the folder's weights into this rank's tensors (cast to their dtype). Returns bytes read.

    Raises ConfigError naming the tensor if one is missing or has another shape than config.json promises.
    MTP layers that the folder lacks keep their initial values.
    """
    with HFCheckpoint(folder) as checkpoint:
        for name, local in tensors.items():
            entry = local.entry
            if name.startswith("mtp.") and not all(hf in checkpoint for hf in entry.hf):
                continue
            for hf_name, expected in zip(entry.hf, entry.hf_shapes, strict=True):
                if checkpoint.shape(hf_name) != expected:
                    found = checkpoint.shape(hf_name)
                    raise ConfigError(f"{folder}: {hf_name} has shape {found}, config.json implies {expected}")
            part = shard(entry, shape, checkpoint.read, local.index, local.count)
            if tuple(part.shape) != tuple(local.tensor.shape):
                raise ValueError(f"{name}: shard has shape {tuple(part.shape)}, Megatron {tuple(local.tensor.shape)}")
            assert shard_shape(entry, local.count) == tuple(part.shape)
            with torch.no_grad():
                local.tensor.copy_(part)
        return checkpoint.bytes_read
