"""The pieces of a policy's tensors in a checkpoint's files, put together as a rank of any layout needs them.

A piece is named by the weight table's parameter, its shard and its slice. Left out: what is written, and where what is
read goes (checkpoint.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from megatron_r1.errors import CheckpointError
from megatron_r1.policy.policy import Policy
from megatron_r1.policy.topology import answered
from megatron_r1.weights.local import LocalTensor
from megatron_r1.weights.table import shard_shape
from megatron_r1.weights.transforms import shard, unshard

REFERENCE = "reference"
"""The kind of a piece of the reference policy."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements [start, stop) of flattened shard `index` of `count` of a parameter; `kind` says of what about it."""

    name: str
    kind: str
    index: int
    count: int
    start: int
    stop: int

    @property
    def key(self) -> str:
        return f"{self.name}|{self.kind}|{self.index}|{self.count}|{self.start}|{self.stop}"

    @classmethod
    def of(cls, key: str) -> Piece:
        name, kind, *numbers = key.split("|")
        return cls(name, kind, *map(int, numbers))


class SavedPieces:
    """The pieces of a folder that this rank may need, in whatever files they lie: only those are opened."""

    def __init__(self, folder: Path, files: Mapping[str, Sequence[str]], *, has_reference: bool) -> None:
        """`files`: by file, the keys of its pieces."""
        self.folder, self.has_reference = folder, has_reference
        self.pieces: dict[tuple[str, str], list[tuple[Piece, Any]]] = {}
        for file, keys in files.items():
            opened = _opened(folder / file)
            for piece in map(Piece.of, keys):
                self.pieces.setdefault((piece.name, piece.kind), []).append((piece, opened))

    @classmethod
    def of(cls, policy: Policy, folder: Path) -> SavedPieces:
        """A collective: rank 0 reads the headers of all files, and tells each rank which hold what it asks for."""
        # A tied head is a copy of the embedding on the last pipeline stage; on one stage there is none.
        asked = {name: (local.entry.name, local.index, local.count) for name, local in policy.tensors.items()}

        def answer(everyone: list[dict[str, tuple[str, int, int]]]) -> list[tuple[dict[str, list[str]], bool]]:
            index: dict[str, list[tuple[Piece, str]]] = {}
            for file in sorted(folder.glob("state-*.safetensors")):
                for key in _opened(file).keys():  # noqa: SIM118 - it is no dict
                    piece = Piece.of(key)
                    index.setdefault(piece.name, []).append((piece, file.name))
            reference = any(piece.kind == REFERENCE for found in index.values() for piece, _ in found)
            return [(_files_of(index, names), reference) for names in everyone]

        files, has_reference = answered(asked, answer)
        return cls(folder, files, has_reference=has_reference)

    def read_shard(self, policy: Policy, name: str, kind: str) -> torch.Tensor:
        """This rank's shard of a parameter, in its shape."""
        tensor = policy.tensors[name].tensor
        return self.read(policy, name, kind, 0, tensor.numel()).view(tensor.shape)

    def read(self, policy: Policy, name: str, kind: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of this rank's flattened shard of a parameter."""
        local = policy.tensors[name]
        # A tied head is a copy of the embedding on the last pipeline stage; on one stage there is none.
        found = self.pieces.get((name, kind)) or self.pieces.get((local.entry.name, kind))
        if not found:
            raise CheckpointError(f"{self.folder}: {kind} of {name} is missing; it belongs to another model")
        same = [(piece, file) for piece, file in found if (piece.index, piece.count) == (local.index, local.count)]
        if same:
            return _slice(same, start, stop)
        return self._cut_anew(policy, local, found).flatten()[start:stop]

    def _cut_anew(self, policy: Policy, local: LocalTensor, found: list[tuple[Piece, Any]]) -> torch.Tensor:
        entry, shape, count = local.entry, policy.shape, found[0][0].count
        size = math.prod(shard_shape(entry, count))
        shards = [
            _slice([(piece, file) for piece, file in found if piece.index == index], 0, size).view(
                shard_shape(entry, count)
            )
            for index in range(count)
        ]
        whole = dict(zip(entry.hf, unshard(entry, shape, shards), strict=True))

        def read(name: str, dim: int, start: int, stop: int) -> torch.Tensor:
            return whole[name] if dim < 0 else whole[name].narrow(dim, start, stop - start)

        return shard(entry, shape, read, local.index, local.count)


def _files_of(
    index: Mapping[str, Sequence[tuple[Piece, str]]], asked: Mapping[str, tuple[str, int, int]]
) -> dict[str, list[str]]:
    """By file, the keys that make these parameters: of the same shards where there are such, else of all."""
    files: dict[str, list[str]] = {}
    for name, (entry, shard_index, count) in asked.items():
        found = index.get(name) or index.get(entry) or []
        same = [(piece, file) for piece, file in found if (piece.index, piece.count) == (shard_index, count)]
        for piece, file in same or found:
            files.setdefault(file, []).append(piece.key)
    return {file: list(dict.fromkeys(keys)) for file, keys in files.items()}


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except Exception as error:  # safetensors' own error class is no OSError
        raise CheckpointError(f"{file.parent}: cannot be read: {error}; take an earlier checkpoint") from error


def _slice(pieces: Sequence[tuple[Piece, Any]], start: int, stop: int) -> torch.Tensor:
    """Elements [start, stop) of a flattened shard from its pieces. CheckpointError if they leave a gap."""
    parts = []
    place = start
    for piece, file in sorted(pieces, key=lambda found: found[0].start):
        last = min(piece.stop, stop)
        if piece.start <= place < last:
            parts.append(file.get_slice(piece.key)[place - piece.start : last - piece.start])
            place = last
    if place < stop:
        raise CheckpointError(f"elements {place} to {stop} of {pieces[0][0].name} are missing from the checkpoint")
    return torch.cat(parts) if len(parts) != 1 else parts[0]
