"""From a model folder and problems to graded samples, without a trainer: what evaluation and rejection share."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_r1.config.schema import DataConfig, RolloutConfig
from megatron_r1.config.shape import hf_files
from megatron_r1.data.jsonl import read_problems
from megatron_r1.data.source import problems_from
from megatron_r1.data.template import PromptRoom, Template, encode_prompt
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.engines.base import Engine
from megatron_r1.errors import ConfigError
from megatron_r1.observe.progress import duration
from megatron_r1.rewards.compose import Scorer
from megatron_r1.rollout.collect import Group, collect
from megatron_r1.stages.common.servers import own_devices, start_rollouts
from megatron_r1.types import Problem, Reward

TELL_SECONDS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Graded:
    """Completions and their rewards in the problems' order; seconds of generation."""

    groups: Sequence[Group]
    rewards: list[list[Reward]]
    seconds: float


def model_folder(model: Path, exported: Path) -> Path:
    """The model as a folder that vLLM serves: itself, or the export of a torch_dist checkpoint to `exported`."""
    from megatron_r1.weights.convert import ConvertOptions, convert
    from megatron_r1.weights.torch_dist_metadata import is_torch_dist

    if not is_torch_dist(model):
        return hf_files(model)
    print(f"exporting {model} to {exported}", flush=True)
    convert(model, exported, ConvertOptions(target="hf", precision="keep"))
    return exported


def given_problems(data: DataConfig, *, of_each_task: int) -> Sequence[Problem]:
    """The files' problems, those of the user's own source, or the first `of_each_task` of each task."""
    if data.files:
        return read_problems(data.files)
    if data.source:
        return problems_from(data.source)
    from megatron_r1.data.tasks import TaskProblems, parse_task

    tasks = [TaskProblems(parse_task(line), seed=data.seed, size=of_each_task) for line in data.tasks]
    return list(itertools.chain.from_iterable(tasks))


def with_room(
    problems: Sequence[Problem], *, template: Template, rollout: RolloutConfig, tokenizer: Tokenizer
) -> list[Problem]:
    """The problems whose prompts leave room for an answer. ConfigError if none does."""
    room = PromptRoom(
        template=template,
        tokenizer=tokenizer,
        max_new_tokens=rollout.sampling.max_new_tokens,
        max_model_len=rollout.max_model_len,
    )
    usable = [problem for problem in problems if room(problem)]
    if problems and not usable:
        raise ConfigError(
            f"none of the {len(problems)} problems leaves room for an answer; lower rollout.sampling.max_new_tokens or "
            "raise rollout.max_model_len"
        )
    return usable


@contextmanager
def running_engines(rollout: RolloutConfig, *, folder: Path, run_dir: Path, seed: int) -> Iterator[tuple[Engine, ...]]:
    """rollout.num_engines servers of `folder`, stopped at the end, however it ends. Several have GPUs of their own:
    those of rollout.devices, or the first that this process sees; a single one sees the GPUs that this process sees."""
    several = rollout.num_engines > 1 or rollout.devices
    devices = own_devices(rollout) if several else (None,)
    engines = start_rollouts(rollout, model_path=folder, run_dir=run_dir, seed=seed, visible_devices=devices)
    try:
        yield engines
    finally:
        for engine in engines:
            engine.stop()


class SamplingProgress:
    """Says, at most every ten seconds, how many of all problems are sampled and how long the rest takes."""

    def __init__(self, total: int) -> None:
        self._total, self._done = total, 0
        self._begun = self._told = time.monotonic()

    def add(self) -> None:
        """One more problem is sampled."""
        self._done += 1
        now = time.monotonic()
        if now - self._told > TELL_SECONDS or self._done == self._total:
            self._told = now
            left = (now - self._begun) / self._done * (self._total - self._done)
            print(f"  {self._done}/{self._total} problems  left {duration(left)}", flush=True)


def sample_and_grade(
    engines: Sequence[Engine],
    problems: Sequence[Problem],
    *,
    num_samples: int,
    template: Template,
    rollout: RolloutConfig,
    tokenizer: Tokenizer,
    scorer: Scorer,
    progress: SamplingProgress,
    seed: int,
) -> Graded:
    """`num_samples` completions of each problem, graded while others are generated. Sample g of problem i has random
    seed `seed + i * num_samples + g`."""
    sampling = rollout.sampling
    stops = tuple(dict.fromkeys((*tokenizer.eos_ids, *sampling.stop_token_ids)))
    prompts = [
        encode_prompt(
            problem,
            template=template,
            tokenizer=tokenizer,
            max_new_tokens=sampling.max_new_tokens,
            max_model_len=rollout.max_model_len,
        ).tolist()
        for problem in problems
    ]
    graded: dict[int, list[Future[Reward]]] = {}

    def grade(index: int, group: Group) -> None:
        graded[index] = [scorer.submit(problems[index], completion, group) for completion in group]
        progress.add()

    collected = collect(
        engines,
        prompts,
        group_size=num_samples,
        sampling=dataclasses.replace(sampling, stop_token_ids=stops),
        seed=seed,
        on_group=grade,
        decode=tokenizer.decode,
    )
    rewards = [[future.result() for future in graded[index]] for index in range(len(problems))]
    return Graded(groups=collected.groups, rewards=rewards, seconds=collected.seconds)
