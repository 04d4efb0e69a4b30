"""Read a Hugging Face folder of safetensors: headers checked before any tensor is read, then byte ranges on demand.

The headers are parsed by us (config/safetensors.py) and not by the safetensors package because that maps whole files
into memory, where a bounded buffer is wanted. No pickle is ever opened, and no file outside the folder. Writing such a
folder is hf_sink.py.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megatron_r1.config import safetensors
from megatron_r1.config.model_folder import INDEX, SINGLE
from megatron_r1.errors import CheckpointError
from megatron_r1.weights.files import OpenFiles, is_plain_name, read_json
from megatron_r1.weights.pieces import integers
from megatron_r1.weights.reader import TensorInfo, read_exactly

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""safetensors' names of dtypes."""


@dataclass(frozen=True, slots=True)
class Location:
    """Where a tensor's bytes lie: C order, little endian."""

    file: str
    offset: int
    info: TensorInfo


class HFFolder:
    """A CheckpointReader of a Hugging Face folder's tensors as they are stored. Raises CheckpointError for every
    fault that headers can show: a missing or truncated file, an index that disagrees with its files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bytes_read = 0
        self._files = OpenFiles()
        self._places = read_locations(folder)
        self.tensors = {name: place.info for name, place in self._places.items()}

    def close(self) -> None:
        self._files.close()

    def read_rows(self, name: str, start: int, stop: int, out: memoryview) -> None:
        location = self._places[name]
        handle = self._files.handle(location.info.file)
        read_exactly(handle, location.offset + start * location.info.row_bytes, out, location.info.file)
        self.bytes_read += len(out)

    def read_columns(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Maps the file: the bytes of other columns are not copied, though the disk's pages may hold some."""
        location = self._places[name]
        rows, columns = location.info.shape
        size = location.info.dtype.itemsize
        raw = np.memmap(location.info.file, np.uint8, "r", location.offset, (rows, columns * size))
        part = torch.from_numpy(np.array(raw[:, start * size : stop * size])).view(location.info.dtype)
        self.bytes_read += part.numel() * size
        return part


def read_locations(folder: Path) -> dict[str, Location]:
    """Every tensor of a folder, in its files' order, also one that the index forgets. Reads headers only; raises
    CheckpointError."""
    index = folder / INDEX
    if not index.exists():
        if not (folder / SINGLE).is_file():
            raise CheckpointError(
                f"{folder}: holds neither {SINGLE} nor {INDEX}; it must be a Hugging Face folder (weights in "
                "pytorch_model.bin are not read: save them as safetensors)"
            )
        return read_header(folder / SINGLE)
    weight_map = _read_index(index)
    found: dict[str, Location] = {}
    for file in dict.fromkeys(weight_map.values()):
        if not (folder / file).is_file():
            raise CheckpointError(f"{index}: names {file}, which does not exist; fetch the missing file")
        for name, place in read_header(folder / file).items():
            if name in found:
                raise CheckpointError(
                    f"{folder / file}: {name} lies here and in {found[name].file}; remove one of them"
                )
            found[name] = place
    for name, file in weight_map.items():
        if name not in found or found[name].file != file:
            raise CheckpointError(f"{folder / file}: tensor {name} is missing, though {INDEX} promises it here")
    return found


def is_hf_folder(folder: Path) -> bool:
    return (folder / SINGLE).is_file() or (folder / INDEX).is_file()


def _read_index(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: not an index of safetensors files (weight_map must be an object)")
    for name, file in weight_map.items():
        if not is_plain_name(file):
            raise CheckpointError(f"{index}: tensor {name} points outside the folder ({file!r}); this is refused")
    return weight_map


def read_header(path: Path) -> dict[str, Location]:
    """The tensors of one safetensors file. CheckpointError if the file is not exactly what its header says."""
    size = path.stat().st_size
    header, data = safetensors.read_header(path)
    found = {name: _location(path, name, entry, data) for name, entry in header.items()}
    ranges = sorted((place.offset, place.offset + place.info.num_bytes) for place in found.values())
    end = max((stop for _, stop in ranges), default=data)
    if any(start < stop for (_, stop), (start, _) in itertools.pairwise(ranges)):
        raise CheckpointError(f"{path}: damaged: the header lets tensors overlap")
    if end != size:
        fault = f"{end - size:,} bytes are missing" if end > size else f"{size - end:,} bytes too many"
        raise CheckpointError(f"{path}: truncated or damaged: {fault}; fetch it again")
    return found


def _location(path: Path, name: str, entry: object, data: int) -> Location:
    try:
        if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
            raise ValueError("it must be an object with a dtype")
        shape, offsets = tuple(integers(entry.get("shape"))), integers(entry.get("data_offsets"))
        if len(offsets) != 2:
            raise ValueError("data_offsets must be two numbers")
    except ValueError as error:
        raise CheckpointError(f"{path}: not a safetensors header: tensor {name}: {error}") from None
    dtype, (start, end) = DTYPES.get(entry["dtype"]), offsets
    if dtype is None:
        raise CheckpointError(f"{path}: tensor {name} has dtype {entry['dtype']}; known are {', '.join(DTYPES)}")
    if min(shape, default=0) < 0 or start < 0 or end - start != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(f"{path}: tensor {name} of shape {list(shape)} does not fit its bytes {start} to {end}")
    return Location(path.name, data + start, TensorInfo(dtype, shape, str(path)))
