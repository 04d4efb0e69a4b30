"""Worker, one rank: enters the context that Megatron makes of each FP8 recipe, as a model's forward pass does.

usage: fp8_contexts.py STORE ROOT RECIPE:MAJOR...; ROOT/config.json is the model's, MAJOR the compute capability of the
GPU that is not there. ROOT/RECIPE.json gets what Transformer Engine was told inside of it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pretend import pretend_gpu

pretend_gpu()

import torch  # noqa: E402
from megatron.core.fp8_utils import get_fp8_context  # noqa: E402
from transformer_engine.pytorch.fp8 import FP8GlobalStateManager  # noqa: E402

from megatron_r1.config import ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig  # noqa: E402
from megatron_r1.config.schema import FP8Config  # noqa: E402
from megatron_r1.config.shape import load_shape  # noqa: E402
from megatron_r1.policy import topology  # noqa: E402
from megatron_r1.policy.policy import Policy  # noqa: E402


def main(store: str, root: Path, jobs: list[str]) -> None:
    for number, job in enumerate(jobs):
        recipe, _, major = job.partition(":")
        pretend_gpu(capability=(int(major), 0))
        topology.initialise(ParallelConfig(), seed=1, cpu=True, store_path=f"{store}-{number}")
        (root / f"{recipe}.json").write_text(json.dumps(enter(root, recipe)))
        topology.finalise()


def enter(root: Path, recipe: str) -> dict[str, object]:
    kept = 0 if recipe == "delayed" else 1
    fp8 = FP8Config(recipe=recipe, first_layers_bf16=kept, last_layers_bf16=kept)
    policy = Policy(
        load_shape(root),
        parallel=ParallelConfig(),
        train=TrainConfig(dtype="fp8", fp8=fp8),
        model=ModelConfig(path=root, initialise="random"),
        optimizer=OptimizerConfig(),
        total_steps=1,
        device=torch.device("cpu"),
        transformer_engine=True,
    )
    layers = range(policy.shape.num_layers)
    found: dict[str, object] = {"layers": [inside(policy, layer) for layer in layers]}
    found["parameters"] = sorted({str(local.tensor.dtype) for local in policy.tensors.values()})
    found["outside"] = FP8GlobalStateManager.is_fp8_enabled()
    return found


def inside(policy: Policy, layer: int) -> str:
    """The recipe's class, format and whether attention's own products are in it; empty if this layer stays in bf16."""
    with get_fp8_context(policy.config, layer):
        if not FP8GlobalStateManager.is_fp8_enabled():
            return ""
        recipe = FP8GlobalStateManager.get_fp8_recipe()
        attention = recipe.fp8_dpa or recipe.fp8_mha
        return f"{type(recipe).__name__} {recipe.fp8_format.name} {attention}"


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
