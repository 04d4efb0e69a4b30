"""What checkpoints cost a GRPO run, from its metrics.jsonl: tools/measure_checkpoints.py RUN_FOLDER

The phase `checkpoint` of a step is what the step before spent on one: copying the state, or asking whether it is
written. A checkpoint is written beside the step after it, which is compared with the other steps.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from megatron_r1.observe.metrics import read_json_lines

ASIDE = ("checkpoint", "evaluate", "save")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    rows = [row["seconds"] for row in read_json_lines(arguments.folder / "metrics.jsonl")]
    marks = sorted(int(path.name.removeprefix("step_")) for path in (arguments.folder / "checkpoints").glob("step_*"))
    if len(rows) < 3 or len(marks) < 2:
        print(f"measure_checkpoints: {arguments.folder} has {len(rows)} steps and {len(marks)} checkpoints; too few")
        return 1
    print(report(rows, every=marks[-1] - marks[-2]))
    return 0


def report(rows: list[dict[str, float]], *, every: int) -> str:
    """A table; `rows` are seconds by phase of each step, a checkpoint was made after every `every` of them."""
    steps = [sum(seconds for phase, seconds in row.items() if phase not in ASIDE) for row in rows]
    beside = [number for number in range(every, len(rows), every)]  # the step after a checkpoint
    others = [number for number in range(1, len(rows)) if number not in beside]
    step = statistics.median(steps)
    held = statistics.median(rows[number].get("checkpoint", 0.0) for number in beside)
    total = sum(row.get("checkpoint", 0.0) for row in rows)
    lines = [
        f"{len(beside)} checkpoints in {len(rows)} steps, one every {every}",
        f"a step: {step:.3f} s; held up by a checkpoint: {held:.3f} s, {held / step:.1%} of a step",
        f"over the whole run: {total:.3f} of {sum(steps):.1f} s, {total / sum(steps):.2%}",
    ]
    if others:
        during, without = (statistics.median(steps[number] for number in some) for some in (beside, others))
        lines.append(f"a step beside which one is written: {during:.3f} s; other steps: {without:.3f} s")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
