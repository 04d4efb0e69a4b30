"""Measure what --train.deterministic adds to a training step, and whether runs give the same bits with and without it.

usage: python tools/benchmark_determinism.py [--repeats 5] [--steps 8] [--json OUT] -- WORDS

WORDS are those of `megatron-r1 run` for a GRPO recipe whose model has weights, such as
`tiny --model.path runs/quickstart/warm_up/model --model.initialise weights`. A first run samples with --rollout-only;
then --train-only trains on what was kept, with and without the setting by turns, each run in processes of its own,
because libraries read it from the environment. Medians over the runs of a step's seconds of training (without a run's
first step), and of the CPU-seconds of whole runs, start included.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_r1.observe.progress import duration

SIDES = {"as ever": "--train.no-deterministic", "deterministic": "--train.deterministic"}


def main() -> None:
    place = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    options = parser.parse_args(sys.argv[1:place])
    if options.repeats < 1 or options.steps < 2:
        parser.error("--repeats must be at least 1 and --steps at least 2: a run's first step is not counted")
    if not (words := sys.argv[place + 1 :]):
        parser.error("WORDS are missing: -- RECIPE and its options")
    words += ["--steps", str(options.steps), "--checkpoint-every", "0"]
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(words, options.repeats, Path(scratch))
    for line in table(found):
        print(line)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def measure(words: Sequence[str], repeats: int, scratch: Path) -> dict[str, list[dict[str, Any]]]:
    """By side, one row a run: seconds (median of its steps), cpu_seconds, sha256 of the policy's weights."""
    seconds = run([*words, "--rollout-only", "--run-dir", str(scratch / "sampled")])
    print(f"sampled in {duration(seconds)} of CPU time", flush=True)
    rows: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for repeat in range(repeats):
        for side in list(SIDES)[:: 1 if repeat % 2 else -1]:
            folder = scratch / f"{side}-{repeat}"
            own = ["--train-only", str(scratch / "sampled"), "--run-dir", str(folder), SIDES[side]]
            cpu = run([*words, *own])
            steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
            row = {"seconds": statistics.median(step["seconds"]["train"] for step in steps[1:]), "cpu_seconds": cpu}
            rows[side].append(row | {"sha256": weights_hash(folder / "policy")})
            print(f"[{repeat + 1}/{repeats}] {side}: {row['seconds']:.3f} s a step", flush=True)
    return rows


def run(words: Sequence[str]) -> float:
    """CPU-seconds of `megatron-r1 run WORDS`. Exits with what it says if it fails."""
    before = children_seconds()
    command = [sys.executable, "-m", "megatron_r1", "run", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"benchmark_determinism: {' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return children_seconds() - before


def children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def weights_hash(folder: Path) -> str:
    """Of all weight files, by name."""
    digest = hashlib.sha256()
    if not (files := sorted(folder.glob("*.safetensors"))):
        sys.exit(f"benchmark_determinism: {folder} has no weights")
    for path in files:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def table(rows: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The table of docs/restart.md."""
    lines = [
        "| | seconds of a step | least | most | CPU-seconds of a run | different weights |",
        "| --- |" + " --- |" * 5,
    ]
    for side, runs in rows.items():
        seconds, cpu = ([row[field] for row in runs] for field in ("seconds", "cpu_seconds"))
        lines.append(
            f"| {side} | {statistics.median(seconds):.3f} | {min(seconds):.3f} | {max(seconds):.3f} | "
            f"{statistics.median(cpu):.1f} | {len({row['sha256'] for row in runs})} in {len(runs)} runs |"
        )
    return lines


if __name__ == "__main__":
    main()
