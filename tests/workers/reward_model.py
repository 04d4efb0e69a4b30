"""Worker: train_pairs on reward models under several layouts of one number of ranks, and the whole stage once.

usage: reward_model.py STORE FOLDER NAMES; NAMES are MODEL-LAYOUT or stage, comma-separated. FOLDER/MODEL holds a
sequence classifier and pairs.npz. FOLDER/NAME.npz gets each sequence's value before and after train_pairs, the
gradients of that under Hugging Face names, what it returns, and how the pairs were packed. `stage` trains FOLDER/base
on FOLDER/pairs.jsonl as FOLDER/stage.json says, into FOLDER/run.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from megatron_r1.policy.platform import configure_process

configure_process(threads=1, cpu=True)

import layouts  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from trainer import groups, policy_of  # noqa: E402

from megatron_r1.config import ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig  # noqa: E402
from megatron_r1.config.shape import load_shape  # noqa: E402
from megatron_r1.data.packing import pack  # noqa: E402
from megatron_r1.data.preferences import _valued  # noqa: E402
from megatron_r1.policy import topology  # noqa: E402
from megatron_r1.stages.common.trainer import row_layout  # noqa: E402
from megatron_r1.stages.reward_model.config import PairDataConfig, RewardModelConfig, validate_reward_model  # noqa: E402
from megatron_r1.stages.reward_model.loss import train_pairs, values_of  # noqa: E402
from megatron_r1.stages.reward_model.run import run_reward_model  # noqa: E402

LAYOUTS = layouts.LAYOUTS | {"tp2nosp": {"tensor": 2}}
TRAIN = TrainConfig(dtype="fp32", tokens_per_microbatch=96)


def main(store: str, folder: Path, names: list[str]) -> None:
    for number, name in enumerate(names):
        model, _, layout = name.partition("-")
        with groups(f"{store}-{number}", **LAYOUTS[layout or "tp2"]) as parallel:
            found = measure(folder / model, parallel) if layout else run_stage(folder, parallel)
            if dist.get_rank() == 0:
                np.savez(folder / f"{name}.npz", **found)


def measure(folder: Path, parallel: ParallelConfig) -> dict[str, np.ndarray]:
    optimizer = OptimizerConfig(lr=1e-3, min_lr=1e-3, clip_grad=0.0, distributed=False)
    config = RewardModelConfig(
        name="test",
        run_dir=folder,
        model=ModelConfig(path=folder),
        data=PairDataConfig(),
        parallel=parallel,
        train=TRAIN,
        optimizer=optimizer,
    )
    policy = policy_of(folder, parallel, train=TRAIN, optimizer=optimizer, steps=10)
    stored = np.load(folder / "pairs.npz")
    sequences = [_valued(stored[str(i)]) for i in range(len(stored))]
    layout = row_layout(config, 0, vocab_size=load_shape(folder).vocab_size)
    values = values_of(policy, sequences, layout)
    result = train_pairs(policy, sequences, layout)
    # Gradients are kept until the next step begins; without clipping the optimizer leaves them as they are.
    gradients = {
        name: local.tensor.main_grad.clone()
        for name, local in policy._tensors.items()
        if hasattr(local.tensor, "main_grad")
    }
    found = {f"gradient:{name}": value for name, value in layouts.full(policy, gradients).items()}
    after = values_of(policy, sequences, layout)
    _, ranks = topology.data_parallel()
    places = {
        index: (rank, number)
        for rank, rows in enumerate(pack(sequences, layout, num_ranks=ranks))
        for number, row in enumerate(rows)
        for index in row.sequence_indices
    }
    return found | {
        "loss": np.array(result.loss),
        "accuracy": np.array(result.accuracy),
        "margin": np.array(result.margin),
        "grad_norm": np.array(result.step.grad_norm),
        "after": after,
        "places": np.array([places[index] for index in range(len(sequences))]),
        "values": values,
    }


def run_stage(folder: Path, parallel: ParallelConfig) -> dict[str, np.ndarray]:
    fields = json.loads((folder / "stage.json").read_text())
    config = RewardModelConfig(
        name="harmless",
        run_dir=folder / "run",
        model=ModelConfig(path=folder / "base"),
        data=PairDataConfig(files=(folder / "pairs.jsonl",), **fields),
        device="cpu",
        parallel=parallel,
        train=dataclasses.replace(TRAIN, tokens_per_microbatch=256),
        optimizer=OptimizerConfig(lr=3e-3, min_lr=3e-3),
        save_dtype="fp32",
    )
    shape = validate_reward_model(config, folder=False)
    config.run_dir.mkdir(exist_ok=True)
    summary = run_reward_model(config, shape, torch.device("cpu"))
    return {"steps": np.array(summary["steps"])}


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3].split(","))
