"""The stage that writes the embedded default's data files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_r1.observe.metrics import JsonLines, write_json
from megatron_r1.toy import world
from megatron_r1.toy.tiny_world.config import TINY_WORLD_FILES, TinyWorldConfig


def make_tiny_world(config: TinyWorldConfig) -> dict[str, Any]:
    """Write every file to run_dir. Returns the number of lines of each (also in summary.json)."""
    rng = np.random.default_rng(config.seed)
    pairs, held_out = world.sums(rng, config.held_out)
    num_sums = config.base * 3 // 4
    base = [
        *world.sum_conversations(
            rng, pairs, num_sums, forgets=config.forgets_carries, other_language=config.other_language
        ),
        *world.scenario_conversations(rng, config.base - num_sums, bad=config.bad_manners),
    ]
    # What the cold start shows is better, but neither always right nor always in one language: RL has something to do.
    cold_start = world.sum_conversations(
        rng,
        rng.permutation(pairs),
        config.cold_start,
        forgets=0.9 * config.forgets_carries,
        other_language=0.8 * config.other_language,
    )
    rows: dict[str, Iterable[world.Row]] = {
        "base": base,
        "cold_start": cold_start,
        "other": world.scenario_conversations(rng, config.other, bad=config.bad_manners / 2),
        "problems": world.sum_problems(rng.permutation(pairs)[: config.problems], "sum"),
        "scenarios": world.scenario_prompts(rng, config.scenarios),
        "helpful_pairs": world.preference_pairs(rng, config.pairs, kind="helpful"),
        "harmless_pairs": world.preference_pairs(rng, config.pairs, kind="harmless"),
        "held_out": world.sum_problems(held_out, "held-out"),
    }
    counts = {name: _write(config.run_dir / f"{name}.jsonl", rows[name]) for name in TINY_WORLD_FILES}
    write_json(config.run_dir / "summary.json", {"lines": counts})
    print("  ".join(f"{name} {count:,}" for name, count in counts.items()), flush=True)
    return {"lines": counts}


def _write(path: Path, rows: Iterable[world.Row]) -> int:
    count = 0
    with JsonLines(path) as file:
        for row in rows:
            file.write(row)
            count += 1
    return count
