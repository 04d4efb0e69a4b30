"""How programs that a model wrote are run (rewards/sandbox.py), as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_r1.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SandboxConfig:
    """How programs are isolated and what each may use. ConfigError for limits that no program can run under."""

    isolation: Literal["auto", "bubblewrap", "namespaces", "none"] = "auto"
    """"auto" takes bubblewrap, else namespaces; "none" has resource limits and a system-call filter only."""
    allow_unisolated: bool = False
    """"none" is refused without it; with it, "auto" falls back to "none"."""
    cpu_seconds: int = 10
    """Processor time of each process."""
    wall_seconds: float = 12.0
    """From start to end, for each test."""
    memory_mib: int = 512
    """Address space of each process."""
    file_mib: int = 16
    """Size of the private folder, and of one file in it."""
    output_kib: int = 1024
    """Standard output, and likewise standard error."""
    program_kib: int = 256
    """The longest program that is run at all."""
    processes: int = 8
    """Processes and threads of a program together (not enforced for root at level "none")."""
    supply_imports: bool = False
    """Names that a program uses and does not define are supplied where LeetCode and LiveCodeBench do so: List and the
    rest of typing, deque, heappush, gcd, lru_cache and the like (SUPPLIED in rewards/sandbox_inside.py)."""

    def __post_init__(self) -> None:
        faults = []
        if self.isolation not in ("auto", "bubblewrap", "namespaces", "none"):
            faults.append(f"isolation: {self.isolation!r}; expected auto, bubblewrap, namespaces or none")
        if self.isolation == "none" and not self.allow_unisolated:
            faults.append(
                'isolation: "none" runs programs with the rights of this user; it needs allow_unisolated=True'
            )
        for name, least in (
            ("cpu_seconds", 1),
            ("memory_mib", 64),
            ("file_mib", 1),
            ("output_kib", 1),
            ("program_kib", 1),
            ("processes", 1),
        ):
            if getattr(self, name) < least:
                faults.append(f"{name}: {getattr(self, name)}; expected at least {least}")
        if not 0 < self.wall_seconds < float("inf"):
            faults.append(f"wall_seconds: {self.wall_seconds}; expected a positive number of seconds")
        if faults:
            raise ConfigError([f"sandbox.{fault}" for fault in faults])
