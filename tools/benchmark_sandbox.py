"""Programs a second through the sandbox for code, beside the bare cost of starting the same interpreters.

usage: python tools/benchmark_sandbox.py [--programs 60] [--repeats 5] [--workers 2] [--json OUT]

Every level that works here, "none" included, and `bare` (subprocess.run with the interpreter's same options) run the
same program with the same input, in turns within each repeat. Medians of the repeats.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from megatron_r1.rewards.sandbox import Level, Sandbox, SandboxConfig, available_levels

PROGRAM = "print(sum(map(int, input().split())))"
GIVEN, WANTED = "1 2 3\n", b"6\n"
OPTIONS = ["-I", "-S", "-B", "-X", "utf8", "-X", "int_max_str_digits=0"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result = measure(arguments.programs, arguments.repeats, arguments.workers)
    print("| way | programs a second | against bare |\n| --- | --- | --- |")
    for name, rate in result.items():
        print(f"| {name} | {rate:.1f} | {rate / result['bare']:.2f} |")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def measure(programs: int, repeats: int, workers: int) -> dict[str, float]:
    """Median programs a second of each way."""
    levels: list[Level] = [level for level, reason in available_levels().items() if reason is None]
    levels.append("none")
    with ExitStack() as stack:
        ways: dict[str, Callable[[], bytes]] = {"bare": run_bare}
        for level in levels:
            sandbox = stack.enter_context(Sandbox(SandboxConfig(isolation=level, allow_unisolated=level == "none")))
            ways[level] = lambda box=sandbox: box.run(PROGRAM, GIVEN).stdout
        pool = stack.enter_context(ThreadPoolExecutor(workers))
        for way in ways.values():  # a launcher for every worker, before the clock runs
            run_all(pool, way, 2 * workers)
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(repeats):
            for name, way in ways.items():
                rates[name].append(programs / run_all(pool, way, programs))
    return {name: statistics.median(found) for name, found in rates.items()}


def run_all(pool: ThreadPoolExecutor, way: Callable[[], bytes], count: int) -> float:
    """Seconds for `count` programs on all workers."""
    began = time.perf_counter()
    outputs = list(pool.map(lambda _: way(), range(count)))
    seconds = time.perf_counter() - began
    if set(outputs) != {WANTED}:
        raise RuntimeError(f"a program printed {set(outputs)}; expected {WANTED!r}")
    return seconds


def run_bare() -> bytes:
    command = [os.path.realpath(sys.executable), *OPTIONS, "-c", PROGRAM]
    return subprocess.run(command, input=GIVEN.encode(), capture_output=True, env={"LANG": "C.UTF-8"}).stdout


if __name__ == "__main__":
    main()
