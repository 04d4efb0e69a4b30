"""Worker: push folders' weights from trainers of several layouts into servers, and ask those for their checksums.

usage: reshard.py STORE ROOT DTYPE TENSOR SERVERS NAMES. Servers are started from ROOT/a; each layout of NAMES loads
ROOT/b or ROOT/a in turn, and pushes. ROOT/found_NAMES.json: by layout, the folder, the trainer's layout, each server's
checksums, and the bytes that the plan has into each worker; under "fresh", by folder, the checksums of a server that
was started from it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from megatron_r1.policy.platform import configure_process

configure_process(threads=1, cpu=True)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from megatron_r1.config import (  # noqa: E402
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    TrainConfig,
)
from megatron_r1.config.shape import load_shape  # noqa: E402
from megatron_r1.engines.vllm.server import LocalEngine, start_engines  # noqa: E402
from megatron_r1.engines.vllm.sync import WeightSync  # noqa: E402
from megatron_r1.policy import topology  # noqa: E402
from megatron_r1.policy.policy import Policy  # noqa: E402

LAYOUTS = {
    "tp2pp2": {"tensor": 2, "pipeline_parallel": 2, "sequence": True},
    "ep4": {"expert": 4},
    "dp2ep2": {"expert": 2},
    "tp4": {"tensor": 4, "sequence": True},
    "dp2pp2": {"pipeline_parallel": 2},
    "tp2ep2pp2": {"tensor": 2, "expert": 2, "pipeline_parallel": 2, "sequence": True},
    "tp2etp2": {"tensor": 2, "expert_tensor": 2, "sequence": True},
    "cp2": {"context": 2},
}


def rollout(dtype: str, tensor: int, servers: int) -> RolloutConfig:
    return RolloutConfig(
        device="cpu", sync="gloo", dtype=dtype, max_model_len=96, max_num_seqs=16, memory_fraction=0.2,
        kv_cache_gib=0.25, enforce_eager=True, sync_bucket_mib=1, start_timeout_seconds=600,
        tensor_parallel=tensor, num_engines=servers,
    )  # fmt: skip


def checksums(engine: LocalEngine) -> dict[str, str]:
    return engine.client.request("POST", "/weight_checker", {"action": "checksum"})["checksums"]


def main(store: str, root: Path, dtype: str, tensor: int, servers: int, names: list[str]) -> None:
    is_first, world = os.environ["RANK"] == "0", int(os.environ["WORLD_SIZE"])
    config = rollout(dtype, tensor, servers)
    found: dict[str, object] = {}
    fresh_b = fresh(root, "b", dtype, tensor) if is_first else {}
    engines = start_engines(config, model_path=root / "a", run_dir=root / "run") if is_first else ()
    try:
        if is_first:
            found["fresh"] = {"a": checksums(engines[0]), "b": fresh_b}
        for number, name in enumerate(names):
            folder = "ba"[number % 2]
            topology.initialise(
                ParallelConfig(world_size=world, **LAYOUTS[name]), seed=1, cpu=True, store_path=f"{store}-{number}"
            )
            received = push(config, root / folder, LAYOUTS[name], world, engines, version=number + 1)
            if is_first:
                sums = [checksums(engine) for engine in engines]
                found[name] = {"folder": folder, "servers": sums, "received": received, "parallel": LAYOUTS[name]}
            topology.finalise()
    finally:
        for engine in engines:
            engine.stop()
    if is_first:
        (root / f"found_{'_'.join(names)}.json").write_text(json.dumps(found))


def fresh(root: Path, folder: str, dtype: str, tensor: int) -> dict[str, str]:
    (engine,) = start_engines(rollout(dtype, tensor, 1), model_path=root / folder, run_dir=root / f"run_{folder}")
    with engine:
        return checksums(engine)


def push(config: RolloutConfig, folder: Path, layout: dict, world: int, engines, version: int) -> list[int]:
    """The bytes of weights that the plan has into each worker, of what vLLM's loaders were recorded to want."""
    policy = Policy(
        load_shape(folder),
        parallel=ParallelConfig(world_size=world, **layout),
        train=TrainConfig(dtype="fp32"),
        model=ModelConfig(path=folder),
        optimizer=OptimizerConfig(lr=1e-3, min_lr=1e-3),
        total_steps=1,
        device=torch.device("cpu"),
    )
    source = policy.weights(dtype=torch.bfloat16 if config.dtype == "bf16" else torch.float32)
    sync = WeightSync(config, source=source, engines=engines, model_path=folder, rank=dist.get_rank())
    sync.push(version)
    assert sync.channel is not None
    received = [0] * (config.tensor_parallel * config.num_engines)
    for message in sync.channel.plan.messages:
        for piece in message.pieces:
            received[message.worker] += piece.box.size * sync.channel.tensors[piece.tensor].itemsize
    sync.close()
    dist.barrier()
    return received


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]), sys.argv[6].split(","))
