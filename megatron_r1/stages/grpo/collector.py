"""From problems to rewarded groups, on rank 0, with the other trainer ranks at hand.

Rank 0 encodes prompts, samples from the engines and grades while others still generate. The groups stay there: the
other ranks get their own sequences only, later (loop.py). Meanwhile they wait in `together`; if a restarted engine
needs the current weights in the middle of a rollout, they are called to take part in that push.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch.distributed as dist

from megatron_r1.agreement import trainers
from megatron_r1.config.schema import DataConfig, RolloutConfig, SamplingConfig
from megatron_r1.data.template import encode_prompt
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.engines.base import Engine, WeightSync
from megatron_r1.errors import UserError
from megatron_r1.observe.watch import Watch
from megatron_r1.rewards.compose import Scorer
from megatron_r1.rollout.collect import Group, collect
from megatron_r1.rollout.journal import Journal, record
from megatron_r1.rollout.routes import RouteForm
from megatron_r1.types import Problem, Reward, RolloutGroup

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One collection: groups in the problems' order; seconds of grading that outlasted generation."""

    groups: list[RolloutGroup]
    reward_seconds: float
    num_tokens: int
    restarts: int
    grading: dict[str, int]
    """Answers over their grading time, and answers whose grader failed (`grading_timeouts`, `grading_errors`)."""


class Collector:
    """Collects groups; construct it on every rank. `engines`, `scorer` and `journal` are used on rank 0 only."""

    def __init__(
        self,
        *,
        rollout: RolloutConfig,
        data: DataConfig,
        tokenizer: Tokenizer,
        sync: WeightSync,
        engines: Sequence[Engine] = (),
        scorer: Scorer | None = None,
        journal: Journal | None = None,
        routes: RouteForm | None = None,
        watch: Watch | None = None,
        before: Callable[[], None] = lambda: None,
        version: Callable[[], int] | None = None,
    ) -> None:
        """`routes`: what completions to train on must bring. `before` is called on every rank when servers are
        about to be asked: it may have to make room for them. `version` is that of the trainer's present weights, which
        a restarted server is given; None: the last pushed."""
        self._rollout, self._data, self._tokenizer = rollout, data, tokenizer
        self._sync, self._engines, self._scorer = sync, engines, scorer
        self._journal, self._routes, self._watch, self._before = journal, routes, watch, before
        self._version = version or (lambda: sync.version)
        self._leads = False

    def collect(
        self,
        problems: Sequence[Problem],
        *,
        group_size: int,
        seed: int,
        greedy: bool = False,
        step: int | None = None,
        first: int = 0,
    ) -> Rollout:
        """Sample and grade `group_size` completions of each problem; those of `step` are kept in the journal, and what
        it has of them is not sampled again. `first`: problems of the step that were collected before. On rank 0, within
        `together`."""
        self._call("before")
        self._before()
        return self._collect(problems, group_size, seed, greedy, step, first)

    def together(self, work: Callable[[], T]) -> T:
        """`work` on rank 0, which may collect there as often as it wants; the others take part in what that needs.
        Every rank returns its (small, picklable) result, or raises what it raised. A collective."""
        if trainers() == 1 or dist.get_rank() == 0:
            self._leads = True
            message: list[Any] = ["done", None]
            try:
                message[1] = work()
            except Exception as error:
                message = ["error", error]
                if trainers() == 1:
                    raise
            finally:
                self._leads = False
            self._broadcast(message)
        else:
            message = self._follow()
        what, found = message
        if what == "error":
            raise found  # pyright: ignore[reportGeneralTypeIssues]
        return found

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Watch.phase; within `together`, on the ranks that wait too: each phase has its own deadline."""
        if self._leads:
            self._call("phase", name)
        with contextlib.nullcontext() if self._watch is None else self._watch.phase(name):
            yield

    def _follow(self) -> list[Any]:
        """What rank 0 calls for, until it is done; returns its last message. Errors of servers and of what is sent to
        them are raised on every rank, and rank 0 will say so to those who listen; any other ends this rank at once."""
        failed: Exception | None = None
        with contextlib.ExitStack() as phase:
            while True:
                message = self._broadcast([None, None])
                if message[0] in ("push", "before"):
                    try:
                        self._sync.push(self._version()) if message[0] == "push" else self._before()
                    except (UserError, ValueError) as error:
                        failed = error
                elif message[0] == "phase":
                    phase.close()
                    phase.enter_context(self.phase(message[1]))
                elif message[0] == "done" and failed is not None:
                    raise failed
                else:
                    return message

    def _call(self, what: str, name: str | None = None) -> None:
        self._broadcast([what, name])

    def encode(self, problem: Problem) -> np.ndarray:
        """The problem's prompt i32[P]. Raises DataError if it leaves no room for an answer."""
        return encode_prompt(
            problem,
            template=self._data.template,
            tokenizer=self._tokenizer,
            max_new_tokens=self._rollout.sampling.max_new_tokens,
            max_model_len=self._rollout.max_model_len,
        )

    def _collect(
        self, problems: Sequence[Problem], group_size: int, seed: int, greedy: bool, step: int | None, first: int
    ) -> Rollout:
        assert self._scorer is not None
        prompts = [self.encode(problem) for problem in problems]
        token_lists: list[list[int]] = [prompt.tolist() for prompt in prompts]
        graded: dict[int, list[Future[Reward]]] = {}
        taken: dict[int, Group] = {}
        scorer = self._scorer
        before = scorer.counts()
        journal = self._journal if step is not None else None
        known = journal.known(step, problems, first=first) if journal is not None and step is not None else {}

        with contextlib.ExitStack() as files:
            file = files.enter_context(journal.open(step)) if journal is not None and step is not None else None

            def grade(index: int, group: Group) -> None:
                if index not in known:
                    group = self._with_routes(group, len(prompts[index]), wanted=step is not None)
                    if file is not None:
                        record(file, first + index, problems[index], group)
                taken[index] = group
                graded[index] = [scorer.submit(problems[index], completion, group) for completion in group]

            collected = collect(
                self._engines,
                token_lists,
                group_size=group_size,
                sampling=self._sampling(greedy),
                seed=seed,
                on_group=grade,
                resync=self._resync,
                decode=self._tokenizer.decode,
                known=known,
                newest=self._version(),
            )
        begun = time.perf_counter()
        with self.phase("reward"):
            groups = [
                RolloutGroup(
                    problem=problem,
                    prompt_ids=prompt,
                    completions=taken[index],
                    rewards=tuple(future.result() for future in graded[index]),
                )
                for index, (problem, prompt) in enumerate(zip(problems, prompts, strict=True))
            ]
        after = scorer.counts()
        return Rollout(
            grading={
                "grading_timeouts": after.timeouts - before.timeouts,
                "grading_errors": after.errors - before.errors,
            },
            groups=groups,
            reward_seconds=time.perf_counter() - begun,
            num_tokens=collected.num_tokens,
            restarts=collected.restarts,
        )

    def _with_routes(self, group: Group, prompt_tokens: int, *, wanted: bool) -> Group:
        """The completions as the trainer takes them. What is only judged needs no experts."""
        if self._routes is None:
            return group
        if not wanted:
            return tuple(replace(completion, routes=None) for completion in group)
        return tuple(self._routes.taken(completion, prompt_tokens) for completion in group)

    def _sampling(self, greedy: bool) -> SamplingConfig:
        sampling = self._rollout.sampling
        stops = tuple(dict.fromkeys((*self._tokenizer.eos_ids, *sampling.stop_token_ids)))
        return replace(sampling, stop_token_ids=stops, temperature=0.0 if greedy else sampling.temperature)

    def _resync(self, engine: Engine) -> None:
        """A restarted engine serves the start checkpoint, or none; give it the trainer's present weights, under their
        own version: between two syncs the others have older ones."""
        self._call("push")
        self._sync.push(self._version(), engines=[engine])

    def _broadcast(self, message: list[Any]) -> list[Any]:
        if trainers() > 1:
            dist.broadcast_object_list(message, src=0)
        return message
