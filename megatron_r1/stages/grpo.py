"""GRPO: sample groups, reward them, train on them, push the weights. One loop, as in the paper's section 2.1.

Every trainer rank runs it. Rank 0 alone talks to the engines and graders; what it collects is broadcast. The loop knows
no layout: rows are packed for this data-parallel rank, Megatron does the rest.

    problems = stream.take(n)
    groups   = collect(problems)                     # completions with logprobs, rewards
    batches  = pack(sequences with advantages and token weights), one a minibatch
    rows    += old and reference logprobs
    for batch: policy.step(batch, grpo loss)
    push(policy.weights(), version)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_r1.config.schema import GRPOConfig
from megatron_r1.data.packing import RowLayout, pack_rank, split_minibatches
from megatron_r1.data.stream import ProblemStream
from megatron_r1.errors import MismatchError
from megatron_r1.grpo.loss import grpo_token_loss, truncated_importance
from megatron_r1.grpo.weights import token_weights
from megatron_r1.model.policy_model import TokenScores
from megatron_r1.observe.metrics import PhaseTimer
from megatron_r1.policy.batch import DeviceBatch
from megatron_r1.policy.policy import LossFunction, LossOutput, Policy
from megatron_r1.policy.topology import data_parallel
from megatron_r1.stages.collector import Collector
from megatron_r1.stages.distill import distill_loss
from megatron_r1.stages.divergence import SkippedSteps
from megatron_r1.stages.mismatch import check_mismatch
from megatron_r1.stages.scores import mean_parts
from megatron_r1.stages.sft import mtp_loss
from megatron_r1.stages.usable import kept_completions, left_out, usable_places
from megatron_r1.types import PackedMicrobatch, RolloutGroup, StepResult, TrainingSequence

Rows = list[PackedMicrobatch]
ASIDE = ("evaluate", "save")
"""Phases that are no part of a step: tokens per second are counted without them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """What the GRPO loop is wired to. All are called on every rank."""

    stream: ProblemStream
    collector: Collector
    push: Callable[[int], None]
    """The current weights go to every engine as version n."""
    on_step: Callable[[int, dict[str, Any], list[RolloutGroup]], None]
    """After each step: its number, metrics and groups."""
    to_trainer: Callable[[bool], None]
    """Before the policy is used: on GPUs that servers share, its memory comes back. True: the servers will be asked
    again before the next push, so they must keep their weights."""
    evaluate: Callable[[], float]
    """Greedy accuracy on the validation problems with the engines' current weights."""
    save: Callable[[int], None]
    """Export the policy after step n."""
    checkpoint: Callable[[int, dict[str, Any]], None]
    """After step n, unless it is the last, with its metrics: save what a restart needs, if it is time. Raises
    PreemptedError if the run is to end here."""
    skips: SkippedSteps
    warn: Callable[[str], None]
    """Say something on rank 0."""
    decode: Callable[[Sequence[int]], str]
    teach: Callable[[list[RolloutGroup]], list[RolloutGroup]] | None = None
    """Adds a teacher's logprobs to the completions, which then train instead of the rewards."""
    watch: Callable[[str], AbstractContextManager[None]] | None = None
    """Entered with the name of each phase."""


def train_grpo(
    policy: Policy,
    config: GRPOConfig,
    layout: RowLayout,
    loop: Loop,
    *,
    max_new_tokens: int,
    seed: int,
    first_step: int = 0,
) -> int:
    """`config.steps` rollouts, `config.minibatches` optimizer steps each. Engines must hold the policy's weights.
    `first_step` have been done, if the policy came from a checkpoint, which has its reference policy too.

    Returns the number of steps done: fewer if an evaluation reaches `config.target_accuracy`. Raises DivergedError
    when more than `config.max_skipped_steps` optimizer steps in a row had no finite gradient.
    """
    rank, ranks = data_parallel()
    if config.kl_coef > 0 and not first_step:
        loop.to_trainer(True)
        policy.refresh_reference()
    loss = distill_loss if loop.teach is not None else grpo_loss(config)
    timer = PhaseTimer(around=loop.watch)
    told, checked = None, False
    for step in range(first_step, config.steps):
        with timer.phase("rollout"):
            early = step < config.preference_from_step
            problems = loop.stream.take(
                config.prompts_per_step,
                lambda problem: not (early and problem.grader == "preference"),  # noqa: B023 - called at once
            )
            rollout = loop.collector.collect(
                problems, group_size=config.group_size, seed=step_seed(seed, step), step=step
            )
        groups = rollout.groups
        if loop.teach is not None:
            with timer.phase("teacher"):
                groups = loop.teach(groups)
        with timer.phase("packing"):
            loop.to_trainer(False)
            parts = [
                to_sequences(part, config, max_new_tokens) for part in split_minibatches(groups, config.minibatches)
            ]
            minibatches = [pack_rank(part, layout, rank=rank, num_ranks=ranks) for part in parts]
        first = next((place for place, part in enumerate(parts) if part), None)
        if not checked and first is not None:
            checked = True
            with timer.phase("check"):
                try:
                    check_mismatch(policy, minibatches[first], bound=config.mismatch_bound, decode=loop.decode)
                except MismatchError as error:
                    if not first_step:
                        raise
                    loop.warn(f"going on in spite of this, as the run before its restart would have: {error}")
        with timer.phase("logprob"):
            if config.kl_coef > 0 and refresh_now(step * config.minibatches, config):
                policy.refresh_reference()
            minibatches = add_logprobs(policy, minibatches, config)
        with timer.phase("train"):
            results = []
            for rows, part in zip(minibatches, parts, strict=True):
                results.append(policy.step(rows, loss) if part else policy.skip_step())
                loop.skips.check(results[-1], step)
        with timer.phase("sync"):
            loop.push(step + 1)
        metrics = step_metrics(results, groups, config)
        if step > first_step and first is not None and not told:
            told = disagreement(step, metrics["mismatch"], config.mismatch_bound)
            if told:
                loop.warn(told)
        if config.eval_every and (step + 1) % config.eval_every == 0 and step + 1 < config.steps:
            with timer.phase("evaluate"):
                metrics["eval_accuracy"] = loop.evaluate()
        if config.save_every and (step + 1) % config.save_every == 0:
            with timer.phase("save"):
                loop.save(step + 1)
        seconds = timer.take()
        # Grading that outlasted generation ran inside the rollout phase.
        seconds["reward"] = rollout.reward_seconds
        seconds["rollout"] -= rollout.reward_seconds
        working = sum(value for phase, value in seconds.items() if phase not in ASIDE)
        metrics |= rollout.grading
        metrics |= {"seconds": seconds, "tokens_per_second": metrics["tokens"] / max(working, 1e-9)}
        loop.on_step(step, metrics, groups)
        if 0 < config.target_accuracy <= metrics.get("eval_accuracy", 0.0):
            return step + 1
        if step + 1 < config.steps:
            with timer.phase("checkpoint"):
                loop.checkpoint(step + 1, metrics)
    return config.steps


def disagreement(step: int, mismatch: float, bound: float) -> str | None:
    """What to say when servers and trainer differ by more than `bound` after the gate has passed (NaN too)."""
    if mismatch <= bound:
        return None
    return (
        f"step {step + 1}: rollout and trainer differ by {mismatch:.4f} in the mean logprob of a token, and "
        f"grpo.mismatch_bound is {bound}. At the first step they agreed: look whether weight sync misses a part"
    )


def step_seed(seed: int, step: int) -> int:
    """The random seed of a step's rollout, u62. Completion g of prompt i samples with this + i * group_size + g, so
    seeds of neighbouring steps and runs must lie far apart."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> 2)


def refresh_now(done: int, config: GRPOConfig) -> bool:
    """Whether a multiple of config.reference_refresh_steps was passed by the last rollout's optimizer steps; `done` of
    them have been taken."""
    every = config.reference_refresh_steps
    return every > 0 and done > 0 and done // every > (done - config.minibatches) // every


def to_sequences(groups: Sequence[RolloutGroup], config: GRPOConfig, max_new_tokens: int) -> list[TrainingSequence]:
    """One minibatch's groups as training sequences: prompt and completion joined, group-relative advantages, token
    weights normalised over the minibatch. Completions without a usable reward are left out, of all of this."""
    kept = [kept_completions(group, config) for group in groups]
    lengths = [len(completion.token_ids) for pairs in kept for completion, _ in pairs]
    if not lengths:
        return []
    weights = iter(token_weights(lengths, config.normalisation, max_new_tokens=max_new_tokens))
    sequences = []
    for group, pairs in zip(groups, kept, strict=True):
        prompt = np.asarray(group.prompt_ids, dtype=np.int32)
        zeros = np.zeros(len(prompt), dtype=np.float32)
        for completion, advantage in pairs:
            length = len(completion.token_ids)
            weight = np.full(length, next(weights), dtype=np.float32)
            sequences.append(
                TrainingSequence(
                    token_ids=np.concatenate([prompt, completion.token_ids]).astype(np.int32),
                    loss_mask=np.concatenate([np.zeros(len(prompt), bool), np.ones(length, bool)]),
                    token_weight=np.concatenate([zeros, weight]),
                    advantage=advantage,
                    behaviour_logprobs=np.concatenate([zeros, completion.logprobs]).astype(np.float32),
                    reference_logprobs=None
                    if completion.teacher_logprobs is None
                    else np.concatenate([zeros, completion.teacher_logprobs]).astype(np.float32),
                )
            )
    return sequences


def add_logprobs(policy: Policy, minibatches: Sequence[Rows], config: GRPOConfig) -> list[Rows]:
    """Rows with the logprobs that the loss needs: old ones if this rollout takes several steps (with one step the
    policy is the old policy), reference ones if the KL term is on."""
    flat = [row for rows in minibatches for row in rows]
    if config.minibatches > 1:
        old = policy.logprobs(flat)
        flat = [dataclasses.replace(row, old_logprobs=values[None]) for row, values in zip(flat, old, strict=True)]
    if config.kl_coef > 0:
        with policy.reference_weights():
            reference = policy.logprobs(flat)
        flat = [
            dataclasses.replace(row, reference_logprobs=values[None])
            for row, values in zip(flat, reference, strict=True)
        ]
    rows = iter(flat)
    return [[next(rows) for _ in minibatch] for minibatch in minibatches]


def grpo_loss(config: GRPOConfig) -> LossFunction:
    """The step's loss: sum_t weight_t * (importance * clipped surrogate + kl_coef * k3), and that of the MTP layers on
    the sampled tokens if they are trained."""
    on_policy = config.minibatches == 1

    def loss(scores: TokenScores, batch: DeviceBatch) -> LossOutput:
        logprobs, mask = scores.logprobs, batch.loss_mask
        old = logprobs.detach() if on_policy else batch.old_logprobs
        cap = config.truncated_importance_cap
        token_loss, kl, bound = grpo_token_loss(
            logprobs,
            old_logprobs=old,
            advantages=batch.advantages,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            clip_dual=config.clip_dual,
            kl_coef=config.kl_coef,
            reference_logprobs=batch.reference_logprobs if config.kl_coef > 0 else None,
            importance=truncated_importance(old, batch.behaviour_logprobs, cap) if cap > 0 else None,
        )
        detached = {
            "kl": kl.detach(),
            "entropy": scores.entropy.detach(),
            "clip_fraction": bound.float(),
            "mismatch": (logprobs.detach() - batch.behaviour_logprobs).abs(),
        }
        # where, not multiply: positions outside the mask may hold anything.
        sums = {name: value.where(mask, 0.0).sum() for name, value in detached.items()}
        total = (token_loss.where(mask, 0.0) * batch.token_weight).sum()
        return LossOutput(total + mtp_loss(scores), sums)

    return loss


def step_metrics(results: Sequence[StepResult], groups: Sequence[RolloutGroup], config: GRPOConfig) -> dict[str, Any]:
    """One step's row of metrics.jsonl, but for its timing. Token metrics of several minibatches are averaged, except
    `mismatch`, which only the first that is trained measures (later ones differ because the policy has moved). Means of
    rewards are over those that are usable."""
    usable = [usable_places(group) for group in groups]
    rewards = [
        reward
        for group, places in zip(groups, usable, strict=True)
        for reward, place in zip(group.rewards, places, strict=True)
        if place
    ]
    completions = [completion for group in groups for completion in group.completions]
    averaged = {
        name: _mean([result.metrics[name] for result in results if name in result.metrics])
        for name in ("kl", "entropy", "clip_fraction")
    }
    equal = sum(
        len({reward.total for reward, place in zip(group.rewards, places, strict=True) if place}) == 1
        for group, places in zip(groups, usable, strict=True)
    )
    completions_left_out, groups_left_out = left_out(groups, config)
    return {
        "loss": _mean([result.loss for result in results if result.metrics]),
        "reward_mean": _mean([reward.total for reward in rewards]),
        **mean_parts(rewards),
        **averaged,
        "mismatch": next((result.metrics["mismatch"] for result in results if result.metrics), math.nan),
        "grad_norm": _mean([result.grad_norm for result in results if result.metrics]),
        "lr": results[-1].learning_rate,
        "skipped_steps": sum(result.skipped for result in results),
        "length_mean": float(np.mean([len(completion.token_ids) for completion in completions])),
        "truncated": float(np.mean([completion.finish_reason == "length" for completion in completions])),
        "zero_advantage_groups": equal,
        "completions_left_out": completions_left_out,
        "groups_left_out": groups_left_out,
        "weight_version": max(completion.weight_version for completion in completions),
        "completion_tokens": sum(len(completion.token_ids) for completion in completions),
        "tokens": sum(len(g.prompt_ids) + len(c.token_ids) for g in groups for c in g.completions),
    }


def _mean(values: Sequence[float]) -> float:
    """NaN of nothing: metrics.jsonl then has null."""
    return float(np.mean(values)) if values else math.nan
