"""What a kind of stage is: one object that says everything the rest of the program asks of it.

A kind is a folder with its configuration and rules (config.py), this object (stage.py) and what it runs (run.py); one
line in pipeline/kinds.py registers it. A kind of the user's own is one file with all three (docs/extending.md). The
command line, pipelines, the planner, a cluster's placing and doctor know kinds through this object only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from megatron_r1.config.schema import StageConfig
from megatron_r1.config.shape import ModelShape
from megatron_r1.observe.names import Names
from megatron_r1.planning.needs import Needs

C = TypeVar("C", bound=StageConfig)


class Validate(Protocol):
    """Raises ConfigError listing every fault of a configuration; returns the shape of its model, if it has one.
    `folder`: whether run_dir may be used is looked at too."""

    def __call__(self, config: Any, *, folder: bool = True) -> ModelShape | None: ...


def _nothing(config: Any, needs: Needs, shape: ModelShape) -> list[str]:
    return []


def _as_it_is(config: Any, unmade: Callable[[Path], bool]) -> Any:
    return config


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage(Generic[C]):
    """One kind of stage."""

    name: str
    """In run.json and on the pages that list runs."""
    config: type[C]
    validate: Validate
    needs: Callable[[C], Needs]
    load: Callable[[], Callable[..., dict[str, Any]]]
    """Imports and returns what runs: (config, shape, device) on every trainer rank, or (config) in the only process of
    a stage without one. It returns the summary."""
    outputs: tuple[str, ...]
    """What it leaves in its run folder for later stages."""
    describe: Callable[[C, Needs, ModelShape], list[str]] = _nothing
    """What is about to run, in a few lines, for a configuration whose model has that shape."""
    report: bool = False
    """Whether it writes report.html."""
    metrics: Names = field(default_factory=dict)
    """The names in its metrics.jsonl; of a stage that writes none, none."""
    summary: Names = field(default_factory=dict)
    """The names in its summary.json."""
    common: tuple[str, ...] = ()
    """What `--help` shows of it, in order: fields by their paths, or a whole part by its name."""
    without: Callable[[C, Callable[[Path], bool]], C] = _as_it_is
    """The configuration without the inputs that earlier stages have still to make and that nothing can stand for when
    it is checked; the function says whether a path is such an input."""
