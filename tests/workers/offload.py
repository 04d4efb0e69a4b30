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
from trainer import groups, policy_of, random_sequences  # noqa: E402

from megatron_r1.config import OptimizerConfig, ParallelConfig, TrainConfig  # noqa: E402
from megatron_r1.data.packing import RowLayout, pack  # noqa: E402
from megatron_r1.policy.offload import Offload  # noqa: E402
from megatron_r1.policy.policy import Policy  # noqa: E402
from megatron_r1.stages.sft.loss import sft_loss  # noqa: E402

STEPS = 3
OPTIMIZER = OptimizerConfig(lr=3e-3, min_lr=3e-3)


def rows(seed: int, rank: int):
    made = random_sequences(np.random.default_rng([seed, rank]), 4, (10, 50), prompt=1, least_id=3, share=8)
    return pack(made, RowLayout(tokens_per_microbatch=256))[0]


def train(folder: Path, parallel: ParallelConfig, dtype: str, rank: int, *, move: bool):
    torch.manual_seed(5)
    policy = policy_of(
        folder, parallel, train=TrainConfig(dtype=dtype), optimizer=OPTIMIZER, steps=STEPS, router_bias_update_rate=1e-3
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
    with groups(store, expert=2) as parallel:
        if rank == 0:
            save_model("deepseek_v3", folder / "model", mtp_layers=1)
        dist.barrier()
        for dtype in ("fp32", "bf16"):
            stayed, said = train(folder / "model", parallel, dtype, rank, move=False)
            moved, said_moved = train(folder / "model", parallel, dtype, rank, move=True)
            assert said == said_moved, (said, said_moved)
            for name, local in stayed.tensors.items():
                assert torch.equal(local.tensor, moved.tensors[name].tensor), name


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
