"""What a GRPO run is judged by: problems, workers that grade answers, servers of reward models and a teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from megatron_r1.data.problems import ProblemSplit, load_problems
from megatron_r1.data.template import PromptRoom
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.engines.base import Engine
from megatron_r1.rewards.compose import Scorer
from megatron_r1.rewards.wiring import check_problems, has_accuracy, scorer_for
from megatron_r1.rollout.preference import RewardModelServer
from megatron_r1.stages.grpo.config import GRPOConfig
from megatron_r1.stages.grpo.servers import start_reward_models, start_teacher


def problems_of(config: GRPOConfig, tokenizer: Tokenizer, say: Callable[[str], None]) -> ProblemSplit:
    """To train on and to judge by. Raises DataError and ConfigError for those that cannot be used."""
    room = PromptRoom(
        template=config.data.template,
        tokenizer=tokenizer,
        max_new_tokens=config.rollout.sampling.max_new_tokens,
        max_model_len=config.rollout.max_model_len,
    )
    split = load_problems(config.data, room, lambda problem: has_accuracy(problem, config.rewards))
    check_problems(split.known(), config.rewards, reward_models=True)
    if split.num_unusable:
        say(f"{split.num_unusable} of {len(split)} problems leave no room for an answer and are left out")
    if split.num_overlapping:
        say(f"{split.num_overlapping} of {len(split)} problems ask what a held-out one asks and are passed over")
    return split


class Graders:
    """Whatever judges samples: the workers that grade answers, and servers of reward models and of a teacher. On rank 0
    only; the others' are empty."""

    def __init__(self) -> None:
        self.scorer: Scorer | None = None
        self.judges: list[RewardModelServer] = []
        self.teachers: list[Engine] = []

    @property
    def engines(self) -> list[Engine]:
        """The servers."""
        return [*self.teachers, *(judge.engine for judge in self.judges)]

    def start(self, config: GRPOConfig, split: ProblemSplit) -> None:
        """Begin to start all of them; `wait` says when they are there."""
        self.teachers += start_teacher(config)
        self.judges += start_reward_models(config)
        self.scorer = scorer_for(config.rewards, split.known(), preferences=self.judges)

    def wait(self) -> None:
        """Until every grading worker and server answers. Raises what they raise where one cannot start."""
        if self.scorer is not None:
            self.scorer.check_started()
        for engine in self.engines:
            engine.wait_ready()

    def close(self) -> None:
        stop_all(self.teachers)
        for judge in self.judges:
            judge.close()
        if self.scorer is not None:
            self.scorer.close()


def stop_all(engines: Sequence[Engine]) -> None:
    """Side by side, since each may take its time to end."""
    with ThreadPoolExecutor(max(1, len(engines))) as threads:
        list(threads.map(lambda engine: engine.stop(), engines))
