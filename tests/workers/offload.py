"""Worker: the same training twice, once with everything moved to host memory and back before each step.

usage: offload.py STORE FOLDER. Asserts on every rank that weights and what the steps say are equal bit for bit, that
memory was given back, and how much.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from megatron_r1.policy.platform import configure_process

configure_process(threads=1, cpu=True)

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from oracles import save_model  # noqa: E402

from megatron_r1.config import ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig  # noqa: E402
from megatron_r1.config.shape import load_shape  # noqa: E402
from megatron_r1.data.packing import RowLayout, pack  # noqa: E402
from megatron_r1.policy import topology  # noqa: E402
from megatron_r1.policy.offload import Offload  # noqa: E402
from megatron_r1.policy.policy import Policy  # noqa: E402
from megatron_r1.stages.sft.loss import sft_loss  # noqa: E402
from megatron_r1.types import TrainingSequence  # noqa: E402

STEPS = 3


def rows(seed: int, rank: int):
    rng = np.random.default_rng([seed, rank])
    made = []
    for _ in range(4):
        length = int(rng.integers(10, 50))
        mask = np.arange(length) >= 1
        weight = np.where(mask, 1.0 / (8 * mask.sum()), 0).astype(np.float32)
        ids = rng.integers(3, 101, length).astype(np.int32)
        made.append(TrainingSequence(token_ids=ids, loss_mask=mask, token_weight=weight))
    return pack(made, RowLayout(tokens_per_microbatch=256))[0]


def train(folder: Path, dtype: str, rank: int, *, move: bool):
    torch.manual_seed(5)
    policy = Policy(
        load_shape(folder),
        parallel=ParallelConfig(world_size=2, expert=2),
        train=TrainConfig(dtype=dtype),
        model=ModelConfig(path=folder, router_bias_update_rate=1e-3),
        optimizer=OptimizerConfig(lr=3e-3, min_lr=3e-3),
        total_steps=STEPS,
        device=torch.device("cpu"),
    )
    offload = Offload(policy, ("weights", "gradients", "optimizer"))
    said = []
    for step in range(STEPS):
        result = policy.step(rows(step, rank), sft_loss)
        said.append((result.loss, result.grad_norm))
        if not move:
            continue
        held = {part: sum(s.nbytes() for s in offload._storages(part)) for part in offload.parts}
        assert all(held.values())
        sizes = expected_sizes(policy, dtype)
        assert held["weights"] >= sizes["weights"] and held["gradients"] >= sizes["gradients"], (held, sizes)
        assert offload.to_host() == sum(held.values()) and offload.away == {"weights", "gradients", "optimizer"}
        assert all(not tensor.untyped_storage().nbytes() for tensor in weights_of(policy))
        assert offload.to_host() == 0  # it is there already
        assert offload.to_device(("weights",)) == held["weights"] and offload.away == {"gradients", "optimizer"}
        policy.logprobs(rows(step, rank))
        assert offload.to_device() == held["gradients"] + held["optimizer"] and not offload.away
    return policy, said


def weights_of(policy: Policy):
    return [local.tensor for local in policy.tensors.values()]


def expected_sizes(policy: Policy, dtype: str) -> dict[str, int]:
    """Bytes of this rank's weights, and of their gradients in fp32, but for what Megatron pads."""
    numbers = sum(tensor.numel() for tensor in weights_of(policy))
    trained = sum(tensor.numel() for tensor in weights_of(policy) if getattr(tensor, "main_grad", None) is not None)
    return {"weights": numbers * (4 if dtype == "fp32" else 2), "gradients": 4 * trained}


def main(store: str, folder: Path) -> None:
    rank = int(os.environ["RANK"])
    topology.initialise(ParallelConfig(world_size=2, expert=2), seed=1, cpu=True, store_path=store)
    if rank == 0:
        save_model("deepseek_v3", folder / "model", mtp_layers=1)
    dist.barrier()
    for dtype in ("fp32", "bf16"):
        stayed, said = train(folder / "model", dtype, rank, move=False)
        moved, said_moved = train(folder / "model", dtype, rank, move=True)
        assert said == said_moved, (said, said_moved)
        for name, local in stayed.tensors.items():
            assert torch.equal(local.tensor, moved.tensors[name].tensor), name
    topology.finalise()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
