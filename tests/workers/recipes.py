"""Worker: two optimizer steps of recipes' stages, made small, at their own settings; and without recomputation.

usage: recipes.py STORE FOLDER NAMES; NAMES are stages (recipe_stages.py), comma-separated. FOLDER/NAME.npz gets, for
"own" and "none" (train.recompute), what the steps reported and the weights after them.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from megatron_r1.policy.platform import configure_process

configure_process(threads=1, cpu=True)

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from recipe_stages import VOCAB, Stage, small_layout, small_shape, training_stages  # noqa: E402
from trainer import row_layout, rows_of  # noqa: E402

from megatron_r1.policy import topology  # noqa: E402
from megatron_r1.policy.policy import Policy  # noqa: E402
from megatron_r1.stages.grpo.config import GRPOConfig  # noqa: E402
from megatron_r1.stages.grpo.loss import policy_loss  # noqa: E402
from megatron_r1.stages.reward_model.config import RewardModelConfig  # noqa: E402
from megatron_r1.stages.reward_model.loss import value_loss  # noqa: E402
from megatron_r1.stages.sft.loss import sft_loss  # noqa: E402
from megatron_r1.types import TrainingSequence  # noqa: E402


def main(store: str, folder: Path, names: list[str]) -> None:
    for number, name in enumerate(names):
        config = training_stages()[name]
        parallel, found = small_layout(config.parallel), {}
        for recompute in dict.fromkeys((config.train.recompute, "none")):
            # Anew, so that both draw the same weights.
            topology.initialise(parallel, seed=1, cpu=True, store_path=f"{store}-{number}-{recompute}")
            found |= {f"{recompute}:{key}": value for key, value in steps(name, config, recompute).items()}
            if dist.get_rank() == 0:
                np.savez(folder / f"{name}.npz", **found)
            dist.barrier()
            topology.finalise()


def steps(name: str, config: Stage, recompute: str) -> dict[str, np.ndarray]:
    parallel = small_layout(config.parallel)
    policy = Policy(
        small_shape(name, config),
        parallel=parallel,
        train=dataclasses.replace(
            config.train, recompute=recompute, tokens_per_microbatch=128, logprob_chunk_tokens=48
        ),  # pyright: ignore[reportArgumentType]
        model=dataclasses.replace(config.model, initialise="random", load_from=None),
        optimizer=dataclasses.replace(config.optimizer, warmup_steps=0),
        total_steps=10,
        device=torch.device("cpu"),
    )
    layout = row_layout(parallel)
    loss = sft_loss
    if isinstance(config, GRPOConfig):
        loss = policy_loss(config.algorithm, own_is_old=False)
    elif isinstance(config, RewardModelConfig):
        loss = value_loss
    results = [policy.step(rows_of(sequences(seed), layout), loss) for seed in range(2)]
    weights = {
        key: value.float().numpy().copy()
        for key, value in policy.weights(dtype=torch.float32, include_mtp=True, bucket_bytes=1 << 20)
    }
    return weights | {
        "skipped": np.array([result.skipped for result in results]),
        "loss": np.array([result.loss for result in results]),
        "grad_norm": np.array([result.grad_norm for result in results]),
    }


def sequences(seed: int) -> list[TrainingSequence]:
    rng = np.random.default_rng(seed)
    made = []
    for length in (50, 31, 64, 17, 40, 8):
        mask = np.arange(length) >= 3
        logprobs = np.where(mask, rng.normal(-4.5, 0.2, length), 0).astype(np.float32)
        made.append(
            TrainingSequence(
                token_ids=rng.integers(0, VOCAB, length).astype(np.int32),
                loss_mask=mask,
                token_weight=np.where(mask, 1 / (6 * mask.sum()), 0).astype(np.float32),
                advantage=float(rng.normal()),
                behaviour_logprobs=logprobs,
                old_logprobs=logprobs,
                reference_logprobs=logprobs,
            )
        )
    return made


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3].split(","))
