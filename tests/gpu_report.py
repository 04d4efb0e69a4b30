"""What `make test-gpu` found, as a page for docs/: the machine, the versions, each test's outcome, each table."""

from __future__ import annotations

import datetime
import platform
import subprocess
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "transformer-engine", "megatron-core", "vllm", "flash-attn", "transformers")
HEAD = """# What was measured on a GPU

Written by `make test-gpu` ({command}) on {day}, at commit {commit}. Nothing here is typed by hand: run it again and
commit the file.

{machine}
"""


@dataclass(slots=True)
class Report:
    """Filled by the tests as they run, in their order."""

    outcomes: list[tuple[str, str, float, str]] = field(default_factory=list)
    """Test, outcome, seconds, and why it was skipped or how it failed."""
    tables: list[tuple[str, str]] = field(default_factory=list)
    """Title and Markdown."""

    def add(self, title: str, text: str) -> None:
        self.tables.append((title, text))

    def markdown(self, *, command: str, commit: str, machine: dict[str, str]) -> str:
        rows = "\n".join(f"| {name} | {value} |" for name, value in machine.items())
        head = HEAD.format(
            command=command,
            day=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
            commit=commit,
            machine=f"| machine | |\n| --- | --- |\n{rows}",
        )
        lines = ["## Tests", "", "| test | outcome | seconds | |", "| --- | --- | --- | --- |"]
        for name, outcome, seconds, why in self.outcomes:
            lines.append(f"| {name} | {outcome} | {seconds:.0f} | {one_line(why)} |")
        parts = [head, "\n".join(lines), *(f"## {title}\n\n{text.strip()}" for title, text in self.tables)]
        return "\n\n".join(part.strip() for part in parts) + "\n"


def one_line(text: str, at_most: int = 200) -> str:
    """Fit for a cell of a table."""
    line = " ".join(text.split()).replace("|", "/")
    return line if len(line) <= at_most else line[: at_most - 3] + "..."


def describe_machine() -> dict[str, str]:
    """The GPUs with their memory, driver and CUDA, and the versions of what computes."""
    import torch

    found = {"processor": f"{platform.machine()}, Python {platform.python_version()}"}
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        found["GPUs"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()} ({memory:.0f} GiB)"
        found["driver"] = said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
        found["CUDA"] = str(torch.version.cuda)
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def commit_of(root: Path) -> str:
    """Of the checkout; "unknown" outside of one."""
    changed = "" if not said("git", "-C", root, "status", "--porcelain", "-uno") else " with changes"
    return (said("git", "-C", root, "rev-parse", "--short", "HEAD") or "unknown") + changed


def said(*command: object) -> str:
    """What a program prints; nothing if it is absent or fails."""
    try:
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
