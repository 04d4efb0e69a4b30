"""Checkpoints of a stage in its run folder: whole or not there, checked before they are used, the last few kept.

A checkpoint is a folder checkpoints/step_N with the policy's files (policy/checkpoint.py) and stage.json: the stage's
own state and a hash of every other file. It appears under its name when everything is written. One that is damaged is
left aside with a warning, and the one before it is taken.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from blake3 import blake3

from megatron_r1.observe.metrics import plain_json
from megatron_r1.policy.checkpoint import load_policy, save_policy
from megatron_r1.policy.policy import Policy
from megatron_r1.policy.topology import on_rank_zero

CHECKPOINTS, STATE = "checkpoints", "stage.json"


class Checkpoints:
    """Those of one run folder; the same calls on every rank."""

    def __init__(self, run_dir: Path, *, keep: int, say: Callable[[str], None]) -> None:
        self._folder, self._keep, self._say = run_dir / CHECKPOINTS, keep, say

    def save(self, step: int, policy: Policy, state: Mapping[str, Any]) -> None:
        """Write the policy and the stage's `state` (plain JSON) after step `step`. A collective."""
        target = self._folder / f"step_{step:08d}"
        partial = target.with_name(f"{target.name}.partial")

        def begin() -> None:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

        on_rank_zero(begin)
        save_policy(policy, partial)
        on_rank_zero(lambda: self._finish(partial, target, step, state))

    def load_latest(self, policy: Policy) -> dict[str, Any] | None:
        """Put the newest whole checkpoint into the policy and return its state; None if there is none. A collective."""
        found = on_rank_zero(self._latest)
        if found is None:
            return None
        path, state = found
        load_policy(policy, path)
        self._say(f"going on from {path}")
        return state

    def _finish(self, partial: Path, target: Path, step: int, state: Mapping[str, Any]) -> None:
        hashes = {file.name: _hash(file) for file in sorted(partial.iterdir())}
        content = json.dumps({"step": step, "state": plain_json(state), "files": hashes})
        with open(partial / STATE, "w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        for old in self._all()[: -self._keep]:
            shutil.rmtree(old, ignore_errors=True)

    def _all(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(path for path in self._folder.glob("step_*") if not path.name.endswith(".partial"))

    def _latest(self) -> tuple[Path, dict[str, Any]] | None:
        for path in reversed(self._all()):
            try:
                content = json.loads((path / STATE).read_text(encoding="utf-8"))
                wrong = [name for name, known in content["files"].items() if _hash(path / name) != known]
            except (OSError, ValueError, KeyError) as error:
                wrong = [str(error)]
            if not wrong:
                return path, content["state"]
            self._say(f"{path} is damaged ({', '.join(wrong)}) and left aside; taking the one before it")
        return None


def _hash(file: Path) -> str:
    return blake3(max_threads=blake3.AUTO).update_mmap(file).hexdigest()
