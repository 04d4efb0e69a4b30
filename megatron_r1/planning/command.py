"""megatron-r1 plan: options, the plan of a recipe or of a model's folder, and how it is printed (report.py)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_r1.config.schema import ParallelConfig
from megatron_r1.config.server_faults import server_faults
from megatron_r1.config.shape import ModelShape, load_shape
from megatron_r1.config.trainer_faults import parallel_faults
from megatron_r1.errors import ConfigError
from megatron_r1.planning.deadlines import deadline_faults, deadline_line
from megatron_r1.planning.decoding import FP8_BLOCK
from megatron_r1.planning.hardware import GPU, Assumptions, find_gpu
from megatron_r1.planning.needs import Needs
from megatron_r1.planning.plan import Plan, ServerSetup, make_plan, planned_shape, setups_of
from megatron_r1.planning.report import as_json, as_text
from megatron_r1.planning.search import search, smallest
from megatron_r1.planning.trainer import TrainerSetup
from megatron_r1.planning.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    gpus: int | None = None
    gpu: str = "h100"
    mean_tokens: int | None = None
    json: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What is printed: `own` is the configuration as it is (None for a folder), `own_faults` why it cannot run on
    `gpus`, `own_deadlines` how much of its deadlines it needs, `found` the layouts that fit, `least` one on fewer or
    more GPUs where nothing fits."""

    name: str
    shape: ModelShape
    gpu: GPU
    gpus: int
    work: Workload
    own: Plan | None = None
    own_faults: Sequence[str] = ()
    own_deadlines: str = ""
    found: Sequence[Plan] = ()
    least: Plan | None = None


def split_plan_options(words: Sequence[str]) -> tuple[list[str], PlanOptions]:
    """plan's own options, and the other words. Raises ConfigError for a value that is no number, or is missing."""
    rest: list[str] = []
    given: dict[str, str] = {}
    own = {"--gpus": "gpus", "--gpu": "gpu", "--mean-tokens": "mean_tokens"}
    waiting = list(words)
    while waiting:
        word, _, value = waiting.pop(0).partition("=")
        if word == "--json":
            given["json"] = "yes"
        elif word in own:
            if not value and not waiting:
                raise ConfigError(f"{word} needs a value, e.g. {word} {'h100' if word == '--gpu' else '512'}")
            given[own[word]] = value or waiting.pop(0)
        else:
            rest.append(f"{word}={value}" if value else word)
    return rest, PlanOptions(
        gpus=_count(given.get("gpus"), "--gpus"),
        gpu=given.get("gpu", "h100"),
        mean_tokens=_count(given.get("mean_tokens"), "--mean-tokens"),
        json="json" in given,
    )


def _count(text: str | None, option: str) -> int | None:
    if text is None:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"{option} is {text!r}; it must be a whole number above 0")
    return int(text)


def plan_stage(needs: Needs, options: PlanOptions, packaged: Mapping[str, Path]) -> int:
    """Plan a recipe's stage. Exit status 0 if it fits as it is, 1 if not."""
    gpu = find_gpu(options.gpu)
    if needs.work is None or needs.model is None:
        raise ConfigError(f"{needs.name} has nothing to plan: it neither trains nor samples on GPUs")
    folder = needs.model.path
    shape = planned_shape(needs, load_shape(folder if folder.exists() else packaged.get(folder.name, folder)))
    trainer, servers = setups_of(needs)
    if trainer and (faults := parallel_faults(trainer.parallel, shape)):
        raise ConfigError(faults)
    work, assume = needs.work.with_mean(options.mean_tokens), Assumptions()
    own = make_plan(shape, trainer, servers, work, gpu, assume)
    gpus = _whole_nodes(options.gpus or own.gpus, gpu)
    rollout = needs.rollout
    split = server_faults(rollout, shape, fp8_block=FP8_BLOCK if rollout.fp8_folder else None) if rollout else []
    own_faults = [*split, *own.faults, *deadline_faults(needs, shape, own)]
    deadlines = deadline_line(needs, shape, own)
    if own.gpus > gpus:
        own_faults.append(f"{needs.name} asks for {own.gpus} GPUs; --gpus is {gpus}")
    known = Answer(
        name=needs.name, shape=shape, gpu=gpu, gpus=gpus, work=work, own=own, own_faults=own_faults,
        own_deadlines=deadlines,
    )  # fmt: skip
    return _tell(known, trainer, servers, machine=options.json)


def plan_folder(folder: Path, options: PlanOptions) -> int:
    """Plan R1-Zero's step for the model of any Hugging Face folder. Exit status 0 if something fits, 1 if not."""
    gpu = find_gpu(options.gpu)
    shape = load_shape(folder)
    if options.gpus is None:
        raise ConfigError("--gpus is missing; say how many GPUs there are, e.g. --gpus 64")
    gpus = _whole_nodes(options.gpus, gpu)
    longest = min(32_768, shape.max_positions // 2)
    work = Workload(
        samples=512,
        group_size=16,
        mean_response=options.mean_tokens or longest // 4,
        max_response=longest,
        scoring_passes=1,
    )
    row = longest + 1024
    trainer = TrainerSetup(parallel=ParallelConfig(), row_tokens=row)
    servers = ServerSetup(num_servers=1, tensor=1, max_model_len=row)
    known = Answer(name=folder.name, shape=shape, gpu=gpu, gpus=gpus, work=work)
    return _tell(known, trainer, servers, machine=options.json)


def _tell(known: Answer, trainer: TrainerSetup | None, servers: ServerSetup | None, *, machine: bool) -> int:
    """Print what is known and what is found, as JSON for a `machine`. The exit status."""
    shape, gpu, work = known.shape, known.gpu, known.work
    found = search(shape, known.gpus, gpu, work, Assumptions(), trainer, servers)
    least = None if found else smallest(shape, gpu, work, Assumptions(), trainer, servers)
    answer = replace(known, found=found, least=least)
    print(json.dumps(as_json(answer), indent=1) if machine else as_text(answer))
    return int(bool(known.own_faults) if known.own is not None else not found)


def _whole_nodes(gpus: int, gpu: GPU) -> int:
    if gpus > gpu.per_node and gpus % gpu.per_node:
        raise ConfigError(
            f"--gpus is {gpus}; more than one node must be whole nodes of {gpu.per_node}: use "
            f"{gpus // gpu.per_node * gpu.per_node} or {-(-gpus // gpu.per_node) * gpu.per_node}"
        )
    return gpus
