"""Which node of a job does what: trainer ranks first, then the vLLM servers, each on nodes of its own.

Computed from the recipe alone, so that the job script, the check before the start, the servers and the trainer agree
without telling each other. A slot is a GPU; on CPU it stands for a process. Left out: trainers and servers that share
GPUs over several nodes, because weights reach a server through shared memory only on rank 0's node.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_r1.config.schema import RolloutConfig
from megatron_r1.errors import ConfigError
from megatron_r1.planning.needs import Needs

ServerRole = Literal["rollout", "reward", "teacher"]

Wanted = tuple[str, ServerRole, int, int]
"""A server that is not placed yet: name, role, index, GPUs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerPlace:
    """One server: its name (that of its log), the job's nodes that it runs on, the first one leading, and the slots
    that it has on each."""

    name: str
    role: ServerRole
    index: int
    """Among the servers of its role."""
    tensor_parallel: int
    nodes: tuple[int, ...]
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """`world_size` processes on the first `trainer_nodes` nodes; `servers` on nodes `first_server_node` and after.

    No servers here: the stage has none, or its rank 0 starts them on its own node."""

    world_size: int
    trainer_nodes: int
    tasks_per_node: int
    first_server_node: int
    servers: tuple[ServerPlace, ...]

    @property
    def server_nodes(self) -> int:
        return len({node for server in self.servers for node in server.nodes})

    @property
    def nodes(self) -> int:
        """Of the job in all."""
        return max(self.trainer_nodes, self.first_server_node + self.server_nodes)

    def describe(self) -> str:
        """In a few words, for messages."""
        parts = [f"{self.trainer_nodes} for {self.world_size} rank(s)"]
        if self.servers:
            shared = " (shared with the rank)" if self.first_server_node == 0 else ""
            parts.append(f"{self.server_nodes} for {len(self.servers)} server(s){shared}")
        return ", ".join(parts)


def roles_of(needs: Needs, *, slots_per_node: int) -> Roles:
    """The roles of a stage. Raises ConfigError where the layout and the nodes do not go together."""
    trainer, rollout = needs.trainer, needs.rollout
    world = trainer.parallel.world_size if trainer is not None else 1
    tasks = min(world, slots_per_node)
    if slots_per_node < 1:
        raise ConfigError(f"nodes: a node has {slots_per_node} slot(s); give the GPUs of a node")
    faults: list[str] = []
    if world % tasks:
        faults.append(f"parallel.world_size is {world}; it must fill nodes of {slots_per_node} slot(s)")
    wanted = _servers(needs)
    for name, _, _, size in wanted:
        if size > slots_per_node and size % slots_per_node:
            faults.append(f"{name}: tensor_parallel {size} does not fill nodes of {slots_per_node} slot(s)")
    if faults:
        raise ConfigError(faults)
    trainer_nodes = world // tasks
    beside = 0 if trainer is None else world  # the one process of a stage without ranks needs no GPU
    shared = rollout is not None and rollout.sync == "ipc" and trainer is not None
    if shared and trainer_nodes > 1:
        raise ConfigError(
            f"rollout.sync is ipc, where servers share the GPUs of rank 0's node; this layout has {trainer_nodes} "
            "trainer nodes: use --rollout.sync nccl"
        )
    local = shared or beside + sum(size for *_, size in wanted) <= slots_per_node
    given = ["rollout.devices"] if rollout is not None and rollout.devices else []
    given += dict.fromkeys(f"{server.field}.devices" for server in needs.beside if server.devices)
    if given and not local:
        raise ConfigError(
            f"{', '.join(given)}: names GPUs of rank 0's node, and the servers are on nodes of their own: leave it out"
        )
    first = 0 if trainer is None else trainer_nodes
    return Roles(
        world_size=world,
        trainer_nodes=trainer_nodes,
        tasks_per_node=tasks,
        first_server_node=first,
        servers=() if local else _place(wanted, first, slots_per_node),
    )


def server_config(rollout: RolloutConfig, place: ServerPlace) -> RolloutConfig:
    """The configuration of one server: the rollouts', but for its size."""
    if place.role == "rollout":
        return rollout
    return dataclasses.replace(
        rollout,
        tensor_parallel=place.tensor_parallel,
        num_engines=1,
        devices=(),
        vllm_args=(),
        draft_tokens=0,
        routes="off",
    )


def _servers(needs: Needs) -> list[Wanted]:
    rollout, counts = needs.rollout, dict[ServerRole, int]()
    if rollout is None:
        return []
    found: list[Wanted] = [
        (f"vllm-{index}", "rollout", index, rollout.tensor_parallel) for index in range(rollout.num_engines)
    ]
    for server in needs.beside:
        index = counts[server.role] = counts.get(server.role, -1) + 1
        found.append((server.name, server.role, index, server.tensor_parallel))
    return found


def _place(wanted: Sequence[Wanted], first: int, slots: int) -> tuple[ServerPlace, ...]:
    """Each server on whole nodes, or, if it is small, on the first node with room."""
    free: dict[int, int] = {}
    placed = []
    for name, role, index, size in wanted:
        new = first + len(free)
        if size >= slots:
            nodes = tuple(range(new, new + math.ceil(size / slots)))
            free |= dict.fromkeys(nodes, 0)
            own = tuple(range(slots))
        else:
            node = next((node for node, room in free.items() if room >= size), new)
            room = free.get(node, slots)
            nodes, own = (node,), tuple(range(slots - room, slots - room + size))
            free[node] = room - size
        placed.append(ServerPlace(name=name, role=role, index=index, tensor_parallel=size, nodes=nodes, slots=own))
    return tuple(placed)
