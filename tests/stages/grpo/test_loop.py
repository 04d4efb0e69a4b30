"""The loop itself, on one rank: what it does when, with small stand-ins at its borders and no model."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_r1.algorithms import DAPO, GRPO, Algorithm, OnPolicyDistill
from megatron_r1.algorithms.base import RESERVED
from megatron_r1.algorithms.correction import Correction
from megatron_r1.algorithms.kl import KL
from megatron_r1.data.packing import RowLayout
from megatron_r1.errors import DivergedError, MismatchError
from megatron_r1.model.policy_model import TokenScores
from megatron_r1.policy import topology
from megatron_r1.policy.policy import Inspect
from megatron_r1.stages.common.divergence import SkippedSteps
from megatron_r1.stages.grpo.collector import Rollout
from megatron_r1.stages.grpo.config import GRPOLoopConfig
from megatron_r1.stages.grpo.loop import Loop, TrainingLoop
from megatron_r1.stages.grpo.sampling import Sampled
from megatron_r1.stages.grpo.shares import Trained
from megatron_r1.types import Completion, PackedMicrobatch, Problem, Reward, RolloutGroup, StepResult

LONGEST = 8
SAMPLED = -1.0
"""Logprob of every token by the engine."""


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    """Megatron's groups of one process. Not by topology.initialise: it needs the CPU's patches, which would stay for
    other tests."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    yield
    topology.finalise()


class StandIn:
    """A policy of one number: the logprob that it gives to every token. A step adds 0.1 to it."""

    def __init__(self, logprob: float = SAMPLED) -> None:
        self.logprob, self.reference, self.calls = logprob, math.nan, []
        self.rows: list[list[PackedMicrobatch]] = []
        self.losses: list = []
        self.broken_steps = 0

    def logprobs(self, rows: Sequence[PackedMicrobatch]) -> list[np.ndarray]:
        self.calls.append("logprobs")
        return [np.full(row.num_tokens, self.logprob, np.float32) for row in rows]

    def routes_differ(self) -> dict[int, float]:
        return {}

    def refresh_reference(self) -> None:
        self.calls.append("refresh")
        self.reference = self.logprob

    @contextlib.contextmanager
    def reference_weights(self):
        own, self.logprob = self.logprob, self.reference
        yield
        self.logprob = own

    def step(self, rows: list[PackedMicrobatch], loss: object, *, inspect: Inspect | None = None) -> StepResult:
        if inspect is not None:
            self.calls.append("look")
            inspect([np.full(row.num_tokens, self.logprob, np.float32) for row in rows])
        self.calls.append("step")
        self.rows.append(rows)
        self.losses.append(loss)
        self.logprob += 0.1
        metrics = {"kl": 0.0, "clip_fraction": 0.0, "entropy": 1.0, "tokens": 1.0}
        self.broken_steps -= 1
        return StepResult(
            loss=1.0, grad_norm=math.nan, learning_rate=1.0, metrics=metrics, skipped=self.broken_steps >= 0
        )

    def skip_step(self) -> StepResult:
        self.calls.append("skip")
        return StepResult(loss=0.0, grad_norm=0.0, learning_rate=1.0, metrics={}, skipped=True)


class World:
    """Problems and what is answered to them: problem n's completions have 2 and 3 tokens and earn `rewards(n)`."""

    def __init__(self, rewards=lambda n: (1.0, 0.0)) -> None:
        self.rewards, self.drawn, self.calls = rewards, 0, []
        self.version = 0
        self.told: list[tuple[int, dict, Trained]] = []
        self.warnings: list[str] = []
        self.accuracies = iter([0.25, 0.5, 0.75, 1.0])

    def take(self, count: int, wanted) -> list[Problem]:
        found = []
        while len(found) < count:
            grader = "preference" if self.drawn % 2 else "math"
            problem = Problem(id=str(self.drawn), domain="math", messages=(), grader=grader)
            self.drawn += 1
            if wanted(problem):
                found.append(problem)
        return found

    def collect(self, problems, *, group_size: int, seed: int, step: int, first: int) -> Rollout:
        self.calls.append(f"collect {step}")
        groups = [self.group(problem) for problem in problems]
        return Rollout(
            groups=groups,
            reward_seconds=0,
            num_tokens=0,
            restarts=0,
            grading={"grading_errors": 0},
        )

    def group(self, problem: Problem) -> RolloutGroup:
        completions = tuple(
            Completion(
                token_ids=np.arange(length, dtype=np.int32),
                logprobs=np.full(length, SAMPLED, np.float32),
                finish_reason="stop",
                weight_version=self.version,
            )
            for length in (2, 3)
        )
        rewards = tuple(Reward(total=total, parts={}) for total in self.rewards(int(problem.id)))
        return RolloutGroup(
            problem=problem, prompt_ids=np.array([7], np.int32), completions=completions, rewards=rewards
        )

    def evaluate(self) -> float:
        self.calls.append("evaluate")
        return next(self.accuracies)

    def push(self, version: int) -> None:
        self.calls.append(f"push {version}")
        self.version = version

    def teach(self, groups: list[RolloutGroup]) -> list[RolloutGroup]:
        def scored(one: Completion) -> Completion:
            return dataclasses.replace(one, teacher_logprobs=np.full(len(one.token_ids), -0.5, np.float32))

        return [
            dataclasses.replace(group, completions=tuple(scored(one) for one in group.completions)) for group in groups
        ]


def loop_of(
    policy: StandIn,
    world: World,
    algorithm: Algorithm | None = None,
    *,
    first_step: int = 0,
    teach=None,
    recorded=None,
    **changes,
) -> TrainingLoop:
    config = GRPOLoopConfig(**{"steps": 1, "prompts_per_step": 2, "group_size": 2, "mismatch_bound": 1.0} | changes)
    calls = world.calls
    loop = Loop(
        stream=world,  # pyright: ignore[reportArgumentType]
        collect=world.collect,
        together=lambda work: work(),
        push=world.push,
        on_step=lambda step, metrics, trained: world.told.append((step, metrics, trained)),
        to_trainer=lambda keep: calls.append(f"to trainer {keep}"),
        evaluate=world.evaluate,
        save=lambda step: calls.append(f"save {step}"),
        checkpoint=lambda step, metrics: calls.append(f"checkpoint {step}"),
        skips=SkippedSteps(config.max_skipped_steps),
        warn=world.warnings.append,
        decode=str,
        teach=teach,
        recorded=recorded,
    )
    policy.calls = calls
    return TrainingLoop(
        policy,  # pyright: ignore[reportArgumentType]
        algorithm or GRPO(kl=KL(coef=0.0)),
        config,
        RowLayout(tokens_per_microbatch=32),
        loop,
        max_new_tokens=LONGEST,
        seed=0,
        first_step=first_step,
    )


def test_a_run_of_two_steps_from_sampling_to_the_push():
    world = World()
    assert loop_of(StandIn(), world, steps=2).run() == 2
    step = ["to trainer False", "look", "step"]
    assert world.calls == [
        "collect 0", *step, "push 1", "checkpoint 1", "collect 1", *step, "push 2",
    ]  # fmt: skip
    (_, metrics, trained), (_, later, _) = world.told
    assert (metrics["mismatch"], later["mismatch"]) == (0.0, pytest.approx(0.1)), "of the policy before each step"
    assert [advantages_G.tolist() for advantages_G in trained.advantages] == [[1.0, -1.0]] * 2
    assert metrics["reward_mean"] == 0.5 and metrics["grading_errors"] == 0
    assert {"rollout", "packing", "logprob", "train", "sync"} <= set(metrics["seconds"])


def test_weights_go_to_the_servers_every_n_steps_and_after_the_last():
    world = World()
    loop_of(StandIn(), world, steps=5, sync_every=2, eval_every=2, mismatch_bound=9.0).run()
    assert [call for call in world.calls if call.startswith(("collect", "to trainer", "push", "evaluate"))] == [
        "collect 0", "to trainer True",  # the servers are asked again before a sync: they keep their weights
        "collect 1", "to trainer False", "push 2", "evaluate",
        "collect 2", "to trainer True",
        "collect 3", "to trainer False", "push 4", "evaluate",
        "collect 4", "to trainer False", "push 5",
    ]  # fmt: skip
    told = [(metrics["weight_version"], metrics["staleness"]) for _, metrics, _ in world.told]
    assert told == [(0, 0), (0, 1), (2, 0), (2, 1), (4, 0)]
    assert ["sync" in metrics["seconds"] for _, metrics, _ in world.told] == [False, True, False, True, True]


def test_stale_samples_may_differ_by_more_than_the_bound():
    """The policy moves by 0.1 a step; the bound is 0.05, and the samples of step 1 are a step old."""
    policy, world = StandIn(), World()
    loop_of(policy, world, steps=2, sync_every=2, mismatch_bound=0.05).run()
    assert world.told[1][1]["mismatch"] == pytest.approx(0.1) and world.warnings == []
    policy, world = StandIn(), World()
    loop_of(policy, world, steps=3, sync_every=2, mismatch_bound=0.05).run()
    assert world.told[2][1]["mismatch"] == pytest.approx(0.2), "the stand-in's engine does not follow it"
    assert len(world.warnings) == 1 and world.warnings[0].startswith("step 3: ")


def test_samples_of_the_start_model_are_stale_at_every_later_step(monkeypatch):
    """As rollouts are that were recorded without training."""
    policy, world = StandIn(), World()
    monkeypatch.setattr(world, "push", lambda version: None)
    loop_of(policy, world, steps=3, mismatch_bound=0.05).run()
    assert [metrics["staleness"] for _, metrics, _ in world.told] == [0, 1, 2] and world.warnings == []


def test_recorded_samples_that_are_another_policys_are_told_of_as_such():
    """The policy moves by 0.1 a step, and the recorded rollouts say that weights as new as its own sampled them."""
    world = World()

    def recorded(step: int) -> Sampled:
        world.version = step
        groups = [world.group(Problem(id=str(number), domain="math", messages=())) for number in range(2)]
        return Sampled(groups=groups, kept=groups, rounds=1)

    loop_of(StandIn(), world, steps=3, mismatch_bound=0.05, recorded=recorded).run()
    assert not any(call.startswith("collect") for call in world.calls)
    assert [metrics["staleness"] for _, metrics, _ in world.told] == [0, 0, 0]
    assert len(world.warnings) == 1 and "trained otherwise than the one that sampled" in world.warnings[0]


def test_minibatches_are_steps_of_their_own_groups():
    policy, world = StandIn(), World(lambda n: (float(n), 0.0))
    loop_of(policy, world, GRPO(kl=KL(coef=0.0)), prompts_per_step=4, minibatches=2).run()
    assert world.calls.count("step") == 2
    assert world.calls.count("logprobs") == 1, "the old ones of all minibatches, which the mismatch is measured by"
    assert "look" not in world.calls and world.told[0][1]["mismatch"] == 0.0
    for rows in policy.rows:
        assert sum(len(row.sequence_indices) for row in rows) == 4
        weights = sum(float(row.token_weight.sum()) for row in rows)
        assert weights == pytest.approx(1.0), "normalised over the minibatch"
        for row in rows:
            assert (row.old_logprobs[row.loss_mask] == np.float32(SAMPLED)).all()


@pytest.mark.parametrize(
    ("algorithm", "minibatches", "sync_every", "passes", "ratio"),
    [
        (GRPO(kl=KL(coef=0.0)), 1, 1, 0, 1.0),  # of this forward: p / p_old is 1
        (GRPO(kl=KL(coef=0.0)), 2, 1, 1, 1.1),
        (GRPO(kl=KL(coef=0.0)), 2, 2, 1, 1.3),  # stale samples are weighed: p / p_old * p_old / p_rollout
        (GRPO(kl=KL(coef=0.0), correction=Correction(weight="none")), 2, 2, 1, 1.1),
        (GRPO(kl=KL(place="reward")), 1, 1, 1, 1.1),  # there is a pass, so its values count
        (GRPO(kl=KL(coef=0.0), correction=Correction(ratio_against="rollout")), 1, 1, 0, 1.3),
        (GRPO(kl=KL(coef=0.0), correction=Correction(ratio_against="rollout")), 2, 1, 0, 1.3),
    ],
)
def test_which_probability_the_ratio_is_against(algorithm, minibatches, sync_every, passes, ratio):
    """The batch says p / p_old = 1.1 and p / p_rollout = 1.3; at advantage -1 no clip binds above 1."""
    policy, world = StandIn(), World()
    policy.reference, world.version = SAMPLED, 1
    loop_of(policy, world, algorithm, minibatches=minibatches, sync_every=sync_every, first_step=1, steps=2).run()
    assert world.calls.count("logprobs") == passes + algorithm.needs.reference, "old and reference"
    assert ("look" in world.calls) is (passes == 0), "then the mismatch is measured at the first optimizer step"
    assert loss_against(policy.losses[-1], old=1.1, engine=1.3) == pytest.approx(ratio)


def loss_against(loss, *, old: float, engine: float) -> float:
    """`loss` of a batch with advantage -1 whose tokens are so many times as likely as they were to the policy before
    the rollout's first step, and to the engine."""
    ones = torch.ones(1, 2)
    batch = SimpleNamespace(
        old_logprobs=-math.log(old) * ones,
        behaviour_logprobs=-math.log(engine) * ones,
        reference_logprobs=0 * ones,
        teacher_logprobs=0 * ones,
        advantages=-ones,
        loss_mask=ones > 0,
        token_weight=ones / 2,
        sequence_mean=None,
        sequence_sum=None,
    )
    return loss(TokenScores(0 * ones, 0 * ones), batch).loss.item()


def test_recorded_samples_are_weighed_by_their_own_age(monkeypatch):
    """All of the start model, as a run that only samples records them: sync_every says nothing of that."""
    policy, world = StandIn(), World()
    monkeypatch.setattr(world, "push", lambda version: None)
    loop_of(policy, world, steps=3, mismatch_bound=9.0).run()
    found = [loss_against(loss, old=1.0, engine=1.3) for loss in policy.losses]
    assert found == pytest.approx([1.0, 1.3, 1.3]), "the first step's samples are the present policy's"
    policy, world = StandIn(), World()
    loop_of(policy, world, steps=2, mismatch_bound=9.0).run()
    assert [loss_against(loss, old=1.0, engine=1.3) for loss in policy.losses] == pytest.approx([1.0, 1.0])


def test_the_reference_policy_is_renewed_every_n_optimizer_steps():
    policy, world = StandIn(), World()
    loop_of(policy, world, GRPO(kl=KL(refresh_steps=2)), steps=5, mismatch_bound=9.0).run()
    steps_before = [world.calls[:place].count("step") for place, call in enumerate(world.calls) if call == "refresh"]
    assert steps_before == [0, 2, 4]
    assert world.calls[0] == "to trainer True", "its memory comes back before the first sampling"
    references = [float(rows[0].reference_logprobs[rows[0].loss_mask][0]) for rows in policy.rows]
    assert references == pytest.approx([-1.0, -1.0, -0.8, -0.8, -0.6])


def test_after_a_restart_the_reference_is_the_checkpoints():
    policy, world = StandIn(), World()
    policy.reference = -3.0
    loop_of(policy, world, GRPO(), first_step=1, steps=2, mismatch_bound=9.0).run()
    assert "refresh" not in world.calls and world.told[0][0] == 1
    assert float(policy.rows[0][0].reference_logprobs[policy.rows[0][0].loss_mask][0]) == -3.0


def test_exports_and_evaluations_have_their_steps():
    world = World()
    loop_of(StandIn(), world, steps=6, save_every=3, eval_every=2, mismatch_bound=9.0).run()
    assert [call for call in world.calls if call.startswith(("save", "evaluate"))] == [
        "evaluate", "save 3", "evaluate", "save 6",
    ]  # fmt: skip
    assert [metrics.get("eval_accuracy") for _, metrics, _ in world.told] == [None, 0.25, None, 0.5, None, None]


def test_a_run_ends_at_its_target_accuracy():
    world = World()
    assert loop_of(StandIn(), world, steps=9, eval_every=1, target_accuracy=0.5, mismatch_bound=9.0).run() == 2
    assert world.calls[-1] == "evaluate", "no checkpoint of a run that is over"


@pytest.mark.parametrize("logprob", [SAMPLED + 0.3, math.nan])
def test_the_gate_stops_a_run_before_anything_is_learned(logprob):
    world = World()
    with pytest.raises(MismatchError, match="rollout and trainer disagree"):
        loop_of(StandIn(logprob), world, mismatch_bound=0.2).run()
    assert "step" not in world.calls


def test_the_gate_of_a_restarted_run_only_warns():
    world = World()
    loop_of(StandIn(SAMPLED + 0.3), world, first_step=1, steps=3, mismatch_bound=0.2).run()
    assert world.warnings[0].startswith("going on in spite of this")
    assert len(world.warnings) == 2 and world.warnings[1].startswith("step 3: rollout and trainer differ by 0.4000")


def test_a_growing_mismatch_is_told_once():
    world = World()
    loop_of(StandIn(), world, steps=5, mismatch_bound=0.15).run()
    assert [text.split(":")[0] for text in world.warnings] == ["step 3"]


def test_steps_without_a_gradient_end_the_run_after_the_limit():
    policy, world = StandIn(), World()
    policy.broken_steps = 3
    with pytest.raises(DivergedError, match="step 3: 3 optimizer steps in a row had no finite gradient"):
        loop_of(policy, world, steps=9, max_skipped_steps=2).run()


def test_a_minibatch_with_nothing_to_train_on_is_skipped():
    world = World(lambda n: (math.nan, math.nan) if n == 0 else (1.0, 0.0))
    loop_of(StandIn(), world, minibatches=2).run()
    assert [call for call in world.calls if call in ("step", "skip")] == ["skip", "step"]
    ((_, metrics, trained),) = world.told
    assert (metrics["completions_left_out"], metrics["groups_left_out"], metrics["skipped_steps"]) == (2, 1, 1)
    assert np.isnan(trained.advantages[0]).all()


def test_preference_problems_wait_for_their_step():
    world = World()
    loop_of(StandIn(), world, steps=2, preference_from_step=1).run()
    problems = [[group.problem.grader for group in trained.groups] for _, _, trained in world.told]
    assert problems[0] == ["math", "math"] and "preference" in problems[1]


def test_dynamic_sampling_trains_on_groups_that_differ_and_counts_all():
    world = World(lambda n: (1.0, 0.0) if n in (1, 4) else (1.0, 1.0))
    loop_of(StandIn(), world, DAPO(overlong_share=0.0)).run()
    ((_, metrics, trained),) = world.told
    assert [group.problem.id for group in trained.groups] == ["1", "4"]
    # 0 and 1; then two at most by the share of a half, 2 and 3; then two again, 4 and 5
    assert (metrics["groups_sampled"], metrics["sampling_rounds"], metrics["zero_advantage_groups"]) == (6, 3, 4)
    assert metrics["reward_mean"] == pytest.approx(10 / 12), "of everything that was sampled"


def test_minibatches_without_groups_end_no_run():
    """One group of eight minibatches: seven optimizer steps have nothing to train on, and the run goes on."""
    world = World(lambda n: (1.0, 0.0) if n % 16 == 0 else (1.0, 1.0))
    loop = loop_of(
        StandIn(), world, DAPO(sampling_rounds=1), steps=3, prompts_per_step=16, minibatches=8, max_skipped_steps=1,
        mismatch_bound=9.0,
    )  # fmt: skip
    assert loop.run() == 3
    world = World(lambda n: (1.0, 0.0) if n % 16 == 0 else (1.0, 1.0))
    loop = loop_of(
        StandIn(), world, DAPO(sampling_rounds=2), steps=3, prompts_per_step=16, minibatches=8, max_skipped_steps=1,
        mismatch_bound=9.0,
    )  # fmt: skip
    assert loop.run() == 3
    assert all(metrics["skipped_steps"] >= 5 for _, metrics, _ in world.told)


def test_rollouts_with_nothing_at_all_end_it():
    world = World(lambda n: (1.0, 1.0))
    with pytest.raises(DivergedError, match=r"step 3: 3 optimizer steps in a row had nothing to train on"):
        loop_of(StandIn(), world, DAPO(sampling_rounds=2), steps=9, minibatches=2, max_skipped_steps=2).run()


def test_every_metric_of_the_loop_is_reserved():
    world = World()
    loop_of(StandIn(), world, DAPO(), eval_every=1, steps=2, mismatch_bound=9.0).run()
    for _, metrics, _ in world.told:
        assert set(metrics) <= RESERVED | set(DAPO.METRICS), set(metrics) - RESERVED


def test_a_step_for_which_nothing_differs_is_skipped():
    world = World(lambda n: (1.0, 1.0))
    loop_of(StandIn(), world, DAPO(sampling_rounds=2)).run()
    assert "skip" in world.calls and "step" not in world.calls and "logprobs" not in world.calls
    ((_, metrics, trained),) = world.told
    assert trained.groups == [] and math.isnan(metrics["mismatch"]) and metrics["groups_sampled"] == 4


def test_a_penalty_in_the_reward_changes_advantages_before_training():
    """The policy is 0.2 above its reference at each of 2 and 3 tokens: k1 charges 0.4 and 0.6 with coefficient 1."""
    policy, world = StandIn(), World(lambda n: (1.0, 1.0))
    policy.reference = SAMPLED - 0.2
    algorithm = GRPO(kl=KL(coef=1.0, estimator="k1", place="reward", refresh_steps=0), deviation_floor=1.0)
    loop_of(policy, world, algorithm, first_step=1, steps=2).run()
    ((_, _, trained),) = world.told
    for advantages_G in trained.advantages:  # rewards 0.6 and 0.4: 0.1 above and below their mean
        assert advantages_G == pytest.approx([0.1, -0.1], abs=1e-6)
    (rows,) = policy.rows
    for row in rows:
        lengths = {index: 2 + index % 2 for index in row.sequence_indices}
        for place, index in enumerate(row.sequence_indices):
            start = row.cu_seqlens[place]
            trained_tokens = row.advantages[0, start : start + lengths[index]]
            assert trained_tokens == pytest.approx([0.1 - 0.2 * (index % 2)] * lengths[index], abs=1e-6)
    assert world.calls.count("logprobs") == 2, "old and reference"


def test_a_teacher_scores_what_is_trained_on():
    policy, world = StandIn(), World(lambda n: (math.nan, 1.0))
    loop_of(policy, world, OnPolicyDistill(), teach=world.teach).run()
    (rows,) = policy.rows
    assert sum(len(row.sequence_indices) for row in rows) == 4, "rewards leave none out"
    for row in rows:
        assert (row.teacher_logprobs[row.loss_mask] == -0.5).all() and not row.reference_logprobs.any()
    assert "teacher" in world.told[0][1]["seconds"]
