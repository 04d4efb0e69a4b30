"""The configuration of the embedded default's own data: a small world with the same roles as the paper's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_r1.bounds import Count, Natural, Share, number_faults
from megatron_r1.config.run_folder import folder_faults
from megatron_r1.errors import ConfigError

TINY_WORLD_FILES = (
    "base", "cold_start", "other", "problems", "scenarios", "helpful_pairs", "harmless_pairs", "held_out",
)  # fmt: skip
"""The jsonl files that the stage writes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyWorldConfig:
    """How much of each kind, and how bad the habits of the base model's data are (toy/world.py)."""

    name: str = "data"
    """Of the stage, in its files and reports."""
    run_dir: Path = Path("runs/tiny_world")
    """Folder for everything that the stage writes."""
    seed: Natural = 0
    """Of everything random in the stage."""
    if_exists: Literal["refuse", "archive"] = "refuse"
    """What to do with a run_dir that is not empty: stop, or rename it to run_dir.1, .2, ..."""
    base: Count = 24_000
    """Conversations that the base models are made of."""
    cold_start: Count = 1_000
    """Conversations for the first SFT, better than those of `base`."""
    other: Count = 1_000
    """Conversations that need no reasoning, for the second SFT."""
    problems: Count = 4_000
    """Sums with an answer that a rule can grade, for the first RL."""
    scenarios: Count = 1_000
    """Prompts without a right answer, for the last RL."""
    pairs: Count = 2_000
    """Preference pairs of each kind."""
    held_out: Count = 200
    """Sums that occur in no other file."""
    forgets_carries: Share = 0.7
    """Share of the base data's sums that forget every carry."""
    other_language: Share = 0.5
    """Share of the base data's sentences that are in Chinese."""
    bad_manners: Share = 0.6
    """Share of the base data's greetings and refusals that are not what people prefer."""


def validate_tiny_world(config: TinyWorldConfig, *, folder: bool = True) -> None:
    """Raises ConfigError listing every fault."""
    faults = number_faults(config)
    if config.held_out > 2000:
        faults.append(f"held_out is {config.held_out}; of the 8,100 sums, at most 2000 may be kept apart")
    if folder:
        faults += folder_faults(config)
    if faults:
        raise ConfigError(faults)
