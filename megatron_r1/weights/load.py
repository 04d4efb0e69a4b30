"""Fill a rank's Megatron parameters from a model folder, reading only the bytes of its own shards.

Either kind of folder will do, and FP8 weights are dequantised on the way. No pickle of the folder's is executed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from megatron_r1.config.shape import load_shape
from megatron_r1.errors import CheckpointError
from megatron_r1.weights.folders import open_checkpoint
from megatron_r1.weights.local import LocalTensor
from megatron_r1.weights.reader import CheckpointReader, read_tensor
from megatron_r1.weights.transforms import shard

MTP_REMEDY = (
    ", whose num_nextn_predict_layers counts a layer that is not there (transformers leaves it out when it saves): "
    "take the publisher's folder, or lower the number"
)


def load_weights(tensors: Mapping[str, LocalTensor], folder: Path) -> int:
    """Copy the folder's weights into this rank's tensors (cast to their dtype). Returns bytes read.

    Raises CheckpointError naming the tensor if one is missing or has another shape than config.json promises.
    A reward head that the folder lacks keeps its initial values.
    """
    shape = load_shape(folder)
    reader = open_checkpoint(folder, shape)
    try:
        for name, local in tensors.items():
            entry = local.entry
            if name.startswith("reward_head.") and not all(hf in reader.tensors for hf in entry.hf):
                continue
            for hf_name, expected in zip(entry.hf, entry.hf_shapes, strict=True):
                info = reader.tensors.get(hf_name)
                if info is None:
                    raise CheckpointError(
                        f"{folder}: tensor {hf_name} is missing; the folder does not match its config.json"
                        + (MTP_REMEDY if name.startswith("mtp.") else "")
                    )
                if info.shape != expected:
                    raise CheckpointError(
                        f"{info.file}: {hf_name} has shape {list(info.shape)}, config.json implies {list(expected)}"
                    )
            part = shard(entry, shape, _slices(reader), local.index, local.count)
            if tuple(part.shape) != tuple(local.tensor.shape):
                raise ValueError(f"{name}: shard has shape {tuple(part.shape)}, Megatron {tuple(local.tensor.shape)}")
            with torch.no_grad():
                local.tensor.copy_(part)
        return reader.bytes_read
    finally:
        reader.close()


def _slices(reader: CheckpointReader):
    """The reader as transforms.Reader: rows of dimension 0, columns of dimension 1, all of it for dimension -1."""

    def read(name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        if dim == 1:
            return reader.read_columns(name, start, stop)
        return read_tensor(reader, name, start, stop) if dim == 0 else read_tensor(reader, name)

    return read
