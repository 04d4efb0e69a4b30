"""The configuration of GRPO and its relatives, R1-Zero's and R1's RL alike. Rules about it are in faults.py.

Defaults are the paper's where it states a number (arXiv 2501.12948 v2, section 2.1 and appendix B.4).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from megatron_r1.algorithms import GRPO, Algorithm
from megatron_r1.algorithms.teacher import Teacher
from megatron_r1.bounds import Count, Natural, NonNegative, Share, at_least
from megatron_r1.config.schema import (
    DataConfig,
    DeadlineConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RewardConfig,
    RolloutConfig,
    TrainConfig,
)
from megatron_r1.config.track import TrackConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class GRPOLoopConfig:
    """The loop of GRPO and its relatives: how much is sampled, in how many optimizer steps it is trained on, what is
    looked after on the way. What is computed of it is the algorithm's."""

    steps: Count = 10_400
    """Rollouts; each is followed by `minibatches` optimizer steps."""
    prompts_per_step: Count = 32
    """Problems sampled for in each rollout."""
    group_size: Annotated[int, at_least(2)] = 16
    """Completions per problem; a completion's advantage is relative to its group."""
    minibatches: Count = 1
    """Optimizer steps per rollout (the paper splits 8,192 outputs into 16)."""
    sync_every: Count = 1
    """The servers get the weights after every N steps (and after the last), so that samples are up to N - 1 steps old;
    algorithm.correction says what the loss does about it."""
    mismatch_bound: NonNegative = 0.05
    """Step 0 stops the run if the mean |logprob(vLLM) - logprob(trainer)| exceeds this."""
    max_skipped_steps: Natural = 4
    """Optimizer steps in a row that may be skipped because their gradient is not finite; more stop the run."""
    eval_every: Natural = 0
    """Greedy accuracy on the validation problems every N steps (0: never)."""
    target_accuracy: Share = 0.0
    """If > 0, stop early once an evaluation (every eval_every steps) reaches this."""
    preference_from_step: Natural = 0
    """Problems with grader "preference" are drawn from this step on (paper: in the last 400 of 1,700)."""
    save_every: Natural = 0
    """Export a Hugging Face folder every N steps (0: at the end only)."""
    rollouts_logged_per_step: Natural = 16
    """Completions written to rollouts.jsonl per step; 0 writes none."""

    def synced_after(self, steps: int) -> bool:
        """Whether the servers get the weights when `steps` steps have been done."""
        return steps % self.sync_every == 0 or steps == self.steps


@dataclass(frozen=True, slots=True, kw_only=True)
class GRPOConfig(GRPOLoopConfig):
    """Everything that a run needs, the loop's own fields beside the parts. Saved as run.json in the run folder."""

    name: str
    """Of the stage, in its files and reports."""
    run_dir: Path
    """Folder for everything that the stage writes."""
    model: ModelConfig
    seed: Natural = 0
    """Of everything random in the stage."""
    if_exists: Literal["refuse", "archive", "resume"] = "refuse"
    """What to do with a run_dir that is not empty: stop; rename it to run_dir.1, .2, ...; or go on from its last
    checkpoint, if it is a run of this very configuration (else rename it)."""
    checkpoint_every: Natural = 5
    """Save what a restart needs every N steps (0: never). It is written while the next steps run."""
    keep_checkpoints: Count = 2
    """The newest so many are kept."""
    keep_best_checkpoint: bool = False
    """Keep the checkpoint with the highest validation accuracy too."""
    deadlines: DeadlineConfig = field(default_factory=DeadlineConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    rewards: RewardConfig = field(default_factory=RewardConfig)
    keep_rollouts: bool = False
    """Keep every step's graded rollout in recorded/, to train on again."""
    rollout_only: bool = False
    """Sample and grade `steps` rollouts of the start model, keep them in recorded/, and train nothing."""
    train_only: Path | None = None
    """A run's folder with recorded/: train on those rollouts, without servers and graders; nothing is evaluated."""
    algorithm: Algorithm = field(default_factory=GRPO)
    """`--algorithm NAME` chooses another with its defaults: a name of algorithms/, or module:Class."""

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """Trainers and rollouts are on one kind of device."""
        return self.rollout.device

    @property
    def teacher(self) -> Teacher | None:
        """Who scores the samples, with an algorithm that needs it."""
        return self.algorithm.needs.teacher
