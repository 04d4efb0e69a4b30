"""Measure checkpoint conversion beside copying the same files, and beside what else would do it.

    tools/benchmark_conversion.py FOLDER [--fp8 FOLDER] [--repeats 3] [--json OUT]

FOLDER is a Hugging Face folder (tests/make_checkpoint.py makes one of any size); work files go beside it and are
removed. Each round copies FOLDER with cp, converts it to Megatron, converts that back, and loads and saves it with
transformers, in turn, so that all meet the same machine; the medians are reported. Conversions are made twice: as they
are by default, when they end with their bytes on the disk (to be compared with cp and sync), and with --no-sync, when
they end as cp does, with their bytes in memory. Before each step the disk is flushed, the page cache is filled with
other data and the step's source is read (page cache warm); destinations are removed after it. Times are of whole
processes, imports included, and of the conversion proper; memory is the largest sum over the step's processes of memory
that only they hold (PSS, shared pages divided), sampled 50 times a second in a round of its own before the others, so
that sampling slows no timed step. With --fp8, dequantising in memory is measured beside copying, both on all
cores, and the time for DeepSeek-V3 is predicted.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

V3_FP8_BYTES = 689_000_000_000
"""The published folder of DeepSeek-V3, with MTP."""

V3_BF16_BYTES = 2 * 682_636_487_424
"""Its parameters in bf16, those of MTP among them (its copies of embedding and head are not written)."""

STORAGE = (1, 5, 20)
"""GB/s, both ways together: a network mount, a good one, a parallel file system's node."""

LEAVES_MEGATRON = ("hf-to-megatron", "megatron-to-hf --no-sync")
"""Steps after which the source of the next one stays."""

TOOL = Path(__file__).parent / "convert_checkpoint.py"
TRANSFORMERS = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
model.save_pretrained(sys.argv[2])
"""


def main() -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--fp8", type=Path, help="an FP8 folder: also measure its conversion and dequantisation")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, help="write all measurements here")
    options = parser.parse_args()
    rows = measure(options.folder, options.fp8, options.repeats, options.workers)
    report = {"folder_bytes": size_of(options.folder), "steps": rows}
    print(table(rows, options.folder))
    if options.fp8:
        report["dequantise"] = dequantisation(options.repeats)
        found = report["dequantise"]
        print(
            f"dequantise {found['dequantise']:.1f} GB/s of bf16 written, copy {found['copy']:.1f} GB/s, "
            f"on {found['cores']} cores: {found['dequantise'] / found['copy']:.2f}"
        )
        print(prediction(rows["fp8 to megatron"], size_of(options.fp8), options.workers))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def measure(folder: Path, fp8: Path | None, repeats: int, workers: int) -> dict[str, list[dict[str, float]]]:
    work = folder.parent / f".{folder.name}.benchmark"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    convert = [sys.executable, str(TOOL)]
    many = ["--workers", str(workers)]
    to_megatron = [*convert, "hf-to-megatron", str(folder), str(work / "megatron"), *many]
    to_hf = [*convert, "megatron-to-hf", str(work / "megatron"), str(work / "hf"), *many]
    steps: dict[str, list[str]] = {
        "cp": ["cp", "-r", str(folder), str(work / "cp")],
        "hf-to-megatron --no-sync": [*to_megatron, "--no-sync"],
        "hf-to-megatron": to_megatron,
        "megatron-to-hf --no-sync": [*to_hf, "--no-sync"],
        "megatron-to-hf": to_hf,
        "transformers": [sys.executable, "-c", TRANSFORMERS, str(folder), str(work / "transformers")],
    }
    if fp8:
        steps["fp8 to megatron"] = [*convert, "hf-to-megatron", str(fp8), str(work / "fp8"), *many]
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
    peaks: dict[str, float] = {}
    try:
        for repeat in range(repeats + 1):
            for name, command in steps.items():
                os.sync()
                fill_page_cache(work / "filler")
                source = work / "megatron" if name.startswith("megatron-to-hf") else folder
                warm(fp8 if fp8 and name.startswith("fp8") else source)
                row = run(command, sample_memory=repeat == 0)
                if repeat:
                    rows[name].append(row | {"peak_bytes": peaks[name]})
                else:
                    peaks[name] = row["peak_bytes"]
                if repeat and name == "cp":
                    started = time.perf_counter()
                    os.sync()
                    rows[name][-1]["with_sync"] = rows[name][-1]["seconds"] + time.perf_counter() - started
                for made in work.iterdir():
                    if made.is_dir() and not (made.name == "megatron" and name in LEAVES_MEGATRON):
                        shutil.rmtree(made)
                timed = f"{row['seconds']:.1f} s" if repeat else f"{row['peak_bytes'] / 1e9:.2f} GB"
                print(f"{repeat}/{repeats} {name}: {timed}", file=sys.stderr)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return rows


def run(command: list[str], *, sample_memory: bool) -> dict[str, float]:
    """Wall-clock and CPU seconds of a command, those that it says itself, and (if asked) its processes' peak PSS."""
    before = os.times()
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        peak = PeakMemory(process.pid) if sample_memory else None
        out, error = process.communicate()
        seconds = time.perf_counter() - started
        memory = peak.stop() if peak is not None else 0.0
    if process.returncode:
        raise SystemExit(f"{' '.join(command[:4])} ...: {error[-2000:]}")
    after = os.times()
    cpu = after.children_user - before.children_user + after.children_system - before.children_system
    said = re.search(r"in ([0-9.]+) s \(", out)
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "peak_bytes": memory,
        "proper_seconds": float(said[1]) if said else seconds,
    }


class PeakMemory:
    """Samples a process tree's PSS in a thread until it is stopped."""

    def __init__(self, pid: int) -> None:
        self._pid, self._peak, self._ended = pid, 0.0, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def stop(self) -> float:
        self._ended.set()
        self._thread.join()
        return self._peak

    def _sample(self) -> None:
        import psutil

        while not self._ended.wait(0.02):
            total = 0
            try:
                root = psutil.Process(self._pid)
                for process in (root, *root.children(recursive=True)):
                    text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
                    total += int(re.search(r"^Pss:\s+(\d+)", text, re.M)[1]) * 1024  # pyright: ignore
            except (psutil.Error, OSError, TypeError):
                continue
            self._peak = max(self._peak, total)


def dequantisation(repeats: int) -> dict[str, float]:
    """GB/s of bf16 written by one process on each core, of dequantising and of copying the same bytes, medians."""
    context = multiprocessing.get_context("fork")
    cores = os.cpu_count() or 1
    barrier, results = context.Barrier(cores), context.Queue()
    processes = [context.Process(target=_dequantise, args=(barrier, results, repeats + 2)) for _ in range(cores)]
    for process in processes:
        process.start()
    found = [results.get() for _ in processes]
    for process in processes:
        process.join()
    sums = [[sum(rates) for rates in zip(*kind, strict=True)] for kind in zip(*found, strict=True)]
    return {"dequantise": statistics.median(sums[0]), "copy": statistics.median(sums[1]), "cores": cores}


def _dequantise(barrier, results, rounds: int) -> None:
    import torch

    from megatron_r1.weights.fp8 import dequantise, quantise

    torch.set_num_threads(1)
    weight = torch.randn(7168, 7168).bfloat16()
    codes, scales = quantise(weight, block=128)
    out = torch.zeros_like(weight)
    rates: tuple[list[float], list[float]] = ([], [])
    works: tuple[Callable[[], object], Callable[[], object]] = (
        lambda: dequantise(codes, scales, block=128, out=out),
        lambda: out.copy_(weight),
    )
    for _ in range(rounds):
        for kind, work in enumerate(works):
            barrier.wait()
            started = time.perf_counter()
            for _ in range(4):
                work()
            rates[kind].append(4 * out.numel() * 2 / (time.perf_counter() - started) / 1e9)
    results.put([list(kind) for kind in rates])


def table(rows: dict[str, list[dict[str, float]]], folder: Path) -> str:
    size = size_of(folder) / 1e9

    def median(name: str, field: str) -> float:
        return statistics.median(row[field] for row in rows[name])

    lines = [f"{folder.name}, {size:.2f} GB, medians of {len(rows['cp'])}"]
    lines.append("| step | s | of it the conversion | CPU s | peak PSS | speed / cp | / cp and sync |")
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for name in rows:
        seconds, proper = median(name, "seconds"), median(name, "proper_seconds")
        ratio, synced = median("cp", "seconds") / proper, median("cp", "with_sync") / proper
        lines.append(
            f"| {name} | {seconds:.1f} | {proper:.1f} | {median(name, 'cpu_seconds'):.1f} | "
            f"{median(name, 'peak_bytes') / 1e9:.2f} GB | {ratio:.2f} | {synced:.2f} |"
        )
    return "\n".join(lines)


def prediction(rows: list[dict[str, float]], source_bytes: int, workers: int) -> str:
    """DeepSeek-V3 in FP8 to Megatron in bf16, if every worker goes on at the rate that was measured, `workers` at once
    here, and the storage at a given one. A conversion runs on one node; its storage is what that node gets."""
    seconds = statistics.median(row["proper_seconds"] for row in rows)
    rate = source_bytes / seconds / workers
    memory = statistics.median(row["peak_bytes"] for row in rows) / workers
    read, written = V3_FP8_BYTES, V3_BF16_BYTES
    lines = [
        f"DeepSeek-V3: {read / 1e9:.0f} GB to read, {written / 1e9:,.0f} to write; a worker reads {rate / 1e9:.2f} GB/s"
    ]
    lines.append("| workers | memory | " + " | ".join(f"storage of {speed} GB/s" for speed in STORAGE) + " |")
    lines.append("| --- | --- |" + " --- |" * len(STORAGE))
    for count in (2, 8, 32, 64):
        work = read / rate / count
        times = (max(work, (read + written) / (speed * 1e9)) / 60 for speed in STORAGE)
        lines.append(f"| {count} | {count * memory / 1e9:.1f} GB | " + " | ".join(f"{t:.0f} min" for t in times) + " |")
    return "\n".join(lines)


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def warm(folder: Path) -> None:
    for _ in range(2):  # what is read twice stays when memory is short
        for path in folder.iterdir():
            if path.is_file():
                read(path)


def fill_page_cache(filler: Path) -> None:
    """Leave no memory free, as on a machine that has been up for a while: whoever writes first has pages of other files
    to drop. (Free memory of a virtual machine may be lent out by its host: each page's first use then takes longer, for
    whichever step comes upon it.) Reads a file of holes, which takes no disk."""
    if not filler.exists():
        with open(filler, "wb") as file:
            file.truncate(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    read(filler)


def read(path: Path) -> None:
    buffer = bytearray(1 << 24)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


if __name__ == "__main__":
    sys.exit(main())
