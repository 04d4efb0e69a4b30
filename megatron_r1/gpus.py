"""The GPUs of this machine, as the driver's nvidia-smi has them: no torch, and no context on any of them."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass

SECONDS = 60.0
"""For nvidia-smi, which may have to load the driver first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    name: str
    memory_bytes: int


def find_gpus(command: str = "nvidia-smi") -> tuple[Gpu, ...]:
    """The GPUs that the driver shows; none where it has no nvidia-smi or that fails."""
    return parse_gpus(_ask(command, "name,memory.total"))


def find_driver() -> str:
    """The driver's version; "" where nvidia-smi is absent or cannot reach one."""
    said = _ask("nvidia-smi", "driver_version").split()
    return said[0] if said and said[0][0].isdigit() else ""


def parse_gpus(text: str) -> tuple[Gpu, ...]:
    """GPUs from nvidia-smi's csv lines "name, MiB". A line without a number (a GPU in error) is left out."""
    fields = [line.rpartition(",") for line in text.splitlines()]
    return tuple(
        Gpu(name=name.strip(), memory_bytes=int(mebibytes) << 20)
        for name, _, mebibytes in fields
        if mebibytes.strip().isdigit()
    )


def _ask(command: str, fields: str) -> str:
    """nvidia-smi's csv lines; "" where it fails."""
    query = [command, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
