"""What a recipe asks for, against what a machine has."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_r1.config import ModelShape, load_shape
from megatron_r1.config.packages import SUPPORTED, fits
from megatron_r1.config.pipeline import PipelineConfig, stages_of
from megatron_r1.config.schema import ModelConfig
from megatron_r1.doctor.machine import Machine, gib, install, table
from megatron_r1.errors import ConfigError
from megatron_r1.pipeline.chain import as_if_made
from megatron_r1.pipeline.kinds import needs_of
from megatron_r1.planning.needs import Needs
from megatron_r1.planning.parameters import count_parameters
from megatron_r1.planning.plan import planned_shape, setups_of
from megatron_r1.planning.trainer import fullest_state
from megatron_r1.recipes.named import recipe_named

PYTHONS = ((3, 11), (3, 12))

TRAINING = ("torch", "megatron-core", "transformers", "mpmath")
"""Every run needs these, whatever its device."""

CPU_PROCESS_BYTES = 1_400_000_000
"""Resident memory of a trainer rank or a vLLM server on CPU before its weights, with room (0.7 GB seen)."""

OLDEST_DRIVER = 580
"""The driver branch that CUDA 13 asks for (NVIDIA's CUDA 13.0 release notes, table 2)."""

BYTES_PER_WEIGHT = {"fp32": 4, "bf16": 2, "fp8": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """One requirement of a recipe against this machine. `remedy` is what to do where it is not met."""

    what: str
    needed: str
    here: str
    met: bool
    remedy: str = ""


def most_demanding(name: str) -> Needs:
    """What the recipe's most demanding stage asks for: trainers and servers at once, where it has such a stage. What
    earlier stages of a pipeline make counts as present."""
    recipe = recipe_named(name)
    if not isinstance(recipe, PipelineConfig):
        return needs_of(recipe)
    stages = stages_of(recipe)
    found = []
    for stage in stages.values():
        asked, given = needs_of(as_if_made(stage, stages, recipe.run_dir)), needs_of(stage)
        if asked.model is not None and asked.model != given.model:  # what stands in for it may have no weights
            asked = dataclasses.replace(asked, model=dataclasses.replace(asked.model, initialise="random"))
        found.append(asked)
    return max(found, key=lambda needs: (needs.trainer is not None) + (needs.rollout is not None))


def recipe_needs(asked: Needs, machine: Machine) -> list[Need]:
    """What a stage asks for, each against `machine` alone (so a cluster's recipe is not met)."""
    cuda, trainer = asked.cuda, asked.trainer
    needs = [
        Need(
            what="python",
            needed="3.11 or 3.12",
            here=".".join(map(str, machine.python)),
            met=machine.python in PYTHONS,
            remedy="make PYTHON=python3.11",
        )
    ]
    packages = [name for name in asked.packages if name != "transformer-engine"]  # used where it is there
    packages += [name for name in TRAINING if name not in packages]
    if asked.tasks:
        packages.append("reasoning-gym")
    fp8 = trainer is not None and (trainer.train.dtype == "fp8" or trainer.optimizer.moments == "bf16")
    if fp8 and "transformer-engine" not in packages:
        packages.append("transformer-engine")
    absent = [name for name in packages if name not in machine.versions]
    needs.append(
        Need(
            what="packages",
            needed=" ".join(packages),
            here=f"without {' '.join(absent)}" if absent else "all",
            met=not absent,
            remedy=install("gpu" if cuda else "cpu"),
        )
    )
    needs.append(_versions_need(asked, machine))
    if cuda:
        needs.append(_driver_need(machine))
    needs.append(_processors_need(asked, machine))
    if files := asked.files:
        absent = [str(file) for file in files if not file.is_file()]
        needs.append(
            Need(
                what="data",
                needed=" ".join(map(str, files)),
                here=f"without {' '.join(absent)}" if absent else "found",
                met=not absent,
                remedy="put the file there, or give --data.files and --data.holdout-files",
            )
        )
    if asked.model is None:
        return needs
    model, shape = _model_need(asked.name, asked.model)
    needs.append(model)
    if shape is not None:
        shape = planned_shape(asked, shape)
        needs += [_memory_need(asked, shape, machine), _disk_need(asked, shape)]
    return needs


def describe_needs(name: str, needs: Sequence[Need]) -> str:
    rows = [("", "", ""), (name, "", "needs")]
    for need in needs:
        rows.append((f"  {need.what}", "yes" if need.met else "NO", f"{need.needed}; here {need.here}"))
        if not need.met and need.remedy:
            rows.append(("", "", f"to mend it: {need.remedy}"))
    return table(rows)


def _model_need(name: str, model: ModelConfig) -> tuple[Need, ModelShape | None]:
    folder = model.path
    shape, here = None, "found"
    remedy = "put the model there, or give --model.path"
    if (script := Path("examples") / f"{name}.sh").is_file():
        remedy = f"bash {script} makes it"
    if not (folder / "config.json").is_file():
        here = "absent"
    else:
        try:
            shape = load_shape(folder)
        except ConfigError as error:
            here = error.faults[0]
        if model.initialise == "weights" and not any(folder.glob("*.safetensors")):
            here, remedy = "without *.safetensors", "put the weights there, or --model.initialise random"
    return Need(what="model", needed=str(folder), here=here, met=here == "found", remedy=remedy), shape


def _versions_need(asked: Needs, machine: Machine) -> Need:
    """Of the packages that are here; those that are absent are another need."""
    names = asked.packages
    wrong = [f"{name} {machine.versions[name]}" for name in names if not _fits(name, machine.versions)]
    return Need(
        what="versions",
        needed=" ".join(f"{name}{SUPPORTED[name]}" for name in names),
        here=", ".join(wrong) if wrong else "all in range",
        met=not wrong,
        remedy=install("gpu" if asked.cuda else "cpu"),
    )


def _driver_need(machine: Machine) -> Need:
    major = machine.driver.partition(".")[0]
    return Need(
        what="driver",
        needed=f"NVIDIA driver {OLDEST_DRIVER} or newer (CUDA 13)",
        here=machine.driver or "none (nvidia-smi is absent or reaches no driver)",
        met=major.isdigit() and int(major) >= OLDEST_DRIVER,
        remedy="install the driver of your GPU, and in a container pass it in (apptainer --nv, docker --gpus all)",
    )


def _fits(name: str, versions: Mapping[str, str]) -> bool:
    return name not in versions or fits(name, versions[name])


def _processors_need(asked: Needs, machine: Machine) -> Need:
    """Ranks and servers have GPUs of their own (nccl) or share them (ipc); on CPU they take turns."""
    trainer, rollout = asked.trainer, asked.rollout
    trainers = trainer.parallel.world_size if trainer is not None else 0
    serving = rollout.num_engines * rollout.tensor_parallel if rollout is not None else 0
    parts = [f"{trainers} trainer rank(s)"] if trainers else []
    if rollout is not None:
        parts.append(f"{rollout.num_engines} vLLM server(s) of TP{rollout.tensor_parallel}")
    processes = ", ".join(parts) or "one process"
    if not asked.cuda:
        here = f"{machine.cores} core(s)"
        return Need(what="processors", needed=f"CPU, best 2 cores or more: {processes}", here=here, met=True)
    shared = rollout is not None and rollout.sync == "ipc"
    number = max(trainers, serving) if shared else trainers + serving
    return Need(
        what="processors",
        needed=f"{number} GPUs: {processes}",
        here=f"{len(machine.gpus)} GPU(s)",
        met=len(machine.gpus) >= number,
        remedy="a larger machine, a cluster (slurm/), or fewer with --parallel.* and --rollout.*",
    )


def _memory_need(asked: Needs, shape: ModelShape, machine: Machine) -> Need:
    """Weights, gradients, optimizer and cache; activations come on top."""
    trainer, rollout = asked.trainer, asked.rollout
    setup, _ = setups_of(asked)
    rank = fullest_state(shape, setup).total if setup is not None else 0
    weights = 0
    if rollout is not None:
        weights = count_parameters(shape).total * BYTES_PER_WEIGHT[rollout.dtype] // rollout.tensor_parallel
    if asked.cuda:
        smallest = min((gpu.memory_bytes for gpu in machine.gpus), default=0)
        return Need(
            what="memory",
            needed=f"a GPU over {gib(max(rank, weights))} ({gib(rank)} per rank, {gib(weights)} for vLLM)",
            here=gib(smallest),
            met=smallest > max(rank, weights),
            remedy="more --parallel.pipeline-parallel, --parallel.expert or --rollout.tensor-parallel",
        )
    total, server = 0, 0
    if trainer is not None:
        rank += CPU_PROCESS_BYTES
        total += trainer.parallel.world_size * rank
    if rollout is not None:
        server = rollout.tensor_parallel * (CPU_PROCESS_BYTES + weights + int(rollout.kv_cache_gib * 2**30))
        total += rollout.num_engines * server
    return Need(
        what="memory",
        needed=f"{gib(total)} ({gib(rank)} per rank, {gib(server)} per server)",
        here=f"{gib(machine.available_bytes)} free",
        met=machine.available_bytes >= total,
        remedy="stop other programs, or lower --parallel.world-size or --rollout.kv-cache-gib",
    )


def _disk_need(asked: Needs, shape: ModelShape) -> Need:
    """Exported folders (one each save_every steps, the last one, random weights that it starts from) and 100 MB of
    logs."""
    dtype = asked.rollout.dtype if asked.rollout is not None else "bf16"
    size = asked.exports * count_parameters(shape).total * BYTES_PER_WEIGHT[dtype] + 100_000_000
    place = asked.run_dir.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    return Need(
        what="disk",
        needed=f"{gib(size)} in {asked.run_dir} ({asked.exports} exported model(s))",
        here=f"{gib(free)} free",
        met=free >= size,
        remedy="make room, or give another --run-dir",
    )
