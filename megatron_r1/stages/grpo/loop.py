"""The loop, whatever the algorithm. Every trainer rank runs it; rank 0 alone talks to the servers.

    problems --stream--> prompts --engines--> completions --graders--> groups                       (rank 0)
                                                                         |
              advantages relative to the group <--- algorithm.rewards ---+
                        |
              sequences --scatter--> this rank's rows --old, reference logprobs--> rows             (every rank)
                                                                                 |
    engines <--weights-- push <-- policy.step(rows, algorithm's token loss) <----+   `minibatches` times

Left out: what is behind these calls (stages/grpo/training.py wires them for a run), and the algorithms themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron_r1.algorithms.base import Algorithm
from megatron_r1.data.packing import RowLayout
from megatron_r1.data.stream import ProblemStream
from megatron_r1.observe.metrics import PhaseTimer
from megatron_r1.policy.policy import Policy
from megatron_r1.policy.topology import data_parallel, scatter_over_data
from megatron_r1.stages.common.divergence import SkippedSteps
from megatron_r1.stages.grpo.config import GRPOLoopConfig
from megatron_r1.stages.grpo.loss import policy_loss
from megatron_r1.stages.grpo.metrics import step_metrics, timing
from megatron_r1.stages.grpo.mismatch import Gate
from megatron_r1.stages.grpo.sampling import Collect, Rollout, Sampled, sample_step, wanted_at
from megatron_r1.stages.grpo.sequences import Rows, add_logprobs, refresh_now
from megatron_r1.stages.grpo.shares import Share, Trained, shares_of, with_kl_charged
from megatron_r1.types import Problem, RolloutGroup, StepResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """What the GRPO loop is wired to. All are called on every rank, but for those that say otherwise."""

    stream: ProblemStream | None
    """Of rank 0, which alone draws from it. None with `recorded`."""
    collect: Collect
    """Called on rank 0 alone, within `together`."""
    together: Callable[[Callable[[], None]], None]
    """The work is done on rank 0; the others take part in what it asks of them."""
    push: Callable[[int], None]
    """The current weights go to every engine as version n."""
    on_step: Callable[[int, dict[str, Any], Trained | None], None]
    """After each step: its number, and on rank 0 its metrics and what was trained on."""
    to_trainer: Callable[[bool], None]
    """Before the policy is used: on GPUs that servers share, its memory comes back. True: the servers will be asked
    again before the next push, so they must keep their weights."""
    evaluate: Callable[[], float]
    """Greedy accuracy on the validation problems with the engines' current weights."""
    save: Callable[[int], None]
    """Export the policy after step n."""
    checkpoint: Callable[[int, dict[str, Any]], None]
    """After step n, unless it is the last, with its evaluation: save what a restart needs, if it is time and the
    servers have the current weights. Raises PreemptedError if the run is to end here."""
    skips: SkippedSteps
    warn: Callable[[str], None]
    """Say something on rank 0."""
    decode: Callable[[Sequence[int]], str]
    recorded: Callable[[int], Sampled] | None = None
    """Gives a step's groups, graded, on rank 0, in the place of sampling."""
    record: Callable[[int, Sampled], None] | None = None
    """Is told what a step sampled, on rank 0."""
    teach: Callable[[list[RolloutGroup]], list[RolloutGroup]] | None = None
    """Adds a teacher's logprobs to the completions, if the algorithm needs them. Called as `collect` is."""
    watch: Callable[[str], AbstractContextManager[None]] | None = None
    """Entered with the name of each phase."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A rollout as this rank trains on it: its rows for each minibatch, and how many sequences that has on all ranks (0
    where nothing is left to train on). `trained`: on rank 0. `stale`: older weights than the trainer's may have sampled
    it."""

    trained: Trained | None
    stale: bool
    counts: list[int]
    rows: list[Rows]

    @property
    def first(self) -> int | None:
        """The first minibatch with something to train on."""
        return next((place for place, count in enumerate(self.counts) if count), None)


class TrainingLoop:
    """One run of the loop, from `first_step` on; its attributes are what must be remembered between steps."""

    def __init__(
        self,
        policy: Policy,
        algorithm: Algorithm,
        config: GRPOLoopConfig,
        layout: RowLayout,
        loop: Loop,
        *,
        max_new_tokens: int,
        seed: int,
        first_step: int = 0,
    ) -> None:
        self.policy, self.algorithm, self.config, self.layout, self.loop = policy, algorithm, config, layout, loop
        self.max_new_tokens, self.seed, self.first_step = max_new_tokens, seed, first_step
        only_step = config.minibatches == 1
        own_is_old = only_step and not algorithm.needs.old_pass(1)
        self.losses = {stale: policy_loss(algorithm, own_is_old=own_is_old, stale=stale) for stale in (False, True)}
        self.timer = PhaseTimer(around=loop.watch)
        bound, differ = config.mismatch_bound, policy.routes_differ
        restarted, recorded = first_step > 0, loop.recorded is not None
        self.gate = Gate(bound, loop.decode, loop.warn, restarted=restarted, recorded=recorded, routes_differ=differ)

    def run(self) -> int:
        """`config.steps` rollouts, `config.minibatches` optimizer steps each. Engines must hold the policy's weights.
        `first_step` have been done, if the policy came from a checkpoint, which has its reference policy too.

        Returns the number of steps done: fewer if an evaluation reaches `config.target_accuracy`."""
        if self.algorithm.needs.reference and not self.first_step:
            self.loop.to_trainer(True)
            self.policy.refresh_reference()
        for step in range(self.first_step, self.config.steps):
            metrics = self.step(step)
            if 0 < self.config.target_accuracy <= metrics.get("eval_accuracy", 0.0):
                return step + 1
            if step + 1 < self.config.steps:
                with self.timer.phase("checkpoint"):
                    self.loop.checkpoint(step + 1, metrics)
        return self.config.steps

    def step(self, step: int) -> dict[str, Any]:
        """Sample, prepare, train, push, report. Returns the step's metrics; but for rank 0, its evaluation alone."""
        sampled = self.sample(step)
        prepared = self.prepare(step, sampled)
        with self.timer.phase("train"):
            results = self.train(step, prepared)
        if self.config.synced_after(step + 1):
            with self.timer.phase("sync"):
                self.loop.push(step + 1)
        metrics: dict[str, Any] = {}
        if sampled is not None and prepared.trained is not None:
            metrics = step_metrics(
                results, sampled, prepared.trained.advantages, self.algorithm, self.gate.metrics(), step=step
            )
            if not metrics["staleness"]:  # older samples differ by what was learned since
                self.gate.warn_if_grown(step)
        self.aside(step, metrics)
        seconds = self.timer.take()
        if sampled is not None:
            metrics |= sampled.grading | timing(seconds, sampled.reward_seconds, metrics["tokens"])
        self.loop.on_step(step, metrics, prepared.trained)
        return metrics

    def sample(self, step: int) -> Sampled | None:
        """The step's graded groups, with a teacher's logprobs if the algorithm needs them; on rank 0."""
        found: list[Sampled] = []
        wanted = wanted_at(step, self.config.preference_from_step)

        def collect(problems: Sequence[Problem], **asked: int) -> Rollout:
            with self.timer.phase("rollout"):  # each round has the phase's whole deadline
                return self.loop.collect(problems, **asked)

        def work() -> None:
            if self.loop.recorded is not None:
                with self.timer.phase("rollout"):
                    found.append(self.loop.recorded(step))
                return
            assert self.loop.stream is not None
            stream = self.loop.stream
            sampled = sample_step(
                lambda count: stream.take(count, wanted),
                collect,
                self.algorithm,
                prompts=self.config.prompts_per_step,
                group_size=self.config.group_size,
                seed=self.seed,
                step=step,
            )
            if self.loop.teach is not None:
                with self.timer.phase("teacher"):
                    sampled.kept = self.loop.teach(sampled.kept)
            if self.loop.record is not None:
                self.loop.record(step, sampled)
            found.append(sampled)

        self.loop.together(work)
        return found[0] if found else None

    def prepare(self, step: int, sampled: Sampled | None) -> Prepared:
        """Advantages, minibatches, rows and the logprobs that the loss needs."""
        algorithm, longest = self.algorithm, self.max_new_tokens
        self.gate.next_step()
        trained: Trained | None = None
        with self.timer.phase("packing"):
            self.loop.to_trainer(not self.config.synced_after(step + 1))

            def work() -> list[tuple[list[Share], bool]]:
                nonlocal trained
                assert sampled is not None
                trained = Trained.of(sampled.kept, algorithm, longest)
                parts = trained.parts(self.config.minibatches)
                # Recorded rollouts may be older than sync_every says: a run that only sampled had the start model.
                stale = self.config.sync_every > 1 or sampled.older_than(step)
                shares = shares_of(parts, algorithm, self.layout, longest, data_parallel()[1])
                return [(share, stale) for share in shares]

            shares, stale = scatter_over_data(work)
            rows = [share.lay_out(self.layout) for share in shares]
        counts = [len(share.lengths) for share in shares]
        with self.timer.phase("logprob"):
            needs = algorithm.needs
            done = step * self.config.minibatches
            if needs.kl and needs.reference and refresh_now(done, self.config.minibatches, needs.kl.refresh_steps):
                self.policy.refresh_reference()
            rows = add_logprobs(self.policy, rows, algorithm)
            if any(counts) and needs.old_pass(len(rows)):
                flat = [row for minibatch in rows for row in minibatch]
                self.gate.look(flat, [row.old_logprobs[0] for row in flat])
            if needs.kl_in_reward:
                rows = with_kl_charged(rows, [share.lengths for share in shares], trained, algorithm, longest)
        return Prepared(trained=trained, stale=stale, counts=counts, rows=rows)

    def train(self, step: int, prepared: Prepared) -> list[StepResult]:
        """One optimizer step for each minibatch; an empty one counts in the schedule only. DivergedError when too many
        in a row had no finite gradient, or too many rollouts were empty."""
        results = []
        for rows, count in zip(prepared.rows, prepared.counts, strict=True):
            inspect = None if self.gate.looked else partial(self.gate.look, rows)
            loss = self.losses[prepared.stale]
            results.append(self.policy.step(rows, loss, inspect=inspect) if count else self.policy.skip_step())
            if count:
                self.loop.skips.check(results[-1], step)
        if prepared.first is None:
            self.loop.skips.check(results[-1], step)
        return results

    def aside(self, step: int, metrics: dict[str, Any]) -> None:
        """Validation and export, when it is time for them."""
        every, steps = self.config.eval_every, self.config.steps
        if every and (step + 1) % every == 0 and step + 1 < steps:
            with self.timer.phase("evaluate"):
                metrics["eval_accuracy"] = self.loop.evaluate()
        if self.config.save_every and (step + 1) % self.config.save_every == 0:
            with self.timer.phase("save"):
                self.loop.save(step + 1)
