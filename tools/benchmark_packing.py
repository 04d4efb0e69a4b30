"""Packed against padded training on a mixed-length batch: same loss, how much faster.

usage: python tools/benchmark_packing.py [--sequences 48] [--repeats 5] [--json OUT]

Lengths are log-uniform between 16 and 512. Padded: every sequence takes a segment of 512.
Interleaved, medians, one rank.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

from megatron_r1.config import ParallelConfig, load_shape
from megatron_r1.policy.platform import configure_process
from megatron_r1.recipes.tiny import tiny

LONGEST, SHORTEST = 512, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    configure_process(threads=len(os.sched_getaffinity(0)), cpu=True)
    result = measure(arguments.sequences, arguments.repeats)
    print("| training | seconds a step | tokens computed | loss |\n| --- | --- | --- | --- |")
    for name in ("packed", "padded"):
        row = result[name]
        print(f"| {name} | {row['seconds']:.3f} | {row['tokens']:,} | {row['loss']:.6f} |")
    print(f"\npacked is {result['speedup']:.2f}x as fast ({result['trained']:,} tokens to train on)")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def measure(count: int, repeats: int) -> dict:
    import numpy as np
    import torch

    from megatron_r1.data.packing import RowLayout, pack_rank
    from megatron_r1.policy import topology
    from megatron_r1.stages.common.trainer import build_policy
    from megatron_r1.stages.sft.loss import sft_loss
    from megatron_r1.types import TrainingSequence

    config = tiny()
    topology.initialise(ParallelConfig(), seed=0, cpu=True)
    shape = load_shape(config.model.path)
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.uniform(np.log(SHORTEST), np.log(LONGEST), count)).astype(int)
    sequences = [
        TrainingSequence(
            token_ids=rng.integers(3, shape.vocab_size, length).astype(np.int32),
            loss_mask=np.arange(length) > 0,
            token_weight=np.where(np.arange(length) > 0, 1.0 / (count * (length - 1)), 0).astype(np.float32),
        )
        for length in lengths
    ]
    config = config.__class__(
        name="packing", run_dir=config.run_dir, model=config.model, parallel=ParallelConfig(), train=config.train
    )
    policy = build_policy(
        config,
        shape,
        torch.device("cpu"),
        model=config.model,
        total_steps=10**6,
        temperature=1.0,
    )
    layouts = {
        "packed": RowLayout(tokens_per_microbatch=4096),
        "padded": RowLayout(tokens_per_microbatch=4096, segment_multiple=LONGEST),
    }
    rows = {name: pack_rank(sequences, layout, rank=0, num_ranks=1) for name, layout in layouts.items()}
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    # Gradients only, so that both sides see the same weights and their losses can be compared.
    losses = {name: sum_loss(policy, rows[name], sft_loss) for name in rows}
    for _ in range(repeats):
        for name, own in rows.items():
            begun = time.perf_counter()
            policy.gradients(own, sft_loss)
            seconds[name].append(time.perf_counter() - begun)
    topology.finalise()
    result = {
        name: {
            "seconds": statistics.median(seconds[name]),
            "tokens": sum(row.num_tokens for row in rows[name]),
            "loss": losses[name],
        }
        for name in rows
    }
    speedup = statistics.median(b / a for a, b in zip(seconds["packed"], seconds["padded"], strict=True))
    return result | {"speedup": speedup, "trained": int(lengths.sum())}


def sum_loss(policy, rows, loss) -> float:
    """The loss of the rows, from their logprobs: -sum of weight times logprob."""
    values = policy.logprobs(rows)
    return float(sum(-(row.token_weight[0] * value).sum() for row, value in zip(rows, values, strict=True)))


if __name__ == "__main__":
    main()
