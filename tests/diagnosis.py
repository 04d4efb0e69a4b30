"""Trainer folders with planted faults, and what megatron-r1 diagnose says of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ranks import run_launches
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
LAYOUTS = {
    "one": (1, ()),
    "tp2": (2, ("--parallel.tensor", "2", "--parallel.sequence", "--parallel.expert-tensor", "2")),
    "ep2": (2, ("--parallel.expert", "2")),
    "pp2": (2, ("--parallel.pipeline-parallel", "2")),
    "pp2 of 3": (2, ("--parallel.pipeline-parallel", "2", "--parallel.pipeline-layout", "Et|ttL")),
    "cp2": (2, ("--parallel.context", "2")),
    "vpp2": (2, ("--parallel.pipeline-parallel", "2", "--parallel.virtual-pipeline", "2")),
    "tp2pp2ep2": (
        4,
        (
            *("--parallel.tensor", "2", "--parallel.sequence", "--parallel.expert", "2"),
            *("--parallel.pipeline-parallel", "2"),
        ),
    ),
    "cp2tp2ep2": (
        4,
        ("--parallel.tensor", "2", "--parallel.sequence", "--parallel.expert", "2", "--parallel.context", "2"),
    ),
    "dp2": (2, ()),
}
"""Ranks, and the command's words."""


def planted(
    folder: Path,
    target: Path,
    change: Callable[[Tensors], object] | None = None,
    fields: Mapping[str, Any] | None = None,
) -> Path:
    """A copy of `folder` with `change` made to its tensors, and `fields` of its config.json set."""
    shutil.copytree(folder, target)
    if change is not None:
        tensors = load_file(target / "model.safetensors")
        change(tensors)
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    if fields is not None:
        file = target / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return target


def swap(one: str, other: str) -> Callable[[Tensors], object]:
    """A change that exchanges two tensors of one shape."""

    def change(tensors: Tensors) -> None:
        tensors[one], tensors[other] = tensors[other], tensors[one]

    return change


def diagnoses(root: Path, cases: Mapping[str, tuple[str, Sequence[str]]]) -> dict[str, dict[str, Any]]:
    """What the command writes with --json, by case: (a name of LAYOUTS, the command's other words). `root` takes files;
    one launch for each number of ranks."""
    launches: dict[int, list[str]] = {}
    for name, (layout, words) in cases.items():
        ranks, parallel = LAYOUTS[layout]
        (root / f"{name}.words").write_text(json.dumps([*map(str, words), *parallel]))
        launches.setdefault(ranks, []).append(name)
    arguments = {ranks: [str(root), ",".join(names)] for ranks, names in launches.items()}
    for said in run_launches("diagnose.py", arguments, timeout_seconds=500).values():
        raise AssertionError(said)
    return {name: json.loads((root / f"{name}.json").read_text()) for name in cases}


def departing(found: Mapping[str, Any]) -> list[str]:
    return [module["name"] for module in found["modules"] if module["departs"]]
