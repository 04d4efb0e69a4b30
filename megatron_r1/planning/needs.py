"""What a stage asks of the machines that it runs on: its ranks, its servers, their work.

Every kind of stage says it of its configuration in this one form (stages/stage.py). The planner, the placing on a
cluster's nodes, doctor and the checks before a start read nothing else, so none of them knows the kinds.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_r1.config.engines import engine_entry
from megatron_r1.config.packages import needed_packages
from megatron_r1.config.schema import (
    DeadlineConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    TrainConfig,
    TrainerStage,
)
from megatron_r1.planning.workload import Workload

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerNeeds:
    """The trainer's ranks. `reward_head`: the model gets a head of one value and no MTP layers."""

    device: Device
    parallel: ParallelConfig
    train: TrainConfig
    optimizer: OptimizerConfig
    train_mtp: bool = False
    """Whether MTP layers are trained with activations of their own that the planner counts."""
    reward_head: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerBeside:
    """One more vLLM server beside the rollouts': a reward model, or a teacher."""

    name: str
    """That of its log."""
    role: Literal["reward", "teacher"]
    tensor_parallel: int
    devices: str
    field: str
    """The configuration's part that asks for it, for messages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """All that one stage asks for. A stage without `trainer` runs in one process; one without `rollout` starts no
    server."""

    name: str
    run_dir: Path
    model: ModelConfig | None = None
    trainer: TrainerNeeds | None = None
    rollout: RolloutConfig | None = None
    beside: tuple[ServerBeside, ...] = ()
    work: Workload | None = None
    """One step's; None where there is nothing to plan."""
    deadlines: DeadlineConfig | None = None
    """Of a stage whose phases the planner can compare with them."""
    files: tuple[Path, ...] = ()
    """Data that must be there."""
    tasks: bool = False
    """Whether problems come from reasoning-gym."""
    exports: int = 1
    """Models that it writes."""

    @property
    def cuda(self) -> bool:
        """Whether any of it runs on GPUs."""
        return (self.trainer is not None and self.trainer.device == "cuda") or (
            self.rollout is not None and self.rollout.device == "cuda"
        )

    @property
    def packages(self) -> tuple[str, ...]:
        """What its processes import of other projects' packages, as far as their versions matter."""
        device = "cuda" if self.cuda else "cpu"
        serving = {} if self.rollout is None else engine_entry(self.rollout.engine).packages
        serves = tuple(package for on, package in serving.items() if on == device)
        return needed_packages(device=device, trains=self.trainer is not None, serves=serves)


def supervised_needs(
    config: TrainerStage,
    *,
    samples: int,
    longest: int,
    scoring_passes: int = 0,
    reward_head: bool = False,
    files: tuple[Path, ...] = (),
    tasks: bool = False,
) -> Needs:
    """Of a stage that trains on texts as they are: `samples` per step, of at most `longest` tokens, a quarter of that
    on average."""
    trainer = TrainerNeeds(
        device=config.device,
        parallel=config.parallel,
        train=config.train,
        optimizer=config.optimizer,
        train_mtp=config.model.train_mtp,
        reward_head=reward_head,
    )
    work = Workload(
        samples=samples,
        prompt_tokens=1,
        mean_response=max(1, longest // 4),
        max_response=longest,
        scoring_passes=scoring_passes,
        rollout=False,
    )
    return Needs(
        name=config.name,
        run_dir=config.run_dir,
        model=config.model,
        trainer=trainer,
        work=work,
        files=files,
        tasks=tasks,
    )
