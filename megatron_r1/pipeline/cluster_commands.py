"""The commands of a cluster job: nodes before submitting it, preflight on every node, serve on the server nodes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from megatron_r1.cluster.preflight import (
    WAIT_SECONDS,
    Meeting,
    Report,
    look,
    node_faults,
    port_faults,
    role_faults,
    run_folder_faults,
)
from megatron_r1.cluster.roles import Roles, roles_of
from megatron_r1.cluster.task import Task, this_task
from megatron_r1.config.paths import input_paths
from megatron_r1.config.pipeline import PipelineConfig, parent_of, stages_of
from megatron_r1.config.schema import StageConfig
from megatron_r1.errors import ConfigError
from megatron_r1.gpus import find_gpus
from megatron_r1.pipeline.chain import check_all, choose
from megatron_r1.pipeline.folder import is_finished
from megatron_r1.pipeline.kinds import check, needs_of
from megatron_r1.pipeline.launch import ranks_of
from megatron_r1.pipeline.manifest import Manifest
from megatron_r1.pipeline.options import Options, moving_faults, split_options, take_option

NODELIST_VARIABLE = "MEGATRON_R1_NODELIST"
"""Names of the job's nodes, in order, from `scontrol show hostnames`."""
PORT_VARIABLE = "MEGATRON_R1_MASTER_PORT"
PATIENCE_VARIABLE = "MEGATRON_R1_PREFLIGHT_SECONDS"
"""How long preflight waits for all nodes; launch.sh has checked that it is a number."""

Parse = Callable[[Sequence[str]], StageConfig | PipelineConfig]


def cluster_command(command: str, words: list[str], parse: Parse) -> int:
    """Run `megatron-r1 COMMAND WORDS`. WORDS are those of `megatron-r1 run`, or `evaluate` and those of that."""
    if command == "nodes":
        return _nodes(words, parse)
    words, options = split_options(words)
    words, roles = take_option(words, "--role")
    if command == "serve":
        from megatron_r1.pipeline.serve import ROLES, serve

        _, stage = _stage(parse(words), options)
        return serve(stage, roles=roles or ROLES)
    task = this_task()
    if task is None:
        raise ConfigError("preflight is for the nodes of a cluster job; slurm/launch.sh starts it")
    names = os.environ.get(NODELIST_VARIABLE, "").split()
    if len(names) != task.world_size:
        raise ConfigError(f"nodes: preflight runs once on each of {len(names)} node(s), not {task.world_size} times")
    patience = float(os.environ.get(PATIENCE_VARIABLE, WAIT_SECONDS))
    meeting = Meeting(task.folder, names, wait_seconds=patience, tell=lambda what: print(what, flush=True))
    report = look(task.node, names[task.node], gpus=len(find_gpus()))
    if task.node:
        return meeting.attend(report)
    try:
        lines = _admission(task, meeting, report, words, options, parse)
    except BaseException as error:
        meeting.refuse()
        if isinstance(error, ConfigError):
            for fault in error.faults:
                print(f"megatron-r1: preflight: {fault}", file=sys.stderr, flush=True)
            return 2
        raise
    meeting.admit(lines)
    return 0


def _admission(
    task: Task, meeting: Meeting, report: Report, words: Sequence[str], options: Options, parse: Parse
) -> dict[str, object]:
    """Node 0's checks. The lines of `roles`; ConfigError with every fault."""
    pipeline, stage = _stage(parse(words), options)
    needs = needs_of(stage)
    faults = moving_faults(words, stage.run_dir)
    layout: Roles | None = None
    try:
        if pipeline is None:
            check(stage, folder=False)
        else:
            check_all(pipeline, stages_of(pipeline), [options.only or ""])
    except ConfigError as error:
        faults += error.faults
    try:
        layout = roles_of(needs, slots_per_node=task.slots_per_node)
        faults += role_faults(stage.name, layout, meeting.names, task.slots_per_node)
    except ConfigError as error:
        faults += error.faults
    reports, found = meeting.gather(report)
    faults += found
    if needs.rollout is not None and needs.rollout.vllm_args:
        from megatron_r1.engines.chosen import engine_kind

        faults += engine_kind(needs.rollout).faults(needs.rollout)
    port = int(os.environ.get(PORT_VARIABLE, "0"))
    if layout is not None:
        faults += node_faults(needs, layout, reports, task.slots_per_node)
        if layout.world_size > 1 and report.address:
            faults += port_faults(report.address, port, report.name)
    done = not faults and (
        is_finished(stage)
        if pipeline is None
        else Manifest(pipeline.run_dir, pipeline.name).is_current(options.only or "", stage)
    )
    if not done:
        faults += run_folder_faults(stage)
    if faults or layout is None:
        raise ConfigError(faults)
    return {
        "world_size": layout.world_size,
        "trainer_nodes": layout.trainer_nodes,
        "tasks_per_node": layout.tasks_per_node,
        "first_server_node": layout.first_server_node,
        "server_nodes": layout.server_nodes,
        "threads": ranks_of(needs).threads,
        "run_dir": stage.run_dir,
        "master_port": port,
        "done": int(done),
    }


def _stage(config: StageConfig | PipelineConfig, options: Options) -> tuple[PipelineConfig | None, StageConfig]:
    """The stage that the job runs, and its pipeline if it is of one."""
    if not isinstance(config, PipelineConfig):
        options.only_for_pipelines()
        return None, config
    stages = stages_of(config)
    if not options.only:
        raise ConfigError("on a cluster one stage is run at a time: add --only STAGE (slurm/r1_pipeline_671b.sh)")
    choose(stages, options)
    return config, stages[options.only]


def _nodes(words: list[str], parse: Parse) -> int:
    """Print a line for every stage: its name, its nodes, and the stages that it needs (or -)."""
    words, slots = take_option(words, "--slots-per-node")
    if len(slots) != 1 or not slots[0].isdecimal():
        raise ConfigError("nodes: give --slots-per-node, the GPUs of a node (on CPU: the processes)")
    config = parse(words)
    if not isinstance(config, PipelineConfig):
        print(f"{config.name} {roles_of(needs_of(config), slots_per_node=int(slots[0])).nodes} -")
        return 0
    for name, stage in stages_of(config).items():
        parents = [parent_of(path, config.run_dir) for path in input_paths(stage).values()]
        needed = list(dict.fromkeys(parent[0] for parent in parents if parent is not None))
        print(name, roles_of(needs_of(stage), slots_per_node=int(slots[0])).nodes, ",".join(needed) or "-")
    return 0
