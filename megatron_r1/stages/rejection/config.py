"""The configuration of rejection sampling: N samples a problem, of which what is correct and readable is kept.

Where the paper states a number it is the default (arXiv 2501.12948 v2, appendix B.3.3: about 600k reasoning and 200k
other samples); the thresholds of the filters are ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from megatron_r1.bounds import Count, Natural, Positive, Share, at_least, number_faults
from megatron_r1.config.colocation import no_trainer_faults
from megatron_r1.config.custom_reward import reward_faults
from megatron_r1.config.dedup import DedupConfig
from megatron_r1.config.judge import JudgeConfig, judge_faults
from megatron_r1.config.parts import missing_files, problem_faults, rollout_faults, sample_faults
from megatron_r1.config.run_folder import sound
from megatron_r1.config.schema import DataConfig, RewardConfig, RolloutConfig, SamplingConfig
from megatron_r1.config.shape import ModelShape, shape_or_faults
from megatron_r1.config.trainer_faults import reward_model_faults


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterConfig:
    """What is readable. A sample that was cut off, or lacks the four tags, is always dropped."""

    min_language: Share = 0.9
    """Least share of the thought's words that are in the problem's language; 0 does not look."""
    max_paragraph_characters: Natural = 4000
    """Longest paragraph (text between blank lines), code aside; 0 does not look."""
    code_blocks: bool = False
    """Keep fenced code in the samples of problems that ask for no program."""
    max_repeated_lines: Share = 0.3
    """Largest share of lines that repeat an earlier one (as in Gopher, arXiv 2112.11446, table A1); 1 does not look."""
    max_repeated_ngrams: Share = 0.3
    """Largest share of 10-word sequences that repeat an earlier one; 1 does not look."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MixSource:
    """Other conversations (jsonl, see docs/sft.md) that go into the output beside the kept samples."""

    file: Path
    """jsonl file of conversations."""
    weight: Positive
    """Relative to RejectionConfig.weight: 1 beside 3 makes one quarter of the output."""


def _rollout() -> RolloutConfig:
    return RolloutConfig(sampling=SamplingConfig(temperature=1.0, max_new_tokens=32_768))


@dataclass(frozen=True, slots=True, kw_only=True)
class RejectionConfig:
    """One stage of rejection sampling: writes samples.jsonl, kept.jsonl and yield.json to `run_dir`."""

    name: str = "rejection"
    """Of the stage, in its files and reports."""
    run_dir: Path
    """Folder for everything that the stage writes."""
    model: Path
    """Hugging Face folder that samples, or a torch_dist checkpoint (exported to `run_dir`/model first)."""
    seed: Natural = 0
    """Of everything random in the stage."""
    if_exists: Literal["refuse", "archive"] = "refuse"
    """What to do with a run_dir that is not empty: stop, or rename it to run_dir.1, .2, ..."""
    data: DataConfig = field(default_factory=DataConfig)
    """Tasks or files; `holdout` and `validation` mean nothing here: name what judges the model in `decontaminate`."""
    num_problems: Natural = 0
    """The first so many problems; 0: all of the files. Tasks need a number (of each)."""
    samples: Count = 16
    """Samples per problem."""
    keep_per_problem: Count = 4
    """At most so many samples of a problem are kept."""
    filters: FilterConfig = field(default_factory=FilterConfig)
    dedup: DedupConfig = field(default_factory=DedupConfig)
    decontaminate: tuple[Path, ...] = ()
    """Evaluation problems (jsonl): what shares an n-gram with one of their questions is dropped."""
    decontaminate_ngram: Annotated[int, at_least(2)] = 13
    """In words (13 as in GPT-3, arXiv 2005.14165, appendix C); a shorter question of five words or more is found
    wherever it stands, one of fewer where it is all of a turn."""
    judge: JudgeConfig | None = None
    """Decides, against the reference, about answers that no rule recognised; None: the rules alone decide."""
    weight: Positive = 3.0
    """The kept samples' share of the output, relative to the weights of `mix` (paper: 600k : 200k)."""
    mix: tuple[MixSource, ...] = ()
    """Conversations from other files that are added to the output."""
    rollout: RolloutConfig = field(default_factory=_rollout)
    rewards: RewardConfig = field(default_factory=RewardConfig)


def validate_rejection(config: RejectionConfig, *, folder: bool = True) -> ModelShape:
    """The sampling model's shape. Raises ConfigError listing every fault. `folder`: whether run_dir may be used is
    looked at too."""
    shape, faults = shape_or_faults(config.model, "model")
    if shape is not None:
        faults += reward_model_faults(shape, config.model, "model")
    faults += number_faults(config)
    faults += _data_faults(config) + reward_faults(config.rewards)
    faults += rollout_faults(config.rollout, shape, fp8_block=shape and shape.fp8_block)
    faults += sample_faults(config.samples, config.rollout) + no_trainer_faults(config.rollout)
    if config.judge is not None:
        faults += judge_faults(config.judge)
    return sound(config, shape, faults, folder=folder)


def _data_faults(config: RejectionConfig) -> list[str]:
    data, faults = config.data, problem_faults(config.data)
    if data.tasks and not config.num_problems:
        faults.append("num_problems is 0; tasks have no end: say how many problems of each are sampled")
    if data.thinking == "off":
        faults.append("data.thinking is off; only samples with a thought are kept: use on")
    mixed = tuple(source.file for source in config.mix)
    faults += missing_files({"decontaminate": config.decontaminate, "mix": mixed})
    if config.dedup.min_words < config.dedup.ngram:
        faults.append(
            f"dedup.ngram is {config.dedup.ngram} and dedup.min_words {config.dedup.min_words}; expected ngram <= "
            "min_words"
        )
    return faults
