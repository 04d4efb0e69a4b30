"""Worker, one rank: two steps in deterministic mode, twice. ROOT/found.npz gets the weights after each.

usage: deterministic.py STORE ROOT; ROOT/config.json is the model's.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from megatron_r1.policy.platform import configure_process

configure_process(threads=1, cpu=True, deterministic=True)

import checkpoint  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from trainer import groups, policy_of  # noqa: E402

from megatron_r1.config import OptimizerConfig  # noqa: E402


def main(store: str, root: Path) -> None:
    assert torch.are_deterministic_algorithms_enabled()
    found: dict[str, np.ndarray] = {}
    train, optimizer = replace(checkpoint.TRAIN, deterministic=True), OptimizerConfig(lr=1e-2)
    for run in ("first", "second"):
        with groups(f"{store}-{run}") as parallel:
            policy = policy_of(root, parallel, train=train, optimizer=optimizer, steps=2, initialise="random")
            for number in range(2):
                checkpoint.step(policy, parallel, number)
            found |= {f"{run} {name}": value for name, value in checkpoint.export(policy).items()}
    np.savez(root / "found.npz", **found)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
