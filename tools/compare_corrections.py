"""Train the tiny mixture of experts with stale, bf16 samples under each correction: what they cost, what they save.

usage: python tools/compare_corrections.py FOLDER [--methods none tis ...] [--sync-every 1 4 16] [--seeds 0 1 2 3 4]
           [--steps 64] [--minibatches 2] [--warm-up-steps 600] [--at-once 1] [--draw] [-- WORDS]

The quickstart's warm-up makes one base model; from it each cell (method, sync_every, seed) runs the recipe `tiny` with
real servers in bf16 and a trainer in fp32, and WORDS behind its own options. A cell that has finished is not run again;
one that was stopped goes on from its last checkpoint. FOLDER gets base_STEPS/, cells/, and, written anew after each
cell, results.json and curves.html (means over seeds, bands of one standard deviation). All methods run with one seed
before any runs with the next.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_r1.files import write_whole
from megatron_r1.observe.charts import Chart, Series, line_chart
from megatron_r1.observe.page import document, write_page
from megatron_r1.observe.progress import duration

METHODS: Mapping[str, Mapping[str, str]] = {
    "none": {"weight": "none"},
    "tis": {"weight": "token"},
    "icepop": {"weight": "token", "beyond": "mask", "high": "5"},
    "sequence": {"weight": "sequence"},
    "sequence_mask": {"weight": "sequence", "beyond": "mask"},
    "decoupled": {"weight": "token", "high": "1e9"},
    "coupled": {"ratio_against": "rollout"},
}
"""Fields of algorithm.correction."""
CURVES = (
    "reward_mean",
    "eval_accuracy",
    "kl",
    "correction_weight",
    "correction_cut",
    "clip_fraction",
    "effective_samples",
    "mismatch",
)
"""Of metrics.jsonl, by step; in results.json."""
DRAWN = {
    "reward_mean": "Reward of the samples",
    "eval_accuracy": "Accuracy on the validation problems",
    "correction_cut": "Tokens whose weight was cut",
    "effective_samples": "Effective samples, a share of the tokens",
    "mismatch": "Mean |logprob(servers) - logprob(trainer)|",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    method: str
    sync_every: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}-sync{self.sync_every}-seed{self.seed}"

    def words(self, base: Path, folder: Path, options: argparse.Namespace) -> list[str]:
        """The command's, behind `run`. Evaluations and checkpoints are where every cell has them: after a sync."""
        every = str(max(options.sync_every))
        given = {
            "model.path": str(base),
            "model.initialise": "weights",
            "run-dir": str(folder),
            "if-exists": "resume",
            "seed": str(self.seed),
            "steps": str(options.steps),
            "minibatches": str(options.minibatches),
            "sync-every": str(self.sync_every),
            "eval-every": every,
            "checkpoint-every": every,
            "data.holdout": "200",
            "data.validation": "100",
            "rollout.dtype": "bf16",
            "mismatch-bound": "1.0",
            "rollouts-logged-per-step": "0",
            **{f"algorithm.correction.{field}": value for field, value in METHODS[self.method].items()},
        }
        own = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", value)]
        return ["tiny", *own, *options.words]


def main() -> int:
    options = parsed(sys.argv[1:])
    cells = [
        Cell(method=method, sync_every=every, seed=seed)
        for seed, every, method in itertools.product(options.seeds, options.sync_every, options.methods)
    ]
    options.folder.mkdir(parents=True, exist_ok=True)
    if not (base := base_model(options)):
        return 1
    pending = [cell for cell in cells if not finished(cell, base, options) and not options.draw]
    if not options.draw:
        print(f"{len(cells)} cells, {len(cells) - len(pending)} of them finished", flush=True)
    begun, failed = time.monotonic(), list[str]()
    pool = ThreadPoolExecutor(options.at_once)
    running = {pool.submit(run, cell, base, options): cell for cell in pending}
    try:
        for number, future in enumerate(as_completed(running)):
            cell, said = running[future], "failed"
            if future.result():
                result = result_of(cell, options)
                said = f"{result['accuracy_before']:.1%} -> {result['accuracy_after']:.1%}"
            else:
                failed.append(cell.name)
            write(options, [cell for cell in cells if finished(cell, base, options)])
            spent = time.monotonic() - begun
            left = spent / (number + 1) * (len(pending) - number - 1)
            gone = f"{duration(spent)} gone, about {duration(left)} left"
            print(f"[{number + 1}/{len(pending)}] {cell.name}: {said}; {gone}", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C reaches the cells that run; no other may begin
    write(options, [cell for cell in cells if finished(cell, base, options)])
    print(table(options))
    print(f"{options.folder}/results.json and {options.folder}/curves.html")
    for name in failed:
        print(f"compare_corrections: {name} failed: {options.folder}/cells/{name}.log", file=sys.stderr)
    return 1 if failed else 0


def parsed(words: Sequence[str]) -> argparse.Namespace:
    place = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--methods", nargs="+", choices=[*METHODS], default=[*METHODS])
    parser.add_argument("--sync-every", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--minibatches", type=int, default=2)
    parser.add_argument("--warm-up-steps", type=int, default=600, help="of the base model; 600 as in the quickstart")
    parser.add_argument("--at-once", type=int, default=1, help="cells that run side by side; one uses about a core")
    parser.add_argument("--draw", action="store_true", help="no runs: draw the cells that have finished")
    options = parser.parse_args(words[:place])
    options.words = list(words[place + 1 :])
    longest = max(options.sync_every)
    if options.at_once < 1:
        parser.error("--at-once: at least 1")
    if any(every < 1 or longest % every for every in options.sync_every):
        parser.error(f"--sync-every: each must divide the longest, {longest}: evaluations are common to all")
    return options


def base_model(options: argparse.Namespace) -> Path | None:
    """The quickstart's warm-up, made once."""
    folder = options.folder / f"base_{options.warm_up_steps}"
    words = ["quickstart", "--only", "warm_up", "--run-dir", str(folder)]
    words += ["--warm-up.steps", str(options.warm_up_steps)]
    made = (folder / "warm_up" / "summary.json").exists()  # `--only` would make it again
    if not made and not called(words, options.folder / "base.log"):
        print(f"compare_corrections: the base model failed: {options.folder}/base.log", file=sys.stderr)
        return None
    return folder / "warm_up" / "model"


def called(words: Sequence[str], log: Path) -> bool:
    """`megatron-r1 run WORDS` with what it says in `log`; whether it ended well."""
    with open(log, "a", encoding="utf-8") as file:
        command = [sys.executable, "-m", "megatron_r1", "run", *words]
        return subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode == 0


def folder_of(cell: Cell, options: argparse.Namespace) -> Path:
    return options.folder / "cells" / cell.name


def run(cell: Cell, base: Path, options: argparse.Namespace) -> bool:
    folder = folder_of(cell, options)
    folder.parent.mkdir(exist_ok=True)
    words = cell.words(base, folder, options)
    done = called(words, folder.with_suffix(".log"))
    if done:
        write_whole(folder / "words.json", json.dumps(words))
    return done


def finished(cell: Cell, base: Path, options: argparse.Namespace) -> bool:
    """By these very words, to the end."""
    folder = folder_of(cell, options)
    try:
        words = json.loads((folder / "words.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return words == cell.words(base, folder, options) and (folder / "summary.json").exists()


def result_of(cell: Cell, options: argparse.Namespace) -> dict[str, Any]:
    """A finished cell's accuracies, curves and time."""
    folder = folder_of(cell, options)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "method": cell.method,
        "sync_every": cell.sync_every,
        "seed": cell.seed,
        "accuracy_before": summary["accuracy_before"],
        "accuracy_after": summary["accuracy_after"],
        "seconds_total": summary["seconds_total"],
        "staleness": statistics.fmean(row["staleness"] for row in rows),
        "curves": {
            name: [[row["step"] + 1, row[name]] for row in rows if row.get(name) is not None] for name in CURVES
        },
    }


def write(options: argparse.Namespace, cells: Sequence[Cell]) -> None:
    """results.json and curves.html of the cells that have finished."""
    results = [result_of(cell, options) for cell in cells]
    settings = {name: value for name, value in vars(options).items() if name != "folder"}
    text = json.dumps({"settings": settings, "methods": METHODS, "cells": results}, indent=1) + "\n"
    write_whole(options.folder / "results.json", text)
    sections = [
        f"<section><h2>{title}</h2><div class='charts'>"
        + "".join(line_chart(chart_of(results, name, every, options.methods)) for every in options.sync_every)
        + "</div></section>"
        for name, title in DRAWN.items()
    ]
    head = "<h1>Corrections for stale samples</h1><p class='facts'>Means over seeds; bands of a standard deviation.</p>"
    write_page(options.folder / "curves.html", document("Corrections", head + "".join(sections)))


def chart_of(results: Sequence[Mapping[str, Any]], name: str, every: int, methods: Sequence[str]) -> Chart:
    series = []
    for method in methods:
        found = [one for one in results if (one["method"], one["sync_every"]) == (method, every)]
        points, band = spread_of([one["curves"][name] for one in found])
        series.append(
            Series(name=f"{method} ({len(found)})", points=points, band=band, colour=[*METHODS].index(method))
        )
    return Chart(title=f"sync every {every}", series=series, percent=name == "eval_accuracy")


def spread_of(
    curves: Iterable[Sequence[Sequence[float]]],
) -> tuple[list[tuple[float, float]], list[tuple[float, float, float]]]:
    """The mean curve, and around it one standard deviation over the seeds that have the step (none of one seed)."""
    by_step: dict[float, list[float]] = {}
    for curve in curves:
        for step, value in curve:
            by_step.setdefault(step, []).append(value)
    points, band = [], []
    for step, values in sorted(by_step.items()):
        mean, deviation = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
        points.append((step, mean))
        band.append((step, mean - deviation, mean + deviation))
    return points, band if any(low < high for _, low, high in band) else []


def table(options: argparse.Namespace) -> str:
    """Accuracies on the validation problems and, at the end, on those that were held out, and the largest KL to the
    reference of any step (median): means and standard deviations over seeds, as markdown."""
    results = json.loads((options.folder / "results.json").read_text(encoding="utf-8"))["cells"]
    checks = sorted({step for cell in results for step, _ in cell["curves"]["eval_accuracy"]})
    titles = ["sync every", "method", "seeds", *(f"after {step} steps" for step in checks), "at the end", "largest KL"]
    lines = [row_of(titles), row_of("---" for _ in titles)]
    for every, method in itertools.product(options.sync_every, options.methods):
        if found := [one for one in results if (one["method"], one["sync_every"]) == (method, every)]:
            columns = [[dict(one["curves"]["eval_accuracy"])[step] for one in found] for step in checks]
            columns.append([one["accuracy_after"] for one in found])
            farthest = statistics.median(max(value for _, value in one["curves"]["kl"]) for one in found)
            accuracies = [spread(values) for values in columns]
            lines.append(row_of([str(every), method, str(len(found)), *accuracies, f"{farthest:.2g}"]))
    return "\n".join(lines)


def row_of(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def spread(values: Sequence[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.1%}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1%}{deviation}"


if __name__ == "__main__":
    sys.exit(main())
