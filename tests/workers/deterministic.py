"""Worker, one rank: two steps in deterministic mode, twice. ROOT/found.npz gets the weights after each.

usage: deterministic.py STORE ROOT; ROOT/config.json is the model's.
"""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_r1.policy.platform import configure_process

configure_process(threads=1, cpu=True, deterministic=True)

import checkpoint  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

from megatron_r1.config import ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig  # noqa: E402
from megatron_r1.config.shape import load_shape  # noqa: E402
from megatron_r1.policy import topology  # noqa: E402
from megatron_r1.policy.policy import Policy  # noqa: E402


def main(store: str, root: Path) -> None:
    assert torch.are_deterministic_algorithms_enabled()
    found: dict[str, np.ndarray] = {}
    parallel = ParallelConfig()
    for run in ("first", "second"):
        topology.initialise(parallel, seed=1, cpu=True, store_path=f"{store}-{run}")
        policy = Policy(
            load_shape(root),
            parallel=parallel,
            train=TrainConfig(dtype="fp32", tokens_per_microbatch=64, deterministic=True),
            model=ModelConfig(path=root, initialise="random"),
            optimizer=OptimizerConfig(lr=1e-2),
            total_steps=2,
            device=torch.device("cpu"),
        )
        for number in range(2):
            checkpoint.step(policy, parallel, number)
        found |= {f"{run} {name}": value for name, value in checkpoint.export(policy).items()}
        topology.finalise()
    np.savez(root / "found.npz", **found)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
