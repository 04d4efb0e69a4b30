"""The servers that GRPO has besides plain rollouts: reward models, a teacher; and which GPUs each sees."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from megatron_r1.config.schema import RolloutConfig
from megatron_r1.engines.base import Engine, EngineSpec
from megatron_r1.rollout.preference import RewardModelServer
from megatron_r1.stages.common.servers import make_engine, own_devices
from megatron_r1.stages.grpo.config import GRPOConfig


def served_folder(config: GRPOConfig, base: Path) -> Path:
    """The folder that rollout servers of the model in `base` start from."""
    return config.rollout.fp8_folder or base


def server_devices(config: GRPOConfig) -> Sequence[str | None]:
    """CUDA_VISIBLE_DEVICES of each server: as configured, else those of this process's GPUs that follow the trainer's
    (nccl), or the trainer's own from the first on (ipc). Raises ConfigError if there are too few."""
    rollout = config.rollout
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", config.parallel.world_size))
    return own_devices(rollout, after=0 if rollout.sync == "ipc" else local_ranks)


def judging(rollout: RolloutConfig, tensor_parallel: int) -> RolloutConfig:
    """The rollouts' settings for a server whose numbers are a reward or in the loss. On CPUs, where a run that goes
    on makes the same to the bit, it computes one text at a time: the last bits of a text's numbers depend on what vLLM
    computes with it, and so on when requests arrive."""
    seats = 1 if rollout.device == "cpu" else rollout.max_num_seqs
    return dataclasses.replace(
        rollout, tensor_parallel=tensor_parallel, num_engines=1, devices=(), routes="off", max_num_seqs=seats
    )


def start_reward_models(config: GRPOConfig) -> list[RewardModelServer]:
    """The servers of config.rewards.preferences, starting. Stops all if one cannot be started."""
    servers: list[RewardModelServer] = []
    try:
        for preference in config.rewards.preferences:
            spec = EngineSpec(
                config=judging(config.rollout, preference.tensor_parallel),
                model_path=preference.model,
                run_dir=config.run_dir,
                name=f"reward-{preference.name}",
                visible_devices=preference.devices or None,
                reward_model=True,
            )
            server = RewardModelServer(preference, make_engine(spec))
            servers.append(server)
            server.engine.start()
    except BaseException:
        for server in servers:
            server.close()
        raise
    return servers


def start_teacher(config: GRPOConfig) -> list[Engine]:
    """The server of the algorithm's teacher, starting; none if it needs none."""
    teacher = config.teacher
    if teacher is None or teacher.model is None:
        return []
    rollout = judging(config.rollout, teacher.tensor_parallel)
    spec = EngineSpec(
        config=dataclasses.replace(rollout, vllm_args=(), draft_tokens=0),
        model_path=teacher.model,
        run_dir=config.run_dir,
        name="teacher",
        visible_devices=teacher.devices or None,
    )
    engine = make_engine(spec)
    engine.start()
    return [engine]
