"""megatron-r1 serve RECIPE: the servers of one node, as the job's trainer asks for them.

Started by slurm/launch.sh: one process on every server node; which servers are its own follows from the recipe
(roles.py) and the node's number. Nothing is written before the trainer's rank 0 has made the run folder. Ends when it
is told to (SIGTERM).
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Sequence

from megatron_r1.cluster.roles import ServerRole, roles_of, server_config
from megatron_r1.cluster.task import own_address, this_task
from megatron_r1.config.schema import StageConfig
from megatron_r1.errors import ConfigError
from megatron_r1.pipeline.kinds import needs_of
from megatron_r1.stages.common.servers import visible_gpus

ROLES: tuple[ServerRole, ...] = ("rollout", "reward", "teacher")


def serve(config: StageConfig, *, roles: Sequence[str] = ROLES) -> int:
    """Supervise this node's servers of `roles` until a signal comes. Returns 0.

    Raises ConfigError outside a job of launch.sh, and for a stage whose servers are not on nodes of their own."""
    unknown = [role for role in roles if role not in ROLES]
    if unknown:
        raise ConfigError(f"--role {unknown[0]}: there are {', '.join(ROLES)}")
    task = this_task()
    if task is None:
        raise ConfigError("serve is for the server nodes of a cluster job; slurm/launch.sh starts it")
    needs = needs_of(config)
    layout, rollout = roles_of(needs, slots_per_node=task.slots_per_node), needs.rollout
    if not layout.servers or rollout is None:
        raise ConfigError(f"{config.name} has no servers on nodes of their own; its rank 0 starts what it needs")
    from megatron_r1.engines.base import EngineSpec
    from megatron_r1.engines.chosen import engine_kind

    node, host = layout.first_server_node + task.node, own_address()
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: ended.set())
    kind, threads, parts = engine_kind(rollout), [], []
    for place in layout.servers:
        if node not in place.nodes or place.role not in roles:
            continue
        number = place.nodes.index(node)
        spec = EngineSpec(
            config=server_config(rollout, place),
            model_path=config.run_dir,  # the trainer says which model, when it asks for the server
            run_dir=config.run_dir,
            index=place.index,
            name=place.name,
            host=host,
            visible_devices=",".join(gpu_names(place.slots)) if rollout.device == "cuda" else None,
            reward_model=place.role == "reward",
        )
        part = kind.supervisor(spec, attempt=task.attempt, logs=task.folder, nodes=len(place.nodes), node=number)
        threads.append(threading.Thread(target=part.run, args=(ended,), name=part.name))
        parts.append(part)
        spread = f", part {number} of {len(place.nodes)}" if len(place.nodes) > 1 else ""
        print(f"{part.name}{spread}: waits on {host} for the trainer's request; log {part.log_path}", flush=True)
    for thread in threads:
        thread.start()
    while not ended.wait(1.0):
        if any(not thread.is_alive() for thread in threads):
            print("megatron-r1: serve: a supervisor has failed: see above", file=sys.stderr, flush=True)
            ended.set()
    for part in parts:
        part.stop()  # which ends a wait for its start
    for thread in threads:
        thread.join()
    return 0


def gpu_names(slots: Sequence[int]) -> list[str]:
    """The node's GPUs that a place names by number, as this process knows them. ConfigError if it sees fewer."""
    gpus = visible_gpus()
    if max(slots) >= len(gpus):
        raise ConfigError(
            f"GPUs: a server's place is number {max(slots)} of this node, and its supervisor sees {len(gpus)} "
            f"({', '.join(gpus) or 'none'}): ask the job for all GPUs of its nodes"
        )
    return [gpus[slot] for slot in slots]
