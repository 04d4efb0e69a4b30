"""Batches of examples for the training loop, resumable at any step, whatever library reads them.

`ExampleReader` decides what a batch is and counts what was delivered; a `BatchSource` only moves the rows, ahead of
time if it can. There are two (torch_reader.py, dali_reader.py), and both give the same batches in the same order. Every
rank reads the whole batch; packing takes the rank's rows. Left out: moving arrays to a device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from megatron_r1.config.sft_data import SFTDataConfig
from megatron_r1.data.examples import ExampleStore, FlatBatch, training_sequences
from megatron_r1.data.mixture import TrainingOrder
from megatron_r1.errors import DataError
from megatron_r1.types import TrainingSequence


class BatchRows(Sequence[FlatBatch]):
    """The batches from `position` to the end of the stream; copied out of the store when asked for."""

    def __init__(self, store: ExampleStore, order: TrainingOrder, position: int) -> None:
        self.store, self.order, self.position = store, order, position

    def __len__(self) -> int:
        return -(-(self.order.total - self.position) // self.order.batch_sequences)

    def __getitem__(self, index: int) -> FlatBatch:  # pyright: ignore[reportIncompatibleMethodOverride] - no slices
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        return self.store.gather(self.order.batch(self.position + index * self.order.batch_sequences))


class BatchSource(Protocol):
    """Gives all of `rows` in order. Closing the iterator ends what reads ahead."""

    def __call__(self, rows: BatchRows, *, num_workers: int, prefetch_batches: int) -> Iterator[FlatBatch]: ...


class ExampleReader:
    """Iterates over the batches that are left, one optimizer step each: `config.epochs` epochs from the start.

    `order.num_steps` steps in all. Its state is what was delivered; what a source has read ahead does not count.
    """

    def __init__(self, store: ExampleStore, config: SFTDataConfig) -> None:
        """ConfigError as TrainingOrder raises it."""
        self.store, self.order = store, TrainingOrder(store, config)
        self._config = config
        self._source = batch_source(config.reader)
        self._position = 0
        self._batches: Iterator[FlatBatch] | None = None

    def __iter__(self) -> Iterator[list[TrainingSequence]]:
        return self

    def __next__(self) -> list[TrainingSequence]:
        """The next global batch, with token weights that sum to 1."""
        if self._position >= self.order.total:
            self.close()
            raise StopIteration
        if self._batches is None:
            rows = BatchRows(self.store, self.order, self._position)
            self._batches = self._source(
                rows, num_workers=self._config.num_workers, prefetch_batches=self._config.prefetch_batches
            )
        batch = next(self._batches, None)
        assert batch is not None, "the source gave fewer batches than it was handed"
        self._position += len(batch[1])
        return training_sequences(batch, self._config.loss)

    @property
    def epochs_done(self) -> float:
        """Epochs delivered, with the part of the present one."""
        return self._position / self.order.epoch_size

    def validation_sequences(self) -> list[TrainingSequence]:
        """All validation examples; their weighted loss is the validation loss. Empty if there are none."""
        if not len(self.order.validation):
            return []
        return training_sequences(self.store.gather(self.order.validation), self._config.loss)

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON; includes what must be equal for the position to mean the same example."""
        return self.order.identity | {"position": self._position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken. Epochs, batch size and reader may have changed meanwhile; DataError if
        the examples or their order have."""
        for key, own in self.order.identity.items():
            if state[key] != own:
                raise DataError(
                    f"checkpointed example reader: {key} is {state[key]}, this run has {own}; they must be equal to "
                    "resume; restore the checkpoint's data configuration and files or start a new run folder"
                )
        self.close()
        self._position = state["position"]

    def close(self) -> None:
        """End what reads ahead; iterating goes on where it was."""
        if self._batches is not None:
            self._batches.close()  # pyright: ignore[reportAttributeAccessIssue] - sources are generators
            self._batches = None


def batch_source(name: str) -> BatchSource:
    """The source that config.reader names; its library is imported now."""
    if name == "torch":
        from megatron_r1.data.torch_reader import torch_batches

        return torch_batches
    from megatron_r1.data.dali_reader import dali_batches

    return dali_batches
