"""How fast examples are read: torch's DataLoader, NVIDIA DALI, and the memory map alone.

usage: python tools/benchmark_readers.py [--examples 20000] [--batch 128] [--batches 100] [--repeats 5] [--json OUT]

Random examples with log-uniform lengths of 64 to 8,192 tokens, page cache warm, written to a temporary folder. `map` is
BatchRows read in a plain loop: what no reader can beat in one process. Every reader gives the same batches and each is
timed from its second batch on (starting workers is shown apart). Interleaved repeats, medians. CPU seconds are those
of the process and its workers. `wait`: how long a batch is waited for when the process computes STEP_SECONDS between
batches, as training does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import psutil

from megatron_r1.config.sft_data import SFTDataConfig
from megatron_r1.data.examples import COUNTS, INDEX, TOKENS, ExampleStore, FlatBatch, open_cache, to_stored
from megatron_r1.data.mixture import TrainingOrder
from megatron_r1.data.reader import BatchRows, batch_source

SHORTEST, LONGEST = 64, 8192
STEP_SECONDS = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--batches", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = write_store(Path(folder), arguments.examples)
        config = SFTDataConfig(batch_sequences=arguments.batch, epochs=10**6)
        rows = BatchRows(store, TrainingOrder(store, config), 0)
        result = measure(rows, arguments.batches, arguments.repeats)
    print("| reader | start s | M tokens/s | / map | CPU s a G token | wait ms a batch, busy |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, row in result.items():
        print(
            f"| {name} | {row['start_seconds']:.2f} | {row['tokens_per_second'] / 1e6:.1f} | {row['of_map']:.2f} "
            f"| {row['cpu_seconds'] / row['tokens'] * 1e9:.1f} | {row['wait_seconds'] * 1e3:.2f} |"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def write_store(folder: Path, count: int) -> ExampleStore:
    """A cache folder of random examples, the last half of each trained on."""
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.uniform(np.log(SHORTEST), np.log(LONGEST), count)).astype(np.int64)
    with open(folder / TOKENS, "wb") as tokens:
        for length in lengths:
            ids = rng.integers(0, 129_280, length, dtype=np.int32)
            tokens.write(to_stored(ids, np.arange(length) >= length // 2).tobytes())
    np.savez(
        folder / INDEX,
        starts=np.cumsum([0, *lengths]),
        files=np.zeros(count, np.int32),
        questions=np.arange(count, dtype=np.uint64),
    )
    (folder / COUNTS).write_text(json.dumps([{"kept": count, "too_long": 0, "control_text": 0}]))
    return open_cache(folder)


def measure(rows: BatchRows, batches: int, repeats: int) -> dict[str, dict[str, float]]:
    readers: dict[str, Callable[[BatchRows], Iterator[FlatBatch]]] = {"map": iter}
    for name in ("torch", "dali"):
        for num_workers in (0, 1):
            source = partial(batch_source(name), num_workers=num_workers, prefetch_batches=2)
            readers[f"{name}, {num_workers} workers"] = source
    read(iter, rows, batches, 0.0)  # the page cache, and numpy's first calls
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in readers}
    for _ in range(repeats):
        for name, reader in readers.items():
            runs[name].append(read(reader, rows, batches, 0.0) | {"wait_seconds": busy(reader, rows, batches)})
    medians = {name: {key: statistics.median(run[key] for run in own) for key in own[0]} for name, own in runs.items()}
    for name, row in medians.items():
        pairs = zip(runs[name], runs["map"], strict=True)
        row["of_map"] = statistics.median(own["tokens_per_second"] / bare["tokens_per_second"] for own, bare in pairs)
    return medians


def busy(reader: Callable[[BatchRows], Iterator[FlatBatch]], rows: BatchRows, batches: int) -> float:
    """Seconds that a batch is waited for while the process computes between batches."""
    run = read(reader, rows, batches // 4, STEP_SECONDS)
    return run["seconds"] / (batches // 4)


def read(
    reader: Callable[[BatchRows], Iterator[FlatBatch]], rows: BatchRows, batches: int, step_seconds: float
) -> dict[str, float]:
    """`batches` batches after the first: seconds waited for them, CPU seconds, tokens."""
    begun = time.perf_counter()
    iterator = reader(rows)
    next(iterator)
    start_seconds = time.perf_counter() - begun
    cpu = cpu_seconds()
    seconds, tokens = 0.0, 0
    for _ in range(batches):
        begun = time.perf_counter()
        batch = next(iterator)
        seconds += time.perf_counter() - begun
        tokens += len(batch[0])
        compute(step_seconds)
    cpu = cpu_seconds() - cpu
    if hasattr(iterator, "close"):
        iterator.close()  # pyright: ignore[reportAttributeAccessIssue]
    return {
        "start_seconds": start_seconds,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
    }


def compute(seconds: float) -> None:
    """Arithmetic on one core, as training would do."""
    end = time.perf_counter() + seconds
    values = np.ones(1 << 14)
    while time.perf_counter() < end:
        values = np.sqrt(values + 1.0)


def cpu_seconds() -> float:
    """Of this process and the workers that live."""
    me = psutil.Process()
    times = [process.cpu_times() for process in (me, *me.children(recursive=True))]
    return sum(own.user + own.system for own in times)


if __name__ == "__main__":
    main()
