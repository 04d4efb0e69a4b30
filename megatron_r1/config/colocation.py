"""Faults of trainer and servers that share GPUs: what may sleep, and what may go to the host."""

from __future__ import annotations

from megatron_r1.config.schema import RolloutConfig, TrainConfig


def colocation_faults(rollout: RolloutConfig, train: TrainConfig) -> list[str]:
    """Of a stage that has both."""
    faults: list[str] = []
    if rollout.sync != "ipc":
        if rollout.sleep_level:
            faults.append(
                f"rollout.sleep_level is {rollout.sleep_level}; only servers on the trainer's GPUs have to make room: "
                "use 0, or rollout.sync ipc"
            )
        if train.offload:
            faults.append(
                f"train.offload is {' '.join(train.offload)}; only servers on the trainer's GPUs need its room: leave "
                "it empty, or use rollout.sync ipc"
            )
        return faults
    if rollout.sleep_level == 2 and rollout.draft_tokens:
        faults.append(
            f"rollout.sleep_level is 2 and rollout.draft_tokens {rollout.draft_tokens}; no sync brings the drafting "
            "layer's weights back: use sleep_level 1, or draft_tokens 0"
        )
    if len(set(train.offload)) < len(train.offload):
        faults.append(f"train.offload is {' '.join(train.offload)}; name each part once")
    return faults


def offload_faults(train: TrainConfig) -> list[str]:
    """Of a stage without servers."""
    if not train.offload:
        return []
    return [f"train.offload is {' '.join(train.offload)}; no servers share this stage's GPUs: leave it empty"]


def no_trainer_faults(rollout: RolloutConfig) -> list[str]:
    """Of a stage without a trainer."""
    faults = []
    if rollout.sleep_level:
        faults.append(f"rollout.sleep_level is {rollout.sleep_level}; no trainer shares this stage's GPUs: use 0")
    if rollout.routes != "off":
        faults.append(f"rollout.routes is {rollout.routes}; nothing is trained on these samples: use off")
    return faults
