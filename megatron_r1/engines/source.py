"""What a weight source is, and the checks that keep a bad one away from the servers.

The names and shapes that a model accepts are read from the safetensors headers of the folder that it was
started from, so a mismatch is found before a server pauses. Gathering the tensors is done elsewhere
(weights/).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch

from megatron_r1.config.safetensors import read_header
from megatron_r1.resharding.boxes import Box
from megatron_r1.resharding.layers import group_of_tensor
from megatron_r1.resharding.plan import Shard
from megatron_r1.weights.wire import ParamSpec

FAULTS_SHOWN = 5


class WeightSource(Protocol):
    """The trainer's weights under Hugging Face names; re-iterable, each pass yields the current values.

    Iteration is a collective over the trainer ranks; `metadata` is none, and the same on every rank.
    """

    def metadata(self) -> Sequence[ParamSpec]:
        """(name, wire dtype, full shape) of everything that iteration yields, in its order."""
        ...

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]: ...


class ShardedSource(WeightSource, Protocol):
    """Weights that each rank can read its own shards of, without the others. Tensors are numbered as in `metadata`."""

    @property
    def shards(self) -> Sequence[Shard]:
        """Which ranks hold which boxes of which tensors; the same on every rank."""
        ...

    @property
    def device(self) -> torch.device:
        """Where what is read lies."""
        ...

    def reading(self) -> AbstractContextManager[object]:
        """`read` may be called while it lasts, and the weights stay as they are. Entered by all ranks."""
        ...

    def read(self, tensor: int, box: Box) -> torch.Tensor:
        """This rank's present numbers, [rows, columns], of a box that lies in one of its shards; of any dtype."""
        ...


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in the folder's safetensors files; empty if it has none. CheckpointError for a file
    that is no such file."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        shapes |= {name: tuple(entry["shape"]) for name, entry in read_header(path)[0].items()}
    return shapes


def check_parameters(specs: Sequence[ParamSpec], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError listing names that the served checkpoint lacks, or has with another shape, and layers
    of which only a part is sent: servers fuse a layer's tensors and would fill up the rest with anything.

    A source may leave out whole layers (frozen ones keep their weights). Nothing is checked if `expected` is
    empty.
    """
    faults = []
    if expected:
        sent = Counter(group_of_tensor(name) for name, _, _ in specs)
        held = Counter(group_of_tensor(name) for name in expected)
        faults += [
            f"{group}: {count} of its {held[group]} tensors are sent; send all of a layer, or none"
            for group, count in sent.items()
            if count < held[group]
        ]
    for name, _, shape in specs if expected else ():
        if name not in expected:
            faults.append(f"{name}: not in the served checkpoint")
        elif tuple(shape) != expected[name]:
            faults.append(f"{name}: got shape {tuple(shape)}, the served checkpoint has {expected[name]}")
    if faults:
        more = f"\n  and {len(faults) - FAULTS_SHOWN} more" if len(faults) > FAULTS_SHOWN else ""
        raise ValueError(
            f"weight sync: {len(faults)} of {len(specs)} parameters do not fit the served model; none sent. "
            "Export Hugging Face names and full shapes of the checkpoint that the servers started from.\n  "
            + "\n  ".join(faults[:FAULTS_SHOWN])
            + more
        )
