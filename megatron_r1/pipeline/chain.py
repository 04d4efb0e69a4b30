"""Run the stages of a pipeline in order, each in a folder and processes of its own, and keep the manifest.

A stage that is up to date is not run again; a killed pipeline goes on with the stage that it was in, from that stage's
beginning. Under an outer launcher that sets RANK (torchrun, slurm/launch.sh) one stage is run at a time, `--only
STAGE`, and its rank 0 keeps the manifest; stages that do not need each other may then run side by side.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_r1.config.paths import input_paths, replace_inputs
from megatron_r1.config.pipeline import PipelineConfig, parent_of, stages_of
from megatron_r1.config.run_folder import LOCK, STOP
from megatron_r1.config.same import as_json
from megatron_r1.config.schema import StageConfig
from megatron_r1.errors import PREEMPTED, ConfigError
from megatron_r1.observe.metrics import write_json
from megatron_r1.observe.pipeline_report import write_pipeline_report
from megatron_r1.observe.progress import duration
from megatron_r1.pipeline.kinds import check, kind_of, summary_of
from megatron_r1.pipeline.launch import PARENT_VARIABLE
from megatron_r1.pipeline.manifest import Manifest
from megatron_r1.pipeline.options import Options
from megatron_r1.pipeline.run import run_here, run_stage
from megatron_r1.planning.summary import describe_fields

ANY_FILE = Path(__file__)
"""Stands for a file that an earlier stage will make, where only its being there is checked."""


def run_pipeline(pipeline: PipelineConfig, words: Sequence[str], options: Options, *, recipe: str) -> int:
    """Run what `options` choose of `pipeline`, which is `recipe` with what the command set. Returns 0, or the exit
    status of the stage that failed.

    Raises ConfigError, before anything is run, for every fault of every chosen stage."""
    stages = stages_of(pipeline)
    chosen = choose(stages, options)
    if "RANK" in os.environ and options.only and not options.dry_run and PARENT_VARIABLE in os.environ:
        return run_here(stages[options.only])
    check_all(pipeline, stages, chosen)
    if options.dry_run:
        for name in chosen:
            print(f"[{name}]\n{describe_fields(stages[name])}")
        return 0
    if "RANK" in os.environ:
        if not options.only:
            raise ConfigError("under torchrun and srun one stage is run at a time: add --only STAGE")
        return _run_as_rank(pipeline, stages, options.only)
    if pipeline.run_dir.exists() and not pipeline.run_dir.is_dir():
        raise ConfigError(f"run_dir: {pipeline.run_dir} is a file")
    pipeline.run_dir.mkdir(parents=True, exist_ok=True)
    with open(pipeline.run_dir / LOCK, "a", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"run_dir: this pipeline is already running in {pipeline.run_dir}") from error
        write_json(pipeline.run_dir / "pipeline.json", {"recipe": recipe, "config": as_json(pipeline)})
        return _run_chosen(pipeline, stages, chosen, words, options)


def _run_as_rank(pipeline: PipelineConfig, stages: Mapping[str, StageConfig], name: str) -> int:
    """One rank of one stage. Rank 0 records its beginning and its end; the others wait for it where the ranks meet."""
    stage = stages[name]
    if os.environ["RANK"] != "0":
        return run_here(stage)
    pipeline.run_dir.mkdir(parents=True, exist_ok=True)
    with open(pipeline.run_dir / LOCK, "a", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"run_dir: this whole pipeline is already running in {pipeline.run_dir}") from error
        manifest = Manifest(pipeline.run_dir, pipeline.name)
        _check_inputs(name, manifest, stages, pipeline.run_dir)
        stage = _begin(name, stage, manifest)
        started, status = time.monotonic(), 1
        try:
            status = run_here(stage)
        finally:
            manifest.finish(name, stage, seconds=time.monotonic() - started, status=status)
            write_pipeline_report(pipeline.run_dir, list(stages))
        return status


def _begin(name: str, stage: StageConfig, manifest: Manifest) -> StageConfig:
    """Record that the stage runs; returns it as it is to be run."""
    if not manifest.same_origin(name, stage) or manifest.record(name).get("state") == "done":
        # Its folder may hold an unfinished run with other inputs, or a finished one that is wanted anew.
        stage = dataclasses.replace(stage, if_exists="archive")  # pyright: ignore[reportArgumentType]
    manifest.begin(name, stage)
    return stage


def choose(stages: Mapping[str, StageConfig], options: Options) -> list[str]:
    """The stages to look at, in order. Raises ConfigError for one that the pipeline does not have."""
    names = list(stages)
    for option, name in (("--from", options.first), ("--until", options.last), ("--only", options.only)):
        if name is not None and name not in stages:
            raise ConfigError(f"{option} {name}: no stage is called so; there are {', '.join(names)}")
    if options.only:
        return [options.only]
    first = names.index(options.first) if options.first else 0
    last = names.index(options.last) if options.last else len(names) - 1
    if last < first:
        raise ConfigError(f"--until {options.last} comes before --from {options.first}")
    return names[first : last + 1]


def _run_chosen(
    pipeline: PipelineConfig,
    stages: Mapping[str, StageConfig],
    chosen: Sequence[str],
    words: Sequence[str],
    options: Options,
) -> int:
    manifest = Manifest(pipeline.run_dir, pipeline.name)
    begun = time.monotonic()
    for number, name in enumerate(chosen, start=1):
        stage = stages[name]
        head = f"[{number}/{len(chosen)}] {name}"
        forced = options.first is not None or options.only is not None
        if not forced and manifest.is_current(name, stage):
            print(f"{head}: up to date", flush=True)
            continue
        _check_inputs(name, manifest, stages, pipeline.run_dir)
        print(f"{head}\n{summary_of(stage, check(stage))}", flush=True)
        stage = _begin(name, stage, manifest)
        write_pipeline_report(pipeline.run_dir, list(stages))
        started = time.monotonic()
        status = run_stage(stage, [*words, "--only", name])
        manifest.finish(name, stage, seconds=time.monotonic() - started, status=status)
        write_pipeline_report(pipeline.run_dir, list(stages))
        if status == PREEMPTED or (status == 0 and (stage.run_dir / STOP).exists()):
            (stage.run_dir / STOP).unlink(missing_ok=True)
            print(f"{head}: asked to end; run the same command again to go on", flush=True)
            return PREEMPTED
        if status:
            print(f"{head}: failed with exit status {status}; mend it and run the same command again", flush=True)
            return status
        print(f"{head}: done in {duration(time.monotonic() - started)}", flush=True)
    report = write_pipeline_report(pipeline.run_dir, list(stages))
    print(f"{pipeline.name}: done in {duration(time.monotonic() - begun)}; report: {report}", flush=True)
    return 0


def check_all(pipeline: PipelineConfig, stages: Mapping[str, StageConfig], chosen: Sequence[str]) -> None:
    """Raises ConfigError with the faults of all chosen stages; what an earlier stage will make counts as present."""
    faults: list[str] = []
    for name in chosen:
        try:
            check(as_if_made(stages[name], stages, pipeline.run_dir), folder=False)
        except ConfigError as error:
            faults += [f"{name}.{fault}" for fault in error.faults]
    if faults:
        raise ConfigError(faults)


def as_if_made(stage: StageConfig, stages: Mapping[str, StageConfig], run_dir: Path) -> StageConfig:
    """The stage with something that is there in place of what earlier stages of the pipeline in `run_dir` will make: a
    model has the shape of the one that it starts from."""

    def unmade(path: Path) -> bool:
        made = parent_of(path, run_dir)
        return made is not None and made[0] in stages and not path.exists()

    def stand_in(path: Path) -> Path:
        made = parent_of(path, run_dir)
        if made is None or not unmade(path):
            return path
        model = getattr(stages[made[0]], "model", None)
        if model is None or made[1].suffix:
            return ANY_FILE
        return stand_in(model if isinstance(model, Path) else model.path)

    return replace_inputs(kind_of(stage).without(stage, unmade), stand_in)


def _check_inputs(name: str, manifest: Manifest, stages: Mapping[str, StageConfig], run_dir: Path) -> None:
    """Raises ConfigError if an earlier stage's output is not there: it was left out with --from or --only."""
    for field, path in input_paths(stages[name]).items():
        made = parent_of(path, run_dir)
        if made is None or made[0] not in stages:  # a file of the user's, or what an archived run made
            continue
        if not path.exists() or manifest.record(made[0]).get("state") != "done":
            raise ConfigError(f"{name}.{field}: {path} is not there, or stage {made[0]} has not finished: run it")
