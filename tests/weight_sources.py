"""Weight sources (megatron_r1.engines.source) over tensors, for tests that push into engines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from safetensors.torch import load_file

from megatron_r1.resharding.boxes import Box, whole
from megatron_r1.resharding.plan import Shard


class TensorSource:
    """Of `tensors` by name, which may be exchanged between pushes; all on one rank."""

    device = torch.device("cpu")

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = dict(tensors)

    def metadata(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        return [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.tensors.items()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self.tensors.items())

    @property
    def shards(self) -> list[Shard]:
        return [Shard(number, whole(shape), (0,)) for number, (_, _, shape) in enumerate(self.metadata())]

    def reading(self) -> AbstractContextManager[object]:
        return nullcontext()

    def read(self, tensor: int, box: Box) -> torch.Tensor:
        rows = list(self.tensors.values())[tensor]
        return rows.view(len(rows), -1)[box.top : box.bottom, box.left : box.right]


class FolderSource(TensorSource):
    """Of a folder's safetensors file, on `device`."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.device = torch.device(device)
        self.show(folder)

    def show(self, folder: Path) -> None:
        """From now on those of `folder`."""
        tensors = load_file(folder / "model.safetensors")
        self.tensors = {name: tensor.to(self.device) for name, tensor in tensors.items()}


class HalvesSource(FolderSource):
    """Of each tensor, rank 0 holds the upper rows and rank 1 the others; what a rank does not hold is not a number."""

    def __init__(self, folder: Path, rank: int) -> None:
        super().__init__(folder)
        self.rank = rank

    @property
    def shards(self) -> list[Shard]:
        boxes = [whole(shape) for _, _, shape in self.metadata()]
        halves = [box.cut(-(-box.rows // 2)) for box in boxes]
        return [Shard(n, box, (rank,)) for n, pair in enumerate(halves) for rank, box in enumerate(pair) if box.size]

    def read(self, tensor: int, box: Box) -> torch.Tensor:
        held = any(own.box.meet(box) == box for own in self.shards if own.tensor == tensor and self.rank in own.ranks)
        rows = super().read(tensor, box)
        return rows if held else torch.full_like(rows, torch.nan)
