"""Checkpoints of a stage in its run folder: whole or not there, checked before they are used, the last few kept.

A checkpoint is a folder checkpoints/step_N with the policy's files (policy/checkpoint.py) and stage.json: the stage's
own state and a hash of every other file. `save` copies the state and lets a thread of each rank write it while training
goes on; the folder appears under its name at a later `commit`, when every rank has written. One that is damaged is
renamed with a warning, and the one before it is taken.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from blake3 import blake3

from megatron_r1.agreement import on_rank_zero
from megatron_r1.errors import CheckpointError
from megatron_r1.observe.metrics import plain_json
from megatron_r1.policy.checkpoint import Snapshot, load_policy, take_snapshot
from megatron_r1.policy.policy import Policy
from megatron_r1.policy.topology import answered

CHECKPOINTS, STATE = "checkpoints", "stage.json"
PARTIAL, DAMAGED = ".partial", ".damaged"


@dataclass(frozen=True, slots=True)
class _Pending:
    """One that is being written."""

    target: Path
    partial: Path
    content: Mapping[str, Any]
    hashes: Future[dict[str, str]]


def oldest_step(run_dir: Path) -> int:
    """A run that goes on in `run_dir` does so from this step or a later one, unless all checkpoints are damaged."""
    return int(whole[0].name.removeprefix("step_")) if (whole := _whole(run_dir / CHECKPOINTS)) else 0


class Checkpoints:
    """Those of one run folder; the same calls on every rank."""

    def __init__(
        self,
        run_dir: Path,
        *,
        keep: int,
        say: Callable[[str], None],
        keep_best: bool = False,
        on_commit: Callable[[int], None] | None = None,
    ) -> None:
        """Keeps the last `keep`, and the one with the highest score if `keep_best`. `on_commit(step)` is called on
        every rank when a checkpoint is there, with the step of the oldest of the last `keep`."""
        self._folder, self._keep, self._say = run_dir / CHECKPOINTS, keep, say
        self._keep_best, self._on_commit = keep_best, on_commit
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: _Pending | None = None

    def save(self, step: int, policy: Policy, state: Mapping[str, Any], *, score: float | None = None) -> None:
        """Copy the policy and the stage's `state` (plain JSON) after step `step`, and begin to write them. A
        collective; waits for the checkpoint before, if it is still being written."""
        self.commit(wait=True)
        target = self._folder / f"step_{step:08d}"
        partial = target.with_name(f"{target.name}{PARTIAL}")

        def begin() -> None:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

        on_rank_zero(begin)
        content = {"step": step, "score": score, "state": plain_json(state)}
        snapshot = take_snapshot(policy)
        self._pending = _Pending(target, partial, content, self._writer.submit(_write, snapshot, partial))

    def commit(self, *, wait: bool = False) -> None:
        """Give a checkpoint that every rank has written its name; `wait` until it is. A collective.

        Raises CheckpointError on every rank if one could not write: checkpoints before it are intact."""
        pending = self._pending
        if pending is None:
            return
        hashes: dict[str, str] = {}  # rank 0's

        def judge(found: list[dict[str, str] | str | None]) -> list[str | None]:
            """To every rank: None while one still writes, "" when all have written, or what went wrong."""
            errors = [one for one in found if isinstance(one, str)]
            for one in found:
                hashes.update(one if isinstance(one, dict) else {})
            return [None if None in found else errors[0] if errors else ""] * len(found)

        error = answered(_outcome(pending.hashes, wait=wait), judge)
        if error is None:
            return
        self._pending = None
        if error:
            on_rank_zero(lambda: shutil.rmtree(pending.partial, ignore_errors=True))
            raise CheckpointError(
                f"{pending.target}: {error}; earlier checkpoints are intact; free space or fix permissions, then "
                "start the run again with --if-exists resume"
            )
        oldest = on_rank_zero(lambda: self._finish(pending, hashes))
        if self._on_commit is not None:
            self._on_commit(oldest)

    def load_latest(self, policy: Policy) -> dict[str, Any] | None:
        """Put the newest whole checkpoint into the policy and return its state; None if there is none. A collective."""
        on_rank_zero(self._remove_partial)
        while (found := on_rank_zero(self._newest)) is not None:
            path, content = found
            wrong = content if isinstance(content, str) else _damage(path, content["files"])
            if not wrong:
                assert not isinstance(content, str)
                load_policy(policy, path)
                self._say(f"going on from {path}")
                return content["state"]
            self._say(f"{path} is damaged ({wrong}): renamed to {path.name}{DAMAGED}; taking the one before it")
            on_rank_zero(lambda: _set_aside(path))  # noqa: B023 - called at once
        return None

    def close(self) -> None:
        """Finish what is being written. A collective."""
        self.commit(wait=True)
        self._writer.shutdown()

    def _finish(self, pending: _Pending, hashes: Mapping[str, str]) -> int:
        with open(pending.partial / STATE, "w", encoding="utf-8") as file:
            json.dump({**pending.content, "files": dict(hashes)}, file)
            file.flush()
            os.fsync(file.fileno())
        shutil.rmtree(pending.target, ignore_errors=True)
        pending.partial.rename(pending.target)
        whole = self._all()
        kept = set(whole[-self._keep :])
        if self._keep_best:
            scores = {path: score for path in whole if (score := _score(path)) is not None}
            # Of equals, the earliest: later ones are no better.
            kept |= {max(scores, key=lambda path: scores[path])} if scores else set()
        for old in set(whole) - kept:
            shutil.rmtree(old, ignore_errors=True)
        return int(whole[-self._keep :][0].name.removeprefix("step_"))

    def _remove_partial(self) -> None:
        for path in self._folder.glob(f"*{PARTIAL}"):
            shutil.rmtree(path, ignore_errors=True)

    def _all(self) -> list[Path]:
        return _whole(self._folder)

    def _newest(self) -> tuple[Path, dict[str, Any] | str] | None:
        """The newest with its stage.json, or with what is wrong with that."""
        found = self._all()
        if not found:
            return None
        try:
            content = json.loads((found[-1] / STATE).read_text(encoding="utf-8"))
            return found[-1], content if content.get("files") else f"{STATE} names no files"
        except (OSError, ValueError, AttributeError) as error:
            return found[-1], str(error)


def _whole(folder: Path) -> list[Path]:
    """Checkpoints under their names, oldest first."""
    return sorted(path for path in folder.glob("step_*") if not path.suffix)


def _write(snapshot: Snapshot, folder: Path) -> dict[str, str]:
    """In the writer's thread: this rank's files, on the disk, and their hashes by name."""
    hashes = {}
    for file in snapshot.write(folder):
        with open(file, "rb") as written:
            os.fsync(written.fileno())
        hashes[file.name] = _hash(file)
    return hashes


def _outcome(future: Future[dict[str, str]], *, wait: bool) -> dict[str, str] | str | None:
    """The hashes; or why there are none; or None while it is being written."""
    if not wait and not future.done():
        return None
    error = future.exception()
    return future.result() if error is None else str(error)


def _damage(path: Path, files: Mapping[str, str]) -> str:
    """The names of the files that are not as they were written, empty if none. Each rank looks at its part of them."""
    own = sorted(files)[dist.get_rank() :: dist.get_world_size()]
    wrong = [name for name in own if not _is_whole(path / name, files[name])]
    return answered(wrong, lambda found: [", ".join(name for names in found for name in names)] * len(found))


def _is_whole(file: Path, known: str) -> bool:
    try:
        return _hash(file) == known
    except OSError:
        return False


def _set_aside(path: Path) -> None:
    aside = path.with_name(f"{path.name}{DAMAGED}")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)


def _score(path: Path) -> float | None:
    try:
        return json.loads((path / STATE).read_text(encoding="utf-8")).get("score")
    except (OSError, ValueError):
        return None


def _hash(file: Path) -> str:
    return blake3(max_threads=blake3.AUTO).update_mmap(file).hexdigest()
