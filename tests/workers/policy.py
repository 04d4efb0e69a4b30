"""Worker: Policy as a trainer sees it, on one or two ranks. Results go to ROOT/found.npz (rank 0).

usage: policy.py STORE ROOT; ROOT holds a DeepSeek-V3 folder with one MTP layer.
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
from safetensors.torch import load_file, save_file  # noqa: E402
from trainer import groups, policy_of, random_sequences, rows_of  # noqa: E402

from megatron_r1.algorithms import CISPO  # noqa: E402
from megatron_r1.config import OptimizerConfig, ParallelConfig  # noqa: E402
from megatron_r1.data.packing import RowLayout, pack  # noqa: E402
from megatron_r1.errors import CheckpointError  # noqa: E402
from megatron_r1.policy.batch import to_device  # noqa: E402
from megatron_r1.policy.policy import LossOutput, Policy  # noqa: E402
from megatron_r1.stages.grpo.loss import policy_loss  # noqa: E402
from megatron_r1.stages.sft.loss import sft_loss  # noqa: E402
from megatron_r1.types import TrainingSequence  # noqa: E402

LAYOUT = RowLayout(tokens_per_microbatch=128, row_multiple=2)


def sequences(count: int, seed: int) -> list[TrainingSequence]:
    return random_sequences(np.random.default_rng(seed), count, (8, 60), prompt=2, least_id=0, share=count)


def build(root: Path, parallel: ParallelConfig, *, train_mtp: bool = False, **optimizer: object) -> Policy:
    return policy_of(root, parallel, optimizer=OptimizerConfig(**optimizer), steps=10, train_mtp=train_mtp)


def snapshot(policy: Policy) -> dict[str, np.ndarray]:
    stream = policy.weights(dtype=torch.float32, include_mtp=True, bucket_bytes=1 << 16)
    return {name: tensor.numpy().copy() for name, tensor in stream}


def main(store: str, root: Path, *, mtp_alone: bool) -> None:
    ranks = int(os.environ["WORLD_SIZE"])
    with groups(store, expert=ranks) as parallel:
        found = mtp_scores(root, parallel)
        if not mtp_alone:
            found |= train_four_steps(root, parallel)
            found |= reference_round_trip(root, parallel)
            found |= broken_gradient(root, parallel)
            found |= missing_mtp(root, parallel)
        if dist.get_rank() == 0:
            np.savez(root / f"found{ranks}.npz", **found)


def train_four_steps(root: Path, parallel: ParallelConfig) -> dict[str, np.ndarray]:
    """Four supervised steps with and without the sharded optimizer; the weights after, and what the steps reported."""
    found = {}
    for name, distributed in (("plain", False), ("sharded", True)):
        policy = build(
            root, parallel, lr=1e-3, min_lr=1e-4, schedule="linear", distributed=distributed, weight_decay=0.1
        )
        results = [policy.step(rows_of(sequences(6, seed), LAYOUT), sft_loss) for seed in range(4)]
        found |= {f"{name}:{key}": value for key, value in snapshot(policy).items()}
        found[f"{name}.loss"] = np.array([result.loss for result in results])
        found[f"{name}.grad_norm"] = np.array([result.grad_norm for result in results])
        found[f"{name}.rate"] = np.array([result.learning_rate for result in results])
    return found


def mtp_scores(root: Path, parallel: ParallelConfig) -> dict[str, np.ndarray]:
    policy = build(root, parallel, train_mtp=True, distributed=False)
    batch = [sequences(2, 11)[0], sequences(2, 11)[1]]
    row = pack(batch, LAYOUT)[0][0]
    device = to_device(row, torch.device("cpu"))
    chunk = policy.chunks[0].train()
    scores = chunk(
        device.token_ids, device.position_ids, None, labels=device.labels, packed_seq_params=device.packed,
        loss_mask=device.token_weight,
    )  # fmt: skip
    gradients = policy.gradients([row], sft_loss)
    # Under any algorithm they learn with no regard to the advantage, which is zero here.
    grpo = policy.gradients([row], policy_loss(CISPO(), own_is_old=True))
    order = [index for index in row.sequence_indices]
    return {
        "mtp.logprobs": scores.mtp_logprobs[0].detach().numpy(),
        "mtp.weights": scores.mtp_weights[0].numpy(),
        "mtp.order": np.array(order),
        "mtp.cu_seqlens": row.cu_seqlens,
        "mtp.eh_proj_gradient": np.array(float(gradients["mtp.layers.0.eh_proj.weight"].norm())),
        "mtp.eh_proj_gradient.grpo": np.array(float(grpo["mtp.layers.0.eh_proj.weight"].norm())),
        "mtp.names": np.array(sorted(snapshot(policy))),
    } | {f"mtp.ids{i}": sequence.token_ids for i, sequence in enumerate(batch)}


def reference_round_trip(root: Path, parallel: ParallelConfig) -> dict[str, np.ndarray]:
    policy = build(root, parallel, lr=1e-2, min_lr=1e-2)
    rows = rows_of(sequences(4, 3), LAYOUT)
    policy.refresh_reference()
    start = policy.logprobs(rows)
    policy.step(rows, sft_loss)
    moved, before = policy.logprobs(rows), snapshot(policy)
    with policy.reference_weights():
        reference = policy.logprobs(rows)
    after = snapshot(policy)
    return {
        "reference_is_start": np.array(all(np.array_equal(a, b) for a, b in zip(start, reference, strict=True))),
        "policy_moved": np.array(max(float(np.abs(a - b).max()) for a, b in zip(start, moved, strict=True))),
        "weights_restored": np.array(all(np.array_equal(before[name], after[name]) for name in before)),
    }


def broken_gradient(root: Path, parallel: ParallelConfig) -> dict[str, np.ndarray]:
    """A loss that is infinite on one rank's row only: the step must change nothing, on every rank."""
    policy = build(root, parallel, lr=1e-2, min_lr=1e-2)
    before = snapshot(policy)

    def loss(scores, batch):
        factor = float("inf") if dist.get_rank() == 0 else 1.0
        return LossOutput(-(scores.logprobs * batch.token_weight).sum() * factor, {})

    result = policy.step(rows_of(sequences(4, 3), LAYOUT), loss)
    after = snapshot(policy)
    same = all(np.array_equal(before[name], after[name]) for name in before)
    again = policy.step(rows_of(sequences(4, 3), LAYOUT), sft_loss)
    moved = snapshot(policy)
    nothing = policy.skip_step()
    rested = snapshot(policy)
    return {
        "rested": np.array(
            nothing.skipped
            and policy.steps_taken == 3
            and all(np.array_equal(moved[name], rested[name]) for name in moved)
        ),
        "skipped": np.array(result.skipped),
        "unchanged": np.array(same),
        "next_step_works": np.array(not again.skipped and np.isfinite(again.loss)),
    }


def missing_mtp(root: Path, parallel: ParallelConfig) -> dict[str, np.ndarray]:
    """What is said of a folder that lacks a part of the MTP layer of its config.json."""
    folder = root / f"bare-{dist.get_world_size()}-{dist.get_rank()}"
    folder.mkdir()
    (folder / "config.json").write_bytes((root / "config.json").read_bytes())
    whole = load_file(root / "model.safetensors")
    kept = {name: tensor for name, tensor in whole.items() if "layers.4.enorm" not in name}
    save_file(kept, folder / "model.safetensors")
    try:
        build(folder, parallel)
    except CheckpointError as error:
        return {"missing_mtp": np.array(str(error))}
    raise AssertionError("a layer that is not there was loaded")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), mtp_alone=sys.argv[3:] == ["mtp"])
