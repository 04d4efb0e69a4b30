"""Worker: train a little under each layout, push to one vLLM server, and ask both for their opinion of fixed sequences.

usage: sync.py STORE ROOT NAMES. For each layout: k optimizer steps, push, then logprobs by the synced server and by
Megatron (ROOT/sync_NAME.npz), and the export (ROOT/exported_NAME) for an engine started afresh (fresh.py). The layout
called one is rank 0's alone, a world of one process; the others meanwhile wait for it to join the next.
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
from trainer import random_sequences  # noqa: E402

from megatron_r1.config import (  # noqa: E402
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    SamplingConfig,
    TrainConfig,
)
from megatron_r1.config.shape import load_shape  # noqa: E402
from megatron_r1.data.packing import RowLayout, pack, unpack  # noqa: E402
from megatron_r1.engines.vllm.server import start_engines  # noqa: E402
from megatron_r1.engines.vllm.sync import WeightSync  # noqa: E402
from megatron_r1.policy import topology  # noqa: E402
from megatron_r1.policy.policy import Policy  # noqa: E402
from megatron_r1.stages.sft.loss import sft_loss  # noqa: E402
from megatron_r1.types import TrainingSequence  # noqa: E402
from megatron_r1.weights.save import save_hf_folder  # noqa: E402

LAYOUTS = {
    "one": {},
    "tp2": {"tensor": 2, "sequence": True, "expert_tensor": 2},
    "ep2": {"expert": 2},
    "pp2": {"pipeline_parallel": 2},
}
ROLLOUT = RolloutConfig(
    device="cpu", sync="ipc", dtype="fp32", max_model_len=96, max_num_seqs=16, memory_fraction=0.3,
    kv_cache_gib=0.25, enforce_eager=True, sync_bucket_mib=1, start_timeout_seconds=180,
    sampling=SamplingConfig(max_new_tokens=16),
)  # fmt: skip
STEPS = 3


def sequences(seed: int) -> list[TrainingSequence]:
    return random_sequences(np.random.default_rng(seed), 6, (10, 60), prompt=1, least_id=3, share=6)


def main(store: str, root: Path, names: list[str]) -> None:
    is_first, world = int(os.environ["RANK"]) == 0, os.environ["WORLD_SIZE"]
    engines = start_engines(ROLLOUT, model_path=root, run_dir=root / f"run_{names[0]}") if is_first else ()
    try:
        for number, name in enumerate(names):
            if name == "one" and not is_first:
                continue
            os.environ["WORLD_SIZE"] = "1" if name == "one" else world
            parallel = ParallelConfig(world_size=int(os.environ["WORLD_SIZE"]), **LAYOUTS[name])
            topology.initialise(parallel, seed=1, cpu=True, store_path=f"{store}-{number}")
            one_layout(root, name, parallel, engines, version=number + 1)
            topology.finalise()
    finally:
        for engine in engines:
            engine.stop()


def one_layout(root: Path, name: str, parallel: ParallelConfig, engines, version: int) -> None:
    policy = Policy(
        load_shape(root),
        parallel=parallel,
        train=TrainConfig(dtype="fp32"),
        model=ModelConfig(path=root),
        optimizer=OptimizerConfig(lr=3e-3, min_lr=3e-3),
        total_steps=STEPS,
        device=torch.device("cpu"),
    )
    rank, ranks = topology.data_parallel()
    layout = RowLayout(tokens_per_microbatch=128, row_multiple=2)
    for step in range(STEPS):
        policy.step(pack(sequences(step), layout, num_ranks=ranks)[rank], sft_loss)
    fixed = sequences(99)
    rows = pack(fixed, layout)[0]
    trainer = unpack(rows, policy.logprobs(rows * ranks)[: len(rows)], [len(s) for s in fixed])
    source = policy.weights(dtype=torch.float32, bucket_bytes=1 << 18)
    sync = WeightSync(ROLLOUT, source=source, engines=engines, model_path=root, rank=dist.get_rank())
    before = [engine.client.score(fixed[0].token_ids) for engine in engines]
    sync.push(version)
    exported = root / f"exported_{name}"
    save_hf_folder(policy.weights(dtype=torch.float32, include_mtp=True), root, exported)
    if dist.get_rank() == 0:
        found = {f"trainer_{i}": trainer[i] for i in range(len(fixed))}
        found |= {f"synced_{i}": engines[0].client.score(s.token_ids) for i, s in enumerate(fixed)}
        sampled = engines[0].client.generate(
            fixed[0].token_ids[:8], num_completions=2, sampling=ROLLOUT.sampling, seed=1
        )
        found["version"] = np.array(sampled[0].weight_version)
        found["before_0"] = before[0]
        np.savez(root / "fixed.npz", *[s.token_ids for s in fixed])
        np.savez(root / f"sync_{name}.npz", **found)
    sync.close()
    dist.barrier()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3].split(","))
