"""Batches through torch's DataLoader: worker processes that read ahead, or none."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset

from megatron_r1.data.examples import FlatBatch
from megatron_r1.data.reader import BatchRows


class _TorchRows(Dataset):
    """A batch is an item: workers send two tensors through shared memory instead of pickled arrays."""

    def __init__(self, rows: BatchRows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, lengths = self.rows[index]
        return torch.from_numpy(tokens), torch.from_numpy(lengths)


def torch_batches(rows: BatchRows, *, num_workers: int, prefetch_batches: int) -> Iterator[FlatBatch]:
    """All of `rows` in order. With workers, each reads `prefetch_batches` ahead."""
    loader = DataLoader(
        _TorchRows(rows),
        batch_size=None,
        shuffle=False,
        num_workers=num_workers,
        prefetch_factor=prefetch_batches if num_workers else None,
        multiprocessing_context="forkserver" if num_workers else None,  # a fork of a process with threads may hang
        generator=torch.Generator(),  # or it would draw from the global one, and a resumed run would differ
    )
    for tokens, lengths in loader:
        yield tokens.numpy(), lengths.numpy()
