"""Worker: routing replay under several layouts of the same number of ranks.

usage: replay.py STORE FOLDER NAMES; FOLDER holds a model and replayed.npz (tests/replay_oracle.py). A name is a layout
of workers/layouts.py, or one with -mtp behind it: MTP layers are trained too. For each FOLDER/NAME.npz gets logprobs
and gradients with the routes replayed, without and with recomputation, and the shares of routes that differ.
"""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_r1.policy.platform import configure_process

configure_process(threads=1, cpu=True)

import numpy as np  # noqa: E402
import torch.distributed as dist  # noqa: E402
from layouts import LAYOUTS, full, merge  # noqa: E402
from trainer import groups, policy_of, row_layout, rows_of  # noqa: E402

from megatron_r1.config import OptimizerConfig, ParallelConfig  # noqa: E402
from megatron_r1.data.packing import unpack  # noqa: E402
from megatron_r1.model.policy_model import TokenScores  # noqa: E402
from megatron_r1.policy.batch import DeviceBatch  # noqa: E402
from megatron_r1.policy.policy import LossOutput, Policy  # noqa: E402
from megatron_r1.stages.sft.loss import mtp_loss  # noqa: E402
from megatron_r1.types import PackedMicrobatch, TrainingSequence  # noqa: E402


def main(store: str, folder: Path, names: list[str]) -> None:
    optimizer = OptimizerConfig(distributed=False)
    for number, name in enumerate(names):
        layout, _, mtp = name.partition("-")
        with groups(f"{store}-{number}", **LAYOUTS[layout]) as parallel:
            policy = policy_of(folder, parallel, optimizer=optimizer, train_mtp=bool(mtp), replay_routes=True)
            found = measure(policy, parallel, folder)
            if dist.get_rank() == 0:
                np.savez(folder / f"{name}.npz", **found)


def measure(policy: Policy, parallel: ParallelConfig, folder: Path) -> dict[str, np.ndarray]:
    stored = np.load(folder / "replayed.npz")
    lengths = [len(stored[f"{i}.token_ids"]) for i in range(int(stored["count"]))]
    rows = stored_rows(stored, parallel, "routes")
    scored = merge(unpack(rows, policy.logprobs(rows), lengths))
    found = {f"logprobs_{i}": value for i, value in scored.items()}
    found["differ"] = shares(policy)
    found |= {f"gradient:{name}": value for name, value in full(policy, policy.gradients(rows, loss)).items()}
    found["differ_in_training"] = shares(policy)
    policy.config.recompute_granularity = "full"
    policy.config.recompute_method, policy.config.recompute_num_layers = "uniform", 1
    found |= {f"recomputed:{name}": value for name, value in full(policy, policy.gradients(rows, loss)).items()}
    policy.config.recompute_granularity = None
    policy.refresh_reference()
    with policy.reference_weights():
        reference = policy.logprobs(rows)
    plain = [row.routes for row in rows]
    assert any(routes is not None for routes in plain) or not any(row.loss_mask.any() for row in rows)
    own = policy.logprobs(stored_rows(stored, parallel, ""))
    found["reference_as_without_routes"] = np.array(
        all(np.array_equal(a, b) for a, b in zip(reference, own, strict=True))
    )
    natural = policy.logprobs(stored_rows(stored, parallel, "natural"))
    found["natural_differ"] = shares(policy)
    found["natural_moves"] = np.array(max(float(np.abs(a - b).max()) for a, b in zip(natural, own, strict=True)))
    return found


def shares(policy: Policy) -> np.ndarray:
    return np.array(list(policy.routes_differ().values()))


def stored_rows(stored, parallel: ParallelConfig, name: str) -> list[PackedMicrobatch]:
    """This rank's rows, their routes those stored as `name`."""
    sequences = []
    for i in range(int(stored["count"])):
        weight = stored[f"{i}.weight"]
        routes = stored.get(f"{i}.{name}")
        ids = stored[f"{i}.token_ids"]
        sequences.append(TrainingSequence(token_ids=ids, loss_mask=weight != 0, token_weight=weight, routes=routes))
    return rows_of(sequences, row_layout(parallel))


def loss(scores: TokenScores, batch: DeviceBatch) -> LossOutput:
    """-sum_t weight_t * logprob_t."""
    total = -(batch.token_weight * scores.logprobs).where(batch.loss_mask, 0.0).sum()
    return LossOutput(total + mtp_loss(scores), {})


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3].split(","))
