"""Measure how many of the weights that go to the servers change their bits in an optimizer step.

usage: python tools/measure_delta.py FOLDER [--lr 1e-6 1e-5 1e-4] [--steps 4] [--sequences 8] [--tokens 128]

FOLDER is a Hugging Face folder; without weights it gets random ones. Each learning rate trains it anew with Adam, on
random tokens, one half pushed up and one down (as GRPO's advantages do); after each step the weights, as they would be
sent in bf16, are compared with the last ones. Prints the share that is alike, by learning rate and step.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_r1.config import ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig
from megatron_r1.config.shape import load_shape
from megatron_r1.policy.platform import configure_process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-6, 1e-5, 1e-4])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    arguments = parser.parse_args()
    configure_process(threads=2, cpu=True)
    from megatron_r1.policy import topology

    topology.initialise(ParallelConfig(), seed=1, cpu=True)
    columns = " | ".join(f"step {step + 1}" for step in range(arguments.steps))
    print(f"| {arguments.folder.name}, learning rate | {columns} |\n|{' --- |' * (arguments.steps + 1)}")
    for lr in arguments.lr:
        shares = " | ".join(f"{share:.1%}" for share in alike(arguments, lr))
        print(f"| {lr:g} | {shares} |", flush=True)
    topology.finalise()


def alike(arguments: argparse.Namespace, lr: float) -> list[float]:
    """The share of bf16 weights that each step leaves as they were."""
    import torch

    from megatron_r1.data.packing import RowLayout, pack
    from megatron_r1.policy.policy import Policy
    from megatron_r1.stages.sft.loss import sft_loss

    has_weights = any(arguments.folder.glob("*.safetensors"))
    policy = Policy(
        load_shape(arguments.folder),
        parallel=ParallelConfig(),
        train=TrainConfig(dtype="bf16"),
        model=ModelConfig(path=arguments.folder, initialise="weights" if has_weights else "random"),
        optimizer=OptimizerConfig(lr=lr, min_lr=lr, warmup_steps=0),
        total_steps=arguments.steps,
        device=torch.device("cpu"),
    )
    layout = RowLayout(tokens_per_microbatch=arguments.tokens, row_multiple=1)
    stream, shares = policy.weights(dtype=torch.bfloat16), []
    before = {name: tensor.clone() for name, tensor in stream}
    for step in range(arguments.steps):
        policy.step(pack(list(sequences(arguments, step)), layout, num_ranks=1)[0], sft_loss)
        after = {name: tensor.clone() for name, tensor in stream}
        same = sum(int((before[name] == tensor).sum()) for name, tensor in after.items())
        shares.append(same / sum(tensor.numel() for tensor in after.values()))
        before = after
    return shares


def sequences(arguments: argparse.Namespace, step: int):
    import numpy as np

    from megatron_r1.types import TrainingSequence

    vocabulary = load_shape(arguments.folder).vocab_size
    random = np.random.default_rng(step)
    for number in range(arguments.sequences):
        mask = np.arange(arguments.tokens) >= arguments.tokens // 4
        sign = 1.0 if number % 2 else -1.0
        yield TrainingSequence(
            token_ids=random.integers(3, vocabulary, arguments.tokens).astype(np.int32),
            loss_mask=mask,
            token_weight=np.where(mask, sign / mask.sum() / arguments.sequences, 0).astype(np.float32),
        )


if __name__ == "__main__":
    main()
