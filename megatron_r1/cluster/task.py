"""A process that slurm/launch.sh started through srun: its rank, its job's folder, and how it meets the others.

The one place that reads Slurm's variables. They count only where launch.sh has set JOB_VARIABLE: inside an allocation
somebody may as well run the command by hand, and is then no rank of anything.

The attempt's folder lies on the shared file system, mode 0700, and is new for every start of the job (a requeue is
another attempt). In it: nodes/N.json, what each node said of itself (preflight.py); `roles`, which node does what;
exit/, how tasks ended (launch.sh); stores/, where gloo ranks meet. Ranks on GPUs meet through torch's TCP store on rank
0's node, which has no authentication: anybody who reaches that port could join or disturb the start.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from megatron_r1.errors import ConfigError

JOB_VARIABLE = "MEGATRON_R1_JOB"
"""The attempt's folder; set by launch.sh."""
SLOTS_VARIABLE = "MEGATRON_R1_SLOTS_PER_NODE"
INTERFACE_VARIABLE = "MEGATRON_R1_INTERFACE"
"""Network interface whose address the other nodes use; unset: what the host's name resolves to."""

NODES, ROLES, STORES = "nodes", "roles", "stores"


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """This process among those of its srun step."""

    folder: Path
    attempt: str
    """Names the job and how often it was started: `JOBID.RESTARTS`."""
    step: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node: int
    """Of the step, from 0."""
    slots_per_node: int

    @property
    def has_servers(self) -> bool:
        """Whether the job's vLLM servers are started by `megatron-r1 serve`, so that rank 0 only attaches to them."""
        return read_roles(self.folder).get("server_nodes", "0") != "0"

    def store_path(self) -> Path:
        """The file where the gloo ranks of this step meet: new for every step and attempt."""
        return self.folder / STORES / self.step


def this_task(environment: Mapping[str, str] = os.environ) -> Task | None:
    """The task that this process is; None if launch.sh did not start it. Raises ConfigError where srun's variables are
    not there."""
    if JOB_VARIABLE not in environment:
        return None
    try:
        node = int(environment["SLURM_NODEID"])
        return Task(
            folder=Path(environment[JOB_VARIABLE]),
            attempt=f"{environment['SLURM_JOB_ID']}.{environment.get('SLURM_RESTART_COUNT', '0')}",
            step=environment["SLURM_STEP_ID"],
            rank=int(environment["SLURM_PROCID"]),
            world_size=int(environment["SLURM_NTASKS"]),
            local_rank=int(environment["SLURM_LOCALID"]),
            local_world_size=tasks_on_nodes(environment["SLURM_STEP_TASKS_PER_NODE"])[node],
            node=node,
            slots_per_node=int(environment[SLOTS_VARIABLE]),
        )
    except (KeyError, ValueError, IndexError) as error:
        raise ConfigError(
            f"{JOB_VARIABLE} is set, but {error} is not as srun gives it; start the command through slurm/launch.sh, "
            f"or unset {JOB_VARIABLE}"
        ) from error


def tasks_on_nodes(text: str) -> list[int]:
    """Slurm's short form, tasks of each node: `8(x2),4` is [8, 8, 4]."""
    counts: list[int] = []
    for part in text.split(","):
        tasks, _, repeat = part.rstrip(")").partition("(x")
        counts += [int(tasks)] * int(repeat or "1")
    return counts


def become_rank(environment: MutableMapping[str, str] = os.environ) -> Task | None:
    """Put what torchrun would set into `environment` if launch.sh started this process; returns its task."""
    task = this_task(environment)
    if task is None:
        return None
    environment.update(
        RANK=str(task.rank),
        WORLD_SIZE=str(task.world_size),
        LOCAL_RANK=str(task.local_rank),
        LOCAL_WORLD_SIZE=str(task.local_world_size),
        MASTER_ADDR=address_of(task.folder, 0),
        MASTER_PORT=read_roles(task.folder)["master_port"],
    )
    return task


def store_path(environment: Mapping[str, str] = os.environ) -> str | None:
    """The file where gloo ranks meet; None for a rank that launch.sh did not start."""
    task = this_task(environment)
    return str(task.store_path()) if task is not None else None


def own_address(environment: Mapping[str, str] = os.environ) -> str:
    """The IPv4 address under which other nodes reach this one. Raises ConfigError if it cannot be told."""
    name = environment.get(INTERFACE_VARIABLE, "")
    if name:
        found = [a.address for a in psutil.net_if_addrs().get(name, ()) if a.family == socket.AF_INET]
        if not found:
            known = ", ".join(sorted(psutil.net_if_addrs()))
            raise ConfigError(f"NETWORK_INTERFACE is {name}, which has no IPv4 address here; there are {known}")
        return found[0]
    host = socket.gethostname()
    try:
        return socket.gethostbyname(host)
    except OSError as error:
        raise ConfigError(f"the name of this node, {host}, has no address ({error}); set NETWORK_INTERFACE") from error


def address_of(folder: Path, node: int) -> str:
    """The address of the job's node `node`, as it said itself before the start."""
    return str(json.loads((folder / NODES / f"{node}.json").read_text(encoding="utf-8"))["address"])


def read_roles(folder: Path) -> dict[str, str]:
    """The lines `name=value` that preflight wrote for launch.sh and us."""
    lines = (folder / ROLES).read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)
