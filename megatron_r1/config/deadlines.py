"""How long a vLLM server may take, from sizes: to start, to take new weights, and to show progress.

A server that has work is stuck when no token has moved on it for a while, however long its requests have lasted:
hundreds of them wait in its queue, and an answer of 32,768 tokens takes hours. Reading and receiving weights goes by
their bytes. Each rule is a base and a rate that only something broken is slower than; docs/rollout.md gives the sums.
Left out: the phases' own deadlines (schema.DeadlineConfig), which end the run.
"""

from __future__ import annotations

from pathlib import Path

from megatron_r1.config.schema import DeadlineConfig, RolloutConfig, TrainConfig

START_BASE_SECONDS = 900.0
"""Imports from a shared file system, the workers' meeting, compilation and CUDA graphs."""
TRANSFER_BASE_SECONDS = 300.0
"""What vLLM does with weights once they are there."""
STALL_BASE_SECONDS = 600.0
"""Kernels that are compiled at the first request that needs them."""
SLOW_PREFILL_TOKENS_PER_SECOND = 50.0
"""No counter moves while a prompt is read: vLLM counts its tokens when the first new one is there."""
STEP_TOKENS = 8192
"""Prompt tokens that vLLM reads in one step at least."""


def folder_bytes(folder: Path) -> int:
    """Of the weights in a Hugging Face folder; 0 if it has none."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def start_seconds(rollout: RolloutConfig, weight_bytes: float) -> float:
    """A server's start, until it answers."""
    return rollout.start_timeout_seconds or START_BASE_SECONDS + _moving(rollout, weight_bytes)


def transfer_seconds(rollout: RolloutConfig, weight_bytes: float) -> float:
    """One request of a weight sync, such as the one that receives everything."""
    return TRANSFER_BASE_SECONDS + _moving(rollout, weight_bytes)


def stall_seconds(rollout: RolloutConfig) -> float:
    """Without a token on a server that has work."""
    return rollout.stall_seconds or (
        STALL_BASE_SECONDS + max(rollout.max_model_len, STEP_TOKENS) / SLOW_PREFILL_TOKENS_PER_SECOND
    )


def _moving(rollout: RolloutConfig, weight_bytes: float) -> float:
    return weight_bytes / (rollout.weights_gb_per_second * 1e9)


def phase_faults(deadlines: DeadlineConfig, train: TrainConfig) -> list[str]:
    """Whether ranks that wait for rank 0 wait as long as its phases may last."""
    longest = max(deadlines.by_phase(1).items(), key=lambda item: item[1])
    if not 0 < train.collective_timeout_seconds < longest[1]:
        return []
    name = f"{longest[0]} + reward" if longest[0] in ("rollout", "evaluate") else longest[0]
    return [
        f"train.collective_timeout_seconds is {train.collective_timeout_seconds:.0f}; it must outlast every phase, and "
        f"deadlines.{name} is {longest[1]:.0f}: raise the one or lower the other"
    ]


def start_faults(rollout: RolloutConfig, deadlines: DeadlineConfig, weight_bytes: float) -> list[str]:
    """Whether the start's and the sync's deadlines leave the servers the time that they may take."""
    faults = []
    start = start_seconds(rollout, weight_bytes)
    if deadlines.start and start > deadlines.start:
        how = (
            "rollout.start_timeout_seconds"
            if rollout.start_timeout_seconds
            else _sum(START_BASE_SECONDS, rollout, weight_bytes)
        )
        faults.append(
            f"deadlines.start is {deadlines.start:.0f}; a server may take {start:.0f} s to start ({how}): raise "
            f"deadlines.start to {start:.0f} or more"
        )
    # A server that is found dead then starts again, and gets all weights.
    sync = start + transfer_seconds(rollout, weight_bytes)
    if deadlines.sync and sync > deadlines.sync:
        moved = _sum(TRANSFER_BASE_SECONDS, rollout, weight_bytes)
        faults.append(
            f"deadlines.sync is {deadlines.sync:.0f}; a sync may take {sync:.0f} s ({start:.0f} s for a dead server's "
            f"start, then {moved}): raise deadlines.sync to {sync:.0f} or more, or rollout.weights_gb_per_second if "
            "the links are faster"
        )
    return faults


def _sum(base: float, rollout: RolloutConfig, weight_bytes: float) -> str:
    rate = rollout.weights_gb_per_second
    return f"{base:.0f} s + {weight_bytes / 1e9:,.0f} GB at rollout.weights_gb_per_second = {rate}"
