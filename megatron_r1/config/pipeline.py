"""A pipeline is a dataclass whose fields are stages, in the order in which they run.

A path that begins with `@` names what an earlier stage made: `@cold_start/model` is folder `model` of stage
`cold_start`. From these follows what depends on what; nothing else declares it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import get_args, get_type_hints

from megatron_r1.config.paths import input_paths, replace_inputs
from megatron_r1.config.schema import StageConfig
from megatron_r1.errors import ConfigError

REFERENCE = "@"


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineConfig:
    """What every pipeline has; a pipeline adds its stages as fields (None: the stage is left out)."""

    name: str
    """Of the pipeline, in its manifest and report."""
    run_dir: Path
    """Each stage runs in a folder of its own in here; manifest.json tells what was made of what."""
    seed: int = 0
    """Added to every stage's own."""


OWN_FIELDS = frozenset(field.name for field in dataclasses.fields(PipelineConfig))


def stages_of(pipeline: PipelineConfig) -> dict[str, StageConfig]:
    """The stages in order, ready to run: folders, seeds and references filled in.

    Raises ConfigError for a reference to a stage that is not there or does not come earlier."""
    given = {
        field.name: getattr(pipeline, field.name)
        for field in dataclasses.fields(pipeline)
        if field.name not in OWN_FIELDS and getattr(pipeline, field.name) is not None
    }
    faults: list[str] = []
    ready: dict[str, StageConfig] = {}
    for name, stage in given.items():
        for field, path in input_paths(stage).items():
            source = _stage_in(path)
            if source is not None and source not in ready:
                faults.append(
                    f"{name}.{field} is {path}; no stage of that name comes before it: use {', '.join(ready) or 'none'}"
                )
        stage = replace_inputs(stage, lambda path: _resolved(path, pipeline.run_dir))
        ready[name] = dataclasses.replace(  # pyright: ignore[reportArgumentType] - a protocol of dataclasses
            stage,
            run_dir=pipeline.run_dir / name,
            seed=pipeline.seed + stage.seed,
            if_exists="resume" if _resumes(stage) else "archive",
        )
    if faults:
        raise ConfigError(faults)
    return ready


def _resumes(stage: StageConfig) -> bool:
    """Whether a run of this kind can go on from a checkpoint."""
    return "resume" in get_args(get_type_hints(type(stage))["if_exists"])


def parent_of(path: Path, run_dir: Path) -> tuple[str, Path] | None:
    """(stage, path within its folder) if `path` lies in a stage's folder of the pipeline in `run_dir`."""
    parts = path.relative_to(run_dir).parts if path.is_relative_to(run_dir) else ()
    return (parts[0], Path(*parts[1:])) if len(parts) > 1 else None


def _stage_in(path: Path) -> str | None:
    first = path.parts[0] if path.parts else ""
    return first.removeprefix(REFERENCE) if first.startswith(REFERENCE) else None


def _resolved(path: Path, run_dir: Path) -> Path:
    stage = _stage_in(path)
    return path if stage is None else run_dir.joinpath(stage, *path.parts[1:])
