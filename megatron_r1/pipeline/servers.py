"""The vLLM servers that an RL stage has beside its rollouts', and the GPUs that each server sees. Rank 0 owns them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

from megatron_r1.config.schema import RunConfig
from megatron_r1.rewards.compose import Scorer
from megatron_r1.rollout.preference import RewardModelServer
from megatron_r1.rollout.server import Engine


def server_devices(config: RunConfig) -> Sequence[str | None]:
    """CUDA_VISIBLE_DEVICES of each server: as configured, else the GPUs of this host that follow the trainer's (nccl),
    or the trainer's own from the first on (ipc)."""
    rollout = config.rollout
    if rollout.device == "cpu":
        return (None,) * rollout.num_engines
    if rollout.devices:
        return rollout.devices
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", config.parallel.world_size))
    size, first = rollout.tensor_parallel, 0 if rollout.sync == "ipc" else local_ranks
    starts = [first + index * size for index in range(rollout.num_engines)]
    return [",".join(map(str, range(start, start + size))) for start in starts]


def start_reward_models(config: RunConfig) -> list[RewardModelServer]:
    """The servers of config.rewards.preferences, starting. Stops all if one cannot be started."""
    servers: list[RewardModelServer] = []
    try:
        for preference in config.rewards.preferences:
            server = RewardModelServer(preference, config.rollout, run_dir=config.run_dir)
            servers.append(server)
            server.engine.start()
    except BaseException:
        for server in servers:
            server.close()
        raise
    return servers


def start_teacher(config: RunConfig) -> list[Engine]:
    """The server of config.teacher, starting; none if there is no teacher."""
    teacher = config.teacher
    if teacher.model is None:
        return []
    engine = Engine(
        dataclasses.replace(config.rollout, tensor_parallel=teacher.tensor_parallel, num_engines=1, devices=()),
        model_path=teacher.model,
        run_dir=config.run_dir,
        name="teacher",
        visible_devices=teacher.devices or None,
    )
    engine.start()
    return [engine]


def wait_for_graders(scorer: Scorer | None, engines: Sequence[Engine]) -> None:
    """Until every grading worker and server answers. Raises what they raise where one cannot start."""
    if scorer is not None:
        scorer.check_started()
    for engine in engines:
        engine.wait_ready()
