"""Whole rollouts on disk, graded and with all that training reads: for training on them without engines.

    RUN/recorded/recording.json     what they are of: tokenizer, the model's sizes, sampling
    RUN/recorded/step_N.jsonl       one group a line, in the order of its step's problems; last, how many there are

A step's file appears when it is whole, and one that was cut later (a copy that broke off) lacks its last line. Tokens,
logprobs and experts are kept exactly, rewards as Python prints them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_r1.config.paths import RECORDED
from megatron_r1.config.shape import ModelShape, hf_files
from megatron_r1.errors import DataError
from megatron_r1.observe.metrics import JsonLines, read_json_lines, write_json
from megatron_r1.rollout.journal import completion_from_json, completion_to_json
from megatron_r1.rollout.routes import RouteForm
from megatron_r1.types import Problem, Reward, RolloutGroup

FORMAT = 2
"""1: without a last line, the longest text and the teacher's folder."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
LONGEST_LAST_LINE = 64
"""Bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What rollouts were sampled from. `temperature`: their logprobs are of it; `max_model_len`: no text has more
    tokens; `routes`: they bring the experts; `teacher`: the folder whose logprobs those bring that are trained on, or
    empty."""

    format: int = FORMAT
    tokenizer: str
    """SHA-256 of the tokenizer's files."""
    architecture: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    num_experts: int
    experts_per_token: int
    temperature: float
    max_model_len: int
    routes: bool
    teacher: str = ""
    sparse_layers: tuple[int, ...] = ()
    """Those with experts, from 0."""

    @classmethod
    def of(
        cls,
        model: Path,
        shape: ModelShape,
        *,
        temperature: float,
        max_model_len: int,
        routes: bool,
        teacher: Path | None = None,
    ) -> Header:
        """Of the model in this folder."""
        digest = hashlib.sha256()
        for name in TOKENIZER_FILES:
            file = hf_files(model) / name
            if file.is_file():
                digest.update(name.encode() + file.read_bytes())
        return cls(
            tokenizer=digest.hexdigest(),
            architecture=shape.architecture,
            num_layers=shape.num_layers,
            hidden_size=shape.hidden_size,
            vocab_size=shape.vocab_size,
            num_experts=shape.moe.num_experts if shape.moe else 0,
            experts_per_token=shape.moe.top_k if shape.moe else 0,
            temperature=temperature,
            max_model_len=max_model_len,
            routes=routes,
            sparse_layers=RouteForm.of(shape).sparse if shape.moe else (),
            teacher="" if teacher is None else str(teacher.resolve()),
        )

    def differences(self, wanted: Header) -> list[str]:
        """Why rollouts of `self` cannot be trained on by a run of `wanted`: one sentence each."""
        faults = []
        if self.tokenizer != wanted.tokenizer:
            faults.append("they are tokens of another tokenizer than that of model.path")
        for name in ("architecture", "num_layers", "hidden_size", "vocab_size", "num_experts", "experts_per_token"):
            theirs, ours = getattr(self, name), getattr(wanted, name)
            if theirs != ours:
                faults.append(f"they were sampled from a model whose {name} is {theirs}; that of model.path has {ours}")
        theirs, ours = self.sparse_layers, wanted.sparse_layers
        if theirs and ours and theirs != ours:  # older recordings do not have them
            faults.append(
                f"they were sampled from a model whose layers with experts are {_listed(theirs)}; those of "
                f"model.path's are {_listed(ours)}"
            )
        if self.temperature != wanted.temperature:
            faults.append(
                f"they were sampled at temperature {self.temperature}; rollout.sampling.temperature is "
                f"{wanted.temperature}"
            )
        if self.max_model_len > wanted.max_model_len:
            faults.append(
                f"they may have {self.max_model_len} tokens; rollout.max_model_len is {wanted.max_model_len}: raise it"
            )
        if wanted.routes and not self.routes:
            faults.append("they came without experts, which rollout.routes asks for: use off")
        if wanted.teacher and not self.teacher:
            faults.append("they came without a teacher's logprobs, which the algorithm needs: record with it")
        elif wanted.teacher and wanted.teacher != self.teacher:
            faults.append(
                f"they have logprobs of the teacher {self.teacher}; algorithm.teacher.model is {wanted.teacher}: name "
                "that one, which need not be there any more, or record again"
            )
        return faults


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedStep:
    """One step's groups in the order of its problems; `kept`: which of them are trained on (dynamic sampling leaves
    some out); `rounds` of sampling that they took."""

    groups: Sequence[RolloutGroup]
    kept: Sequence[bool]
    rounds: int = 1


class Recording:
    """The rollouts of one run folder."""

    def __init__(self, run_dir: Path) -> None:
        self.folder = run_dir / RECORDED

    def begin(self, header: Header) -> None:
        """Before the first step: writes recording.json."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "recording.json", asdict(header))

    def go_on(self, header: Header, step: int) -> None:
        """A run goes on from step `step`, or begins with 0: as `begin`, and what an earlier start recorded from there
        on is removed, since the run may end before it. DataError as `refuse_gap`."""
        self.refuse_gap(step)
        self.begin(header)
        for number in self._steps():
            if number >= step:
                self._file(number).unlink(missing_ok=True)

    def refuse_gap(self, step: int) -> None:
        """DataError if steps below `step`, from which or a later one a run goes on, are missing."""
        if (found := self.num_steps()) < step:
            raise DataError(
                f"keep_rollouts: the run has done {step} steps, and {self.folder} has the first {found} only, so that "
                "nothing could be trained on later ones: leave keep_rollouts out, or begin a run with another run_dir"
            )

    def header(self) -> Header:
        """DataError if there is none, or it is not one of ours."""
        file = self.folder / "recording.json"
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            if (written := found.get("format", FORMAT)) == FORMAT:
                return Header(**found | {"sparse_layers": tuple(found.get("sparse_layers", ()))})
        except FileNotFoundError as error:
            raise DataError(
                f"{file} is not there: name the folder of a run that had rollout_only or keep_rollouts"
            ) from error
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{file} cannot be read ({error}): record again") from error
        raise DataError(f"{file}: its format is {written}, this version reads {FORMAT}: record again")

    def num_steps(self) -> int:
        """Whole steps from 0 on, before the first that is missing or cut."""
        step = 0
        while self._is_whole(step):
            step += 1
        return step

    def fault(self) -> str | None:
        """Why its steps are not those that were recorded, without reading them all: one sentence, or None."""
        whole = self.num_steps()
        if self._file(whole).is_file():
            return f"{self._file(whole)} is cut: copy it again, or remove it and all later ones"
        later = [step for step in self._steps() if step > whole]
        if later:
            return (
                f"{self._file(whole)} is missing, and {self._file(min(later)).name} is there: copy it, or remove those"
            )
        return None if whole else "it has no whole step"

    def is_stale(self) -> bool:
        """Whether older weights than those of its time sampled the second step, by its first group: those of a run that
        only sampled, or that sent the servers new weights after every few steps. False for what cannot be read."""
        try:
            with open(self._file(1), encoding="utf-8") as file:
                group = group_from_json(json.loads(file.readline()))
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return any(completion.weight_version < 1 for completion in group.completions)

    def _steps(self) -> list[int]:
        return [int(file.stem.removeprefix("step_")) for file in self.folder.glob("step_*.jsonl")]

    def _is_whole(self, step: int) -> bool:
        """Whether the file ends with its last line."""
        try:
            with open(self._file(step), "rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - LONGEST_LAST_LINE))
                *_, last, after = file.read().split(b"\n")
            return after == b"" and list(json.loads(last)) == ["groups"]
        except (OSError, ValueError):
            return False

    def write(self, step: int, found: RecordedStep) -> None:
        """Record step `step`, in the place of an earlier record of it. OutputError if it cannot be written."""
        file = self._file(step)
        partial = file.with_suffix(".partial")
        partial.unlink(missing_ok=True)
        with JsonLines(partial) as lines:
            for group, kept in zip(found.groups, found.kept, strict=True):
                lines.write(group_to_json(group) | {"kept": kept, "rounds": found.rounds})
            lines.write({"groups": len(found.groups)})
        os.replace(partial, file)

    def read(self, step: int) -> RecordedStep:
        """DataError, naming the file, for one that is missing or damaged."""
        file = self._file(step)
        if not file.is_file():
            raise DataError(f"{file} is not there: {self.folder} has {self.num_steps()} steps")
        try:
            *lines, last = read_json_lines(file)
            if last["groups"] != len(lines):
                raise ValueError(f"{len(lines)} of {last['groups']} groups")
            return RecordedStep(
                groups=[group_from_json(line) for line in lines],
                kept=[bool(line["kept"]) for line in lines],
                rounds=int(lines[0]["rounds"]),
            )
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise DataError(f"{file} cannot be read ({type(error).__name__}: {error}): record again") from error

    def _file(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}.jsonl"


def group_to_json(group: RolloutGroup) -> dict[str, Any]:
    """Plain JSON that `group_from_json` makes the same group of."""
    problem = group.problem
    return {
        "problem": {
            "id": problem.id,
            "domain": problem.domain,
            "messages": list(problem.messages),
            "answer": problem.answer,
            "grader": problem.grader,
            "language": problem.language,
            "metadata": problem.metadata,
        },
        "prompt_ids": group.prompt_ids.tolist(),
        "completions": [completion_to_json(completion) for completion in group.completions],
        "rewards": [
            {"total": _number(reward.total), "parts": {name: _number(part) for name, part in reward.parts.items()}}
            for reward in group.rewards
        ],
    }


def group_from_json(found: Mapping[str, Any]) -> RolloutGroup:
    problem = found["problem"] | {"messages": tuple(found["problem"]["messages"])}
    return RolloutGroup(
        problem=Problem(**problem),
        prompt_ids=np.asarray(found["prompt_ids"], dtype=np.int32),
        completions=tuple(completion_from_json(one) for one in found["completions"]),
        rewards=tuple(
            Reward(total=float(one["total"]), parts={name: float(part) for name, part in one["parts"].items()})
            for one in found["rewards"]
        ),
    )


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))


def _number(value: float) -> float | str:
    """JSON has no NaN and no infinity; float() reads their names."""
    return value if math.isfinite(value) else str(value)
