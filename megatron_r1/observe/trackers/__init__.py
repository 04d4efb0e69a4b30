"""Writers of a run's numbers for other people's tools, one file each.

A tracker may fail or hang: it is called in a thread of its own (observe/tracking.py), never by the run itself.
Its libraries are imported as it is opened, so a run without it needs none of them.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from megatron_r1.config.track import TrackConfig, TrackerName


class Tracker(Protocol):
    """One place that numbers go to. `about` is what to tell the user of it: an address, a folder."""

    @property
    def about(self) -> str: ...

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """The numbers of step `step` (counted from 0); NaN and infinities are among them. Steps come in order, without
        those before `first_step`, but a restarted run gives some a second time."""
        ...

    def close(self, seconds: float) -> None:
        """After the last step: what was logged is then where it belongs, or an error says what is not, within about
        `seconds`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackedRun:
    """Which run it is: what every tracker is opened with."""

    folder: Path
    stage: str
    """Kind of stage: grpo, sft or reward_model."""
    track: TrackConfig
    first_step: int = 0
    """Steps from this one on come; above 0 in a restarted run."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The resolved configuration as plain JSON."""
    known: Mapping[str, Any] = field(default_factory=dict)
    """What this tracker's `remember` was given in an earlier start of the run."""

    @property
    def name(self) -> str:
        return self.folder.resolve().name


TRACKERS: Mapping[TrackerName, str] = {
    "tensorboard": "megatron_r1.observe.trackers.tensorboard",
    "wandb": "megatron_r1.observe.trackers.wandb",
    "prometheus": "megatron_r1.observe.trackers.prometheus",
}
"""Each module has `open_tracker(run, remember)`."""


class Opener(Protocol):
    def __call__(self, run: TrackedRun, remember: Remember) -> Tracker: ...


class Remember(Protocol):
    """Keeps plain JSON about the tracker in the run's folder (trackers.json), for later starts and for people."""

    def __call__(self, **facts: Any) -> None: ...


def opener_of(name: TrackerName) -> Opener:
    return importlib.import_module(TRACKERS[name]).open_tracker
