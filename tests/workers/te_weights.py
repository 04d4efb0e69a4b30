"""Worker: models of Transformer Engine's modules, filled from folders and read out again. No GPU (pretend.py).

usage: te_weights.py STORE ROOT LAYOUT...; ROOT/NAME is a Hugging Face folder. ROOT/LAYOUT.json (rank 0) gets, for each
NAME that has such a layout, what came out otherwise than it went in: lists of names that should be empty.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from pretend import pretend_gpu

pretend_gpu(deterministic=True)

import layouts  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core.extensions.transformer_engine import TELinear  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from megatron_r1.config import ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig  # noqa: E402
from megatron_r1.config.shape import load_shape  # noqa: E402
from megatron_r1.policy import topology  # noqa: E402
from megatron_r1.policy.checkpoint import load_policy, take_snapshot  # noqa: E402
from megatron_r1.policy.policy import Policy  # noqa: E402

Weights = dict[str, torch.Tensor]


def main(store: str, root: Path, names: list[str]) -> None:
    for number, layout in enumerate(names):
        parallel = ParallelConfig(world_size=int(os.environ["WORLD_SIZE"]), **layouts.LAYOUTS[layout])
        topology.initialise(parallel, seed=1, cpu=True, store_path=f"{store}-{number}")
        found = {}
        for folder in sorted(path for path in root.iterdir() if path.is_dir()):
            if parallel.expert == 1 or load_shape(folder).moe is not None:
                found[folder.name] = check(folder, parallel)
        if dist.get_rank() == 0:
            (root / f"{layout}.json").write_text(json.dumps(found))
        dist.barrier()
        topology.finalise()


def check(folder: Path, parallel: ParallelConfig) -> dict[str, list[str]]:
    policy = build(folder, parallel, "fp32", "weights")
    assert any(isinstance(module, TELinear) for chunk in policy.chunks for module in chunk.modules())
    expected = load_file(folder / "model.safetensors") if dist.get_rank() == 0 else {}
    found = {"fp32": differences(export(policy), expected)}
    half = export(build(folder, parallel, "bf16", "weights"), torch.bfloat16)
    rounded = {name: tensor if keeps_fp32(name) else tensor.bfloat16() for name, tensor in expected.items()}
    found["bf16"] = differences(half, rounded)
    other = build(folder, parallel, "fp32", "random")
    random = differences(export(other), expected)
    found["random weights are others"] = [] if len(random) == len(expected) else ["some are equal"]
    policy.refresh_reference()
    checkpoint = folder.with_name(f"{folder.name}.saved-{parallel.tensor}{parallel.expert}{parallel.pipeline_parallel}")
    if dist.get_rank() == 0:
        checkpoint.mkdir()
    dist.barrier()
    take_snapshot(policy).write(checkpoint)
    dist.barrier()
    load_policy(other, checkpoint)
    found["checkpoint"] = differences(export(other), expected)
    for local in other.tensors.values():
        local.tensor.data.zero_()
    with other.reference_weights():
        found["reference"] = differences(export(other), expected)
    if dist.get_rank() == 0:
        for file in checkpoint.iterdir():
            file.unlink()
        checkpoint.rmdir()
    return found


def build(folder: Path, parallel: ParallelConfig, dtype: str, initialise: str) -> Policy:
    return Policy(
        load_shape(folder),
        parallel=parallel,
        train=TrainConfig(dtype=dtype, deterministic=True),
        model=ModelConfig(path=folder, initialise=initialise),
        optimizer=OptimizerConfig(),
        total_steps=1,
        device=torch.device("cpu"),
        transformer_engine=True,
    )


def export(policy: Policy, dtype: torch.dtype = torch.float32) -> Weights:
    stream = policy.weights(dtype=dtype, include_mtp=True, bucket_bytes=1 << 16)
    return {name: tensor.clone() for name, tensor in stream}


def keeps_fp32(name: str) -> bool:
    return name.endswith("e_score_correction_bias")


def differences(found: Weights, expected: Weights) -> list[str]:
    """Names on one side only, or with other bits. Both are empty on ranks but 0."""
    names = found.keys() | expected.keys()
    return sorted(
        name
        for name in names
        if name not in found or name not in expected or not torch.equal(found[name], expected[name])
    )


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
