"""Worker: train, save and go on, under several layouts of one number of ranks.

usage: checkpoint.py STORE FOLDER JOB..., on a GPU with WORKER_DEVICE=cuda in the environment. FOLDER/config.json is the
model's. A job is LAYOUT:save (two steps, FOLDER/saved-LAYOUT, two more) or LAYOUT:SAVED (other random weights,
FOLDER/saved-SAVED, two steps). FOLDER/JOB.npz gets the weights after saving or loading and at the end, and the
reference policy's at the end, in fp32 under Hugging Face names.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from megatron_r1.policy.platform import configure_process

CPU = os.environ.get("WORKER_DEVICE", "cpu") == "cpu"
configure_process(threads=1, cpu=CPU)

import layouts  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from trainer import row_layout, rows_of  # noqa: E402

from megatron_r1.agreement import on_rank_zero  # noqa: E402
from megatron_r1.config import ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig  # noqa: E402
from megatron_r1.config.shape import load_shape  # noqa: E402
from megatron_r1.policy import topology  # noqa: E402
from megatron_r1.policy.checkpoint import load_policy, take_snapshot  # noqa: E402
from megatron_r1.policy.policy import Policy  # noqa: E402
from megatron_r1.stages.sft.loss import sft_loss  # noqa: E402
from megatron_r1.types import TrainingSequence  # noqa: E402

TRAIN = TrainConfig(dtype="fp32", tokens_per_microbatch=64)
# Adam divides by the gradient's size; with a large eps, rounding of gradients changes the weights in proportion.
OPTIMIZER = OptimizerConfig(lr=1e-2, min_lr=5e-3, schedule="cosine", eps=0.1)


def main(
    store: str,
    folder: Path,
    jobs: list[str],
    *,
    train: TrainConfig = TRAIN,
    optimizer: OptimizerConfig = OPTIMIZER,
    check: Callable[[Policy], None] = lambda _: None,
) -> None:
    """`check` looks at the policy at the end of each job."""
    for number, job in enumerate(jobs):
        layout, _, start = job.partition(":")
        parallel = ParallelConfig(world_size=int(os.environ["WORLD_SIZE"]), **layouts.LAYOUTS[layout])
        topology.initialise(parallel, seed=1 if start == "save" else 2, cpu=CPU, store_path=f"{store}-{number}")
        policy = Policy(
            load_shape(folder),
            parallel=parallel,
            train=train,
            model=ModelConfig(path=folder, initialise="random", router_bias_update_rate=1e-3),
            optimizer=optimizer,
            total_steps=4,
            device=torch.device("cpu" if CPU else "cuda"),
        )
        if start == "save":
            step(policy, parallel, 0)
            policy.refresh_reference()
            step(policy, parallel, 1)
            target = folder / f"saved-{layout}"
            on_rank_zero(target.mkdir)
            take_snapshot(policy).write(target)
            dist.barrier()
        else:
            load_policy(policy, folder / f"saved-{start}")
            assert policy.steps_taken == 2
        middle = {f"middle {name}": array for name, array in export(policy).items()}
        step(policy, parallel, 2)
        step(policy, parallel, 3)
        check(policy)
        found = middle | export(policy)
        with policy.reference_weights():
            found |= {f"reference {name}": array for name, array in export(policy).items()}
        if dist.get_rank() == 0:
            np.savez(folder / f"{layout}-{start}.npz", **found)
        dist.barrier()
        topology.finalise()


def step(policy: Policy, parallel: ParallelConfig, number: int) -> None:
    """One optimizer step on sequences that depend on the step's number only."""
    rng = np.random.default_rng(number)
    sequences = []
    for length in rng.integers(6, 30, 12):
        trained = np.arange(length) > 2
        weight = np.where(trained, 1 / 200, 0.0).astype(np.float32)
        tokens = rng.integers(0, 100, length).astype(np.int32)
        sequences.append(TrainingSequence(token_ids=tokens, loss_mask=trained, token_weight=weight))
    policy.step(rows_of(sequences, row_layout(parallel, tokens=64)), sft_loss)


def export(policy: Policy) -> dict[str, np.ndarray]:
    return {name: tensor.float().cpu().numpy().copy() for name, tensor in policy.weights(dtype=torch.float32)}


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
