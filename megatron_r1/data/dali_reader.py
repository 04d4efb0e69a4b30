"""Batches through NVIDIA DALI: an external source over the rows, its workers and its queue.

A whole batch is one DALI sample (tokens end to end) with its lengths beside it: a sample for each example costs more
than the copying. The pipeline has no GPU on any machine: rows are packed in host memory, so what comes out is copied
there at once, and page-locked buffers would cost a CUDA context for nothing. DALI comes with the [gpu] extra.
"""

# DALI's operators are made at import time, so their signatures are unknown to pyright.
# pyright: reportAttributeAccessIssue=false, reportMissingImports=false

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from nvidia.dali import Pipeline, fn, types
from nvidia.dali.types import SampleInfo

from megatron_r1.data.examples import FlatBatch
from megatron_r1.data.reader import BatchRows


class _DaliRows:
    """Called with a running number; a class so that worker processes can be sent it."""

    def __init__(self, rows: BatchRows) -> None:
        self.rows = rows

    def __call__(self, info: SampleInfo) -> FlatBatch:
        if info.idx_in_epoch >= len(self.rows):
            raise StopIteration
        return self.rows[info.idx_in_epoch]


def dali_batches(rows: BatchRows, *, num_workers: int, prefetch_batches: int) -> Iterator[FlatBatch]:
    """All of `rows` in order. With workers, `prefetch_batches` are read ahead in their processes."""
    pipeline = Pipeline(
        batch_size=1,
        num_threads=1,
        device_id=None,
        prefetch_queue_depth=prefetch_batches,
        py_num_workers=max(num_workers, 1),
        py_start_method="spawn",  # a fork of a process with threads may hang
    )
    with pipeline:
        outputs = fn.external_source(
            source=_DaliRows(rows),
            num_outputs=2,
            batch=False,
            dtype=[types.INT32, types.INT64],
            ndim=[1, 1],
            parallel=num_workers > 0,
            prefetch_queue_depth=prefetch_batches if num_workers else None,
        )
        pipeline.set_outputs(*outputs)
    pipeline.build()
    for _ in range(len(rows)):
        tokens, lengths = pipeline.run()
        yield np.array(tokens.at(0)), np.array(lengths.at(0))  # copies: DALI writes into its buffers again
