"""The configuration of rejection sampling: N samples a problem, of which what is correct and readable is kept.

Where the paper states a number it is the default (arXiv 2501.12948 v2, appendix B.3.3: about 600k reasoning and 200k
other samples); the thresholds of the filters are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_r1.config import deadlines
from megatron_r1.config.colocation import sleep_faults
from megatron_r1.config.gym_tasks import task_faults
from megatron_r1.config.judge import JudgeConfig, judge_faults
from megatron_r1.config.languages import reward_faults
from megatron_r1.config.lengths import length_faults
from megatron_r1.config.run_folder import folder_faults
from megatron_r1.config.schema import DataConfig, RewardConfig, RolloutConfig, SamplingConfig
from megatron_r1.config.server_faults import server_faults
from megatron_r1.config.shape import ModelShape, load_shape
from megatron_r1.config.trainer_faults import bound_faults, reward_model_faults
from megatron_r1.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterConfig:
    """What is readable. A sample that was cut off, or lacks the four tags, is always dropped."""

    min_language: float = 0.9
    """Least share of the thought's words that are in the problem's language; 0 does not look."""
    max_paragraph_characters: int = 4000
    """Longest paragraph (text between blank lines), code aside; 0 does not look."""
    code_blocks: bool = False
    """Keep fenced code in the samples of problems that ask for no program."""
    max_repeated_lines: float = 0.3
    """Largest share of lines that repeat an earlier one (as in Gopher, arXiv 2112.11446, table A1); 1 does not look."""
    max_repeated_ngrams: float = 0.3
    """Largest share of 10-word sequences that repeat an earlier one; 1 does not look."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DedupConfig:
    """Exact duplicates of a problem's responses are always dropped; near ones of all responses by MinHash."""

    threshold: float = 0.8
    """Jaccard similarity of the sets of word n-grams from which on two responses count as one; 0 does not look."""
    ngram: int = 5
    min_words: int = 30
    """Shorter responses are compared exactly only: they have too few n-grams to tell anything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MixSource:
    """Other conversations (jsonl, see docs/sft.md) that go into the output beside the kept samples."""

    file: Path
    weight: float
    """Relative to RejectionConfig.weight: 1 beside 3 makes one quarter of the output."""


def _rollout() -> RolloutConfig:
    return RolloutConfig(sampling=SamplingConfig(temperature=1.0, max_new_tokens=32_768))


@dataclass(frozen=True, slots=True, kw_only=True)
class RejectionConfig:
    """One stage of rejection sampling: writes samples.jsonl, kept.jsonl and yield.json to `run_dir`."""

    name: str = "rejection"
    run_dir: Path
    model: Path
    """Hugging Face folder that samples, or a torch_dist checkpoint (exported to `run_dir`/model first)."""
    seed: int = 0
    if_exists: Literal["refuse", "archive"] = "refuse"
    """What to do with a run_dir that is not empty: stop, or rename it to run_dir.1, .2, ..."""
    data: DataConfig = field(default_factory=DataConfig)
    """Tasks or files; `holdout` and `validation` mean nothing here: name what judges the model in `decontaminate`."""
    num_problems: int = 0
    """The first so many problems; 0: all of the files. Tasks need a number (of each)."""
    samples: int = 16
    """Samples a problem."""
    keep_per_problem: int = 4
    filters: FilterConfig = field(default_factory=FilterConfig)
    dedup: DedupConfig = field(default_factory=DedupConfig)
    decontaminate: tuple[Path, ...] = ()
    """Evaluation problems (jsonl): what shares an n-gram with one of their questions is dropped."""
    decontaminate_ngram: int = 13
    """In words (13 as in GPT-3, arXiv 2005.14165, appendix C); a shorter question of five words or more is found
    wherever it stands, one of fewer where it is all of a turn."""
    judge: JudgeConfig | None = None
    """Decides, against the reference, about answers that no rule recognised; None: the rules alone decide."""
    weight: float = 3.0
    """The kept samples' share of the output, relative to the weights of `mix` (paper: 600k : 200k)."""
    mix: tuple[MixSource, ...] = ()
    rollout: RolloutConfig = field(default_factory=_rollout)
    rewards: RewardConfig = field(default_factory=RewardConfig)


AT_LEAST = (("seed", 0), ("num_problems", 0), ("samples", 1), ("keep_per_problem", 1), ("decontaminate_ngram", 2))


def validate_rejection(config: RejectionConfig, *, folder: bool = True) -> ModelShape:
    """The sampling model's shape. Raises ConfigError listing every fault. `folder`: whether run_dir may be used is
    looked at too."""
    faults: list[str] = []
    shape = None
    try:
        shape = load_shape(config.model)
    except ConfigError as error:
        faults += [fault.replace("model.path", "model", 1) for fault in error.faults]
    if shape is not None:
        faults += reward_model_faults(shape, config.model, "model")
    faults += [
        f"{name} is {getattr(config, name)}; it must be at least {least}"
        for name, least in AT_LEAST
        if getattr(config, name) < least
    ]
    faults += bound_faults(config, deadlines.AT_LEAST, deadlines.ABOVE_ZERO)
    faults += _data_faults(config) + _filter_faults(config) + _sampling_faults(config, shape)
    faults += sleep_faults(config.rollout)
    if config.judge is not None:
        faults += judge_faults(config.judge)
    if folder:
        faults += folder_faults(config)
    if faults or shape is None:
        raise ConfigError(faults)
    return shape


def _data_faults(config: RejectionConfig) -> list[str]:
    data, faults = config.data, []
    if bool(data.tasks) == bool(data.files):
        faults.append("data.tasks and data.files: give one of them, reasoning-gym tasks or jsonl files")
    if data.tasks and not config.num_problems:
        faults.append("num_problems is 0; tasks have no end: say how many problems of each are sampled")
    if data.thinking == "off":
        faults.append("data.thinking is off; only samples with a thought are kept: use on")
    faults += task_faults(data.tasks)
    named = {"data.files": data.files, "decontaminate": config.decontaminate}
    named["mix"] = tuple(source.file for source in config.mix)
    faults += [
        f"{name}: {file} does not exist" for name, files in named.items() for file in files if not file.is_file()
    ]
    if not 0 < config.weight < math.inf:
        faults.append(f"weight is {config.weight}; it must be above 0")
    faults += [
        f"mix[{number}].weight is {source.weight}; it must be above 0: leave the source out instead"
        for number, source in enumerate(config.mix)
        if not 0 < source.weight < math.inf
    ]
    return faults


def _filter_faults(config: RejectionConfig) -> list[str]:
    filters, dedup, faults = config.filters, config.dedup, []
    shares = {
        "filters.min_language": filters.min_language,
        "filters.max_repeated_lines": filters.max_repeated_lines,
        "filters.max_repeated_ngrams": filters.max_repeated_ngrams,
        "dedup.threshold": dedup.threshold,
    }
    faults += [
        f"{name} is {share}; it is a share between 0 and 1" for name, share in shares.items() if not 0 <= share <= 1
    ]
    if filters.max_paragraph_characters < 0:
        faults.append(f"filters.max_paragraph_characters is {filters.max_paragraph_characters}; it must be at least 0")
    if dedup.ngram < 1 or dedup.min_words < dedup.ngram:
        faults.append(
            f"dedup.ngram is {dedup.ngram} and dedup.min_words {dedup.min_words}; expected 1 <= ngram <= min_words"
        )
    faults += reward_faults(config.rewards)
    return faults


def _sampling_faults(config: RejectionConfig, shape: ModelShape | None) -> list[str]:
    rollout, sampling, faults = config.rollout, config.rollout.sampling, []
    if not 0 <= sampling.temperature < math.inf or not 0 < sampling.top_p <= 1:
        faults.append("rollout.sampling.temperature must be 0 or more and top_p in (0, 1]")
    if sampling.temperature == 0 and config.samples > 1:
        faults.append(f"samples is {config.samples}; at rollout.sampling.temperature 0 they are all the same: use 1")
    if not 1 <= sampling.max_new_tokens < rollout.max_model_len:
        faults.append(
            f"rollout.sampling.max_new_tokens is {sampling.max_new_tokens}; it must be 1 or more and leave room for a "
            f"prompt in rollout.max_model_len = {rollout.max_model_len}"
        )
    faults += length_faults("rollout.max_model_len", rollout.max_model_len, shape, served=True)
    if rollout.devices and len(rollout.devices) != rollout.num_engines:
        faults.append(
            f"rollout.devices has {len(rollout.devices)} entries; give one for each of rollout.num_engines = "
            f"{rollout.num_engines} servers, such as 4,5,6,7, or none"
        )
    if rollout.num_engines < 1 or config.rewards.num_workers < 1:
        faults.append("rollout.num_engines and rewards.num_workers must be at least 1")
    return faults + server_faults(rollout, shape, fp8_block=shape.fp8_block if shape is not None else None)
