"""Worker: the GRPO loop on prepared rollouts, with broken rewards and without the completions that have them.

usage: grpo_loop.py STORE FOLDER; FOLDER holds a DeepSeek-V3's config.json. FOLDER/found.npz gets the weights after each
loop ("broken:", "clean:"), and FOLDER/metrics.json the steps' metrics.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from pathlib import Path

from megatron_r1.policy.platform import configure_process

configure_process(threads=1, cpu=True)

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from trainer import policy_of  # noqa: E402

from megatron_r1.agreement import on_rank_zero  # noqa: E402
from megatron_r1.algorithms import GRPO  # noqa: E402
from megatron_r1.algorithms.kl import KL  # noqa: E402
from megatron_r1.config import OptimizerConfig, ParallelConfig  # noqa: E402
from megatron_r1.data.packing import RowLayout  # noqa: E402
from megatron_r1.errors import MismatchError  # noqa: E402
from megatron_r1.policy import topology  # noqa: E402
from megatron_r1.stages.common.divergence import SkippedSteps  # noqa: E402
from megatron_r1.stages.grpo.collector import Rollout  # noqa: E402
from megatron_r1.stages.grpo.config import GRPOLoopConfig  # noqa: E402
from megatron_r1.stages.grpo.loop import Loop, TrainingLoop  # noqa: E402
from megatron_r1.types import Completion, Problem, Reward, RolloutGroup  # noqa: E402

NAN = math.nan
REWARDS = [
    [[1.0, 0.0, 0.0], [2.0, 0.5, 1.0]],
    [[1.0, NAN, 0.0], [math.inf, 0.5, 1.0]],
    [[1.0, 0.0, 0.0], [NAN, 0.5, NAN]],  # of the second group nothing is left, and it is a minibatch
]
CONFIG = GRPOLoopConfig(
    steps=3,
    prompts_per_step=2,
    group_size=3,
    minibatches=2,
    mismatch_bound=1e6,
)
ALGORITHM = GRPO(kl=KL(coef=0.05, refresh_steps=2))


def rollouts() -> list[list[RolloutGroup]]:
    rng = np.random.default_rng(0)

    def completion() -> Completion:
        length = int(rng.integers(4, 30))
        ids, logprobs = rng.integers(0, 100, length), rng.normal(-4.5, 0.1, length)
        return Completion(
            token_ids=ids.astype(np.int32),
            logprobs=logprobs.astype(np.float32),
            finish_reason="stop",
            weight_version=0,
        )

    return [
        [
            RolloutGroup(
                problem=Problem(id=f"{step}-{place}", domain="math", messages=()),
                prompt_ids=rng.integers(0, 100, 5).astype(np.int32),
                completions=tuple(completion() for _ in rewards),
                rewards=tuple(Reward(total=total, parts={"helpful": total}) for total in rewards),
            )
            for place, rewards in enumerate(groups)
        ]
        for step, groups in enumerate(REWARDS)
    ]


def without_broken(group: RolloutGroup) -> RolloutGroup:
    kept = [i for i, reward in enumerate(group.rewards) if math.isfinite(reward.total)]
    return dataclasses.replace(
        group,
        completions=tuple(group.completions[i] for i in kept),
        rewards=tuple(group.rewards[i] for i in kept),
    )


class Prepared:
    """Stands where problems and rollouts come from."""

    def __init__(self, groups: list[list[RolloutGroup]]) -> None:
        self.groups = groups

    def take(self, count: int, wanted: object) -> list[Problem]:
        return []

    def collect(self, problems: list[Problem], *, group_size: int, seed: int, step: int, first: int) -> Rollout:
        return Rollout(groups=self.groups[step], reward_seconds=0, num_tokens=0, restarts=0, grading={})


def run(folder: Path, parallel: ParallelConfig, groups: list[list[RolloutGroup]], store: str, **changes: float):
    topology.initialise(parallel, seed=1, cpu=True, store_path=store)
    optimizer = OptimizerConfig(lr=1e-3, min_lr=1e-3)
    policy = policy_of(folder, parallel, optimizer=optimizer, steps=6, initialise="random")
    prepared, rows = Prepared(groups), []
    loop = Loop(
        stream=prepared,
        collect=prepared.collect,
        together=on_rank_zero,
        push=lambda version: None,
        on_step=lambda step, metrics, trained: rows.append(metrics),
        to_trainer=lambda keep: None,
        evaluate=lambda: 0.0,
        save=lambda step: None,
        checkpoint=lambda step, metrics: None,
        skips=SkippedSteps(1),
        warn=lambda text: None,
        decode=str,
    )
    config = dataclasses.replace(CONFIG, steps=len(groups), **changes)
    layout = RowLayout(tokens_per_microbatch=64)
    TrainingLoop(policy, ALGORITHM, config, layout, loop, max_new_tokens=32, seed=0).run()
    stream = policy.weights(dtype=torch.float32, include_mtp=True, bucket_bytes=1 << 20)
    weights = {name: tensor.numpy().copy() for name, tensor in stream}
    dist.barrier()
    taken = policy.steps_taken
    topology.finalise()
    return weights, rows, taken


def main(store: str, folder: Path) -> None:
    parallel = ParallelConfig(world_size=int(os.environ["WORLD_SIZE"]), expert=2)
    groups, rank = rollouts(), int(os.environ["RANK"])
    clean = [[without_broken(group) for group in step] for step in groups]
    broken_weights, _, _ = run(folder, parallel, groups[:2], f"{store}-0")
    clean_weights, _, _ = run(folder, parallel, clean[:2], f"{store}-1")
    _, rows, taken = run(folder, parallel, groups, f"{store}-2")
    # The first minibatch has nothing to check; random logprobs are no trainer's.
    try:
        run(folder, parallel, [groups[2][::-1]], f"{store}-3", mismatch_bound=0.0)
        gate = "passed"
    except MismatchError as error:
        gate = str(error)
    if rank == 0:
        found = {f"broken:{name}": value for name, value in broken_weights.items()}
        np.savez(
            folder / "found.npz", taken=taken, gate=gate, **found, **{f"clean:{k}": v for k, v in clean_weights.items()}
        )
        (folder / "metrics.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
