"""Read the `.metadata` of a torch_dist checkpoint without trust: no code of the pickle runs, every field is checked."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from megatron_r1.errors import CheckpointError
from megatron_r1.weights.files import is_plain_name

METADATA = ".metadata"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A key that is a tensor. `chunks` gives the sizes of the chunk at each offset."""

    dtype: torch.dtype
    size: tuple[int, ...]
    chunks: Mapping[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class StoredItem:
    """Where a key's chunk at `offsets` lies."""

    key: str
    offsets: tuple[int, ...]
    file: str
    position: int
    length: int
    transforms: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TorchDistMetadata:
    """`keys`: every key, with its tensor, or None if it is something else (extra states, random states)."""

    keys: Mapping[str, StoredTensor | None]
    items: tuple[StoredItem, ...]


def is_torch_dist(folder: Path) -> bool:
    return (folder / METADATA).is_file()


def read_metadata(folder: Path) -> TorchDistMetadata:
    """CheckpointError if `.metadata` is not one, contradicts itself, or points outside the folder."""
    path = folder / METADATA
    try:
        with open(path, "rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except Exception as error:  # a damaged pickle can lead anywhere: MemoryError, KeyError, OverflowError
        said = f"{type(error).__name__}: {error}"[:200]
        raise CheckpointError(f"{path}: not the metadata of a torch_dist checkpoint ({said})") from None
    if not isinstance(metadata, dcp.Metadata):
        raise CheckpointError(f"{path}: not the metadata of a torch_dist checkpoint")
    keys, items = getattr(metadata, "state_dict_metadata", None), getattr(metadata, "storage_data", None)
    if not isinstance(keys, dict) or not isinstance(items, dict) or not all(isinstance(key, str) for key in keys):
        raise CheckpointError(f"{path}: not the metadata of a torch_dist checkpoint (no keys, or no items)")
    return TorchDistMetadata(
        {key: _tensor(key, value, path) for key, value in keys.items()},
        tuple(_item(index, info, path) for index, info in items.items()),
    )


def _tensor(key: str, value: object, path: Path) -> StoredTensor | None:
    if not isinstance(value, dcp.TensorStorageMetadata):
        return None
    fault = CheckpointError(f"{path}: key {key} is not described as torch does it; fetch the file again")
    size, chunks = _dimensions(getattr(value, "size", None)), getattr(value, "chunks", None)
    dtype = getattr(getattr(value, "properties", None), "dtype", None)
    if size is None or not isinstance(chunks, list) or not isinstance(dtype, torch.dtype):
        raise fault
    found: dict[tuple[int, ...], tuple[int, ...]] = {}
    for chunk in chunks:
        offsets, sizes = _dimensions(getattr(chunk, "offsets", None)), _dimensions(getattr(chunk, "sizes", None))
        if offsets is None or sizes is None or not len(offsets) == len(sizes) == len(size):
            raise fault
        if any(start + count > whole for start, count, whole in zip(offsets, sizes, size, strict=True)):
            raise CheckpointError(f"{path}: key {key} of shape {list(size)} has a chunk outside of it")
        found[offsets] = sizes
    return StoredTensor(dtype, size, found)


def _item(index: object, info: object, path: Path) -> StoredItem:
    key, offset = getattr(index, "fqn", None), getattr(index, "offset", None)
    offsets = () if offset is None else _dimensions(offset)
    if not isinstance(index, dcp.MetadataIndex) or not isinstance(key, str) or offsets is None:
        raise CheckpointError(f"{path}: an item has no key; fetch the file again")
    fields = [getattr(info, name, None) for name in ("relative_path", "offset", "length")]
    file, position, length = fields
    if type(position) is not int or type(length) is not int or position < 0 or length < 0:
        raise CheckpointError(f"{path}: {key} lies nowhere ({fields}); fetch the file again")
    if not is_plain_name(file):
        raise CheckpointError(f"{path}: {key} points outside the folder ({file!r}); this is refused")
    transforms = getattr(info, "transform_descriptors", None) or ()
    return StoredItem(key, offsets, str(file), position, length, tuple(str(name) for name in transforms))


def _dimensions(value: object) -> tuple[int, ...] | None:
    """Offsets or sizes; None if they are not. torch.Size itself holds only integers."""
    return tuple(value) if isinstance(value, torch.Size) and min(value, default=0) >= 0 else None


def _memory_format(value: object) -> object:
    return dcp._MEM_FORMAT_ENCODING(value)


class _MetadataUnpickler(pickle.Unpickler):
    """Makes no object but those that describe tensors, each of a class made for this one reading: a pickle can set
    attributes of the classes that it names, which must not reach torch's own."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        kinds = (
            dcp.Metadata, dcp.MetadataIndex, dcp.ChunkStorageMetadata, dcp.TensorStorageMetadata,
            dcp.BytesStorageMetadata, dcp.TensorProperties, dcp.StorageMeta, _StorageInfo,
        )  # fmt: skip
        self._known: dict[tuple[str, str], Any] = {
            (kind.__module__, kind.__name__): type(kind.__name__, (kind,), {}) for kind in kinds
        }
        self._known[dcp.__name__, "_MEM_FORMAT_ENCODING"] = _memory_format
        self._known["torch.serialization", "_get_layout"] = torch.serialization._get_layout
        self._known["torch", "Size"] = torch.Size
        self._known["collections", "OrderedDict"] = OrderedDict
        self._other = type("_Other", (_Inert,), {})

    def find_class(self, module: str, name: str) -> Any:
        known = self._known.get((module, name))
        if known is not None:
            return known
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        return self._other


class _Inert:
    """Stands for every other object of the pickle (Megatron keeps its save plans there): nothing of it is run."""

    def __new__(cls, *arguments: object, **more: object) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *arguments: object, **more: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass

    def __hash__(self) -> int:
        return id(self)

    def append(self, *items: object) -> None:
        """For pickled subclasses of list and dict, like the next three."""

    def extend(self, items: object) -> None: ...

    def add(self, item: object) -> None: ...

    def __setitem__(self, key: object, value: object) -> None: ...
