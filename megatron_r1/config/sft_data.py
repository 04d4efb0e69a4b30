"""Where supervised examples come from and how they are read. Torch-free; its rules are `sft_data_faults`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from megatron_r1.bounds import Count, Natural, at_least
from megatron_r1.config.packages import has_module


@dataclass(frozen=True, slots=True, kw_only=True)
class SFTDataConfig:
    """jsonl files of conversations (docs/sft.md), tokenised once, then read in a seeded order."""

    files: tuple[Path, ...] = ()
    """jsonl files of conversations."""
    weights: tuple[float, ...] = ()
    """Share of each file in an epoch, relative to their sum; an epoch has as many examples as all files together.
    Empty: every example once."""
    template: Literal["r1_zero", "chat", "plain"] = "chat"
    """How the turns before the answer become a prompt; the same choice as GRPO's, and the same text."""
    thinking: Literal["on", "off", "template"] = "on"
    """With template chat: ask the model's template for a thought (DeepSeek's `thinking`, Qwen's `enable_thinking`), for
    none, or leave it at its default. One that closes the thought before the answer is refused unless it is off."""
    max_tokens: Annotated[int, at_least(2)] = 32_768
    """Longest example, prompt, answer and end token together; longer ones are left out and counted."""
    batch_sequences: Count = 128
    """Examples per optimizer step (paper: 128 for R1's mixed SFT, 64 for distillation)."""
    epochs: Count = 2
    """Paper: 2 to 3."""
    validation: Natural = 0
    """Examples with different questions that are kept apart; no other example with such a question is trained on."""
    loss: Literal["token_mean", "sequence_mean"] = "token_mean"
    """Mean over the batch's trained tokens, or over each example's and then over examples."""
    reader: Literal["torch", "dali"] = "torch"
    """torch's DataLoader or NVIDIA DALI: the same batches in the same order (docs/benchmarks.md)."""
    num_workers: Natural = 0
    """Processes that read ahead; 0: the training process reads."""
    prefetch_batches: Count = 2
    """Batches that each worker reads ahead (torch), or all of them together (dali)."""
    seed: Natural = 0
    """Of the order of the examples, and of which are kept apart."""


def sft_data_faults(config: SFTDataConfig, field: str = "data") -> list[str]:
    """Faults of `config` besides its bounds, as sentences; `field` is its name in the run's configuration."""
    faults = []
    if not config.files:
        faults.append(f"{field}.files is empty; name at least one jsonl file of conversations")
    faults += [f"{field}.files: {file} does not exist" for file in config.files if not file.is_file()]
    if len(set(config.files)) < len(config.files):
        faults.append(f"{field}.files: a file is listed twice; list each once and raise its share in {field}.weights")
    if config.weights and len(config.weights) != len(config.files):
        faults.append(
            f"{field}.weights has {len(config.weights)} entries for {len(config.files)} files; it must have one for "
            "each file, or none"
        )
    if any(not 0 < weight < math.inf for weight in config.weights):
        faults.append(f"{field}.weights is {config.weights}; each must be above 0: drop a file that is not wanted")
    if config.reader == "dali" and not has_module("nvidia.dali"):
        faults.append(
            f"{field}.reader is 'dali'; NVIDIA DALI is not installed: pip install nvidia-dali-cuda130, or use 'torch'"
        )
    return faults
