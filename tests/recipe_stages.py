"""Every stage of every recipe that trains, made small: its own settings on a tiny shape, in a layout of four ranks at
most.

What is kept: kind of loss, precision, recomputation, trained MTP layers, optimizer, sequence parallelism, architecture.
What is made smaller: every parallel size above 2 becomes 2; data parallelism is what experts need, or 2 where nothing
else is split; of a pipeline_layout the first and last stage remain, each with one decoder layer less.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from functools import cache
from typing import Any

from megatron_r1.config.pipeline import PipelineConfig
from megatron_r1.config.schema import ParallelConfig
from megatron_r1.config.shape import ModelShape, shape_from_config
from megatron_r1.recipes import PACKAGED_SHAPES, RECIPES
from megatron_r1.stages.grpo.config import GRPOConfig
from megatron_r1.stages.reward_model.config import RewardModelConfig
from megatron_r1.stages.sft.config import SFTConfig
from megatron_r1.toy.warm_up.config import WarmUpConfig

Stage = GRPOConfig | SFTConfig | RewardModelConfig | WarmUpConfig
VOCAB = 96
SMALL = {
    "vocab_size": VOCAB, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128,
    "max_position_embeddings": 512,
}  # fmt: skip
SMALL_V3 = {
    "q_lora_rank": 48, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 24,
    "n_routed_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
    "n_group": 4, "topk_group": 2,
}  # fmt: skip
LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False}


@cache
def training_stages() -> dict[str, Stage]:
    """recipe, or recipe.stage: its configuration."""
    return dict(found for name, make in RECIPES.items() for found in _stages(name, make()))


def _stages(name: str, config: object) -> Iterator[tuple[str, Stage]]:
    if isinstance(config, Stage):
        yield name, config
    elif isinstance(config, PipelineConfig):
        for field in dataclasses.fields(config):
            yield from _stages(f"{name}.{field.name}", getattr(config, field.name))


def small_layout(parallel: ParallelConfig) -> ParallelConfig:
    names = ("tensor", "pipeline_parallel", "virtual_pipeline", "context", "expert", "expert_tensor")
    sizes = {name: min(2, getattr(parallel, name)) for name in names}
    split = sizes["tensor"] * sizes["pipeline_parallel"] * sizes["context"]
    data = 2 if sizes["expert"] > sizes["tensor"] or (split == 1 and parallel.world_size > 1) else 1
    text = parallel.pipeline_layout
    if text:
        first, last = text.split("|")[0], text.rpartition(")")[2].lstrip("*0123456789")
        text = "|".join(stage.replace("t", "", 1) for stage in (first, last))
    return ParallelConfig(
        world_size=split * data, sequence=parallel.sequence, pipeline_layout=text, **sizes
    )  # fmt: skip


def small_shape(name: str, config: Stage) -> ModelShape:
    """The architecture of the stage's model with SMALL sizes; a model that another stage makes is that stage's."""
    raw = _published(name, config)
    deepseek = raw["model_type"] == "deepseek_v3"
    raw |= SMALL | {"num_key_value_heads": 4 if deepseek else 2}
    if deepseek:
        kept = {"q_lora_rank": None} if raw["q_lora_rank"] is None else {}
        kept |= {"n_group": 1, "topk_group": 1} if raw["n_group"] == 1 else {}
        raw |= SMALL_V3 | kept
    raw.pop("head_dim", None)
    layout = small_layout(config.parallel)
    raw["num_hidden_layers"] = (
        layout.pipeline_layout.count("t") or 2 * layout.pipeline_parallel * layout.virtual_pipeline
    )
    shape = shape_from_config(raw, name)
    if isinstance(config, RewardModelConfig):
        return dataclasses.replace(shape, reward_head=True, num_mtp_layers=0)
    return shape


def _published(name: str, config: Stage) -> dict[str, Any]:
    path = config.model.path
    if str(path).startswith("@"):
        source = f"{name.rpartition('.')[0]}.{str(path)[1:].split('/')[0]}"
        return _published(source, training_stages()[source])
    if not (path / "config.json").exists():
        if "llama" in path.name.lower() or "smollm" in path.name:
            return dict(LLAMA)
        if "runs/r1_tiny/base" in str(path):
            return _published("r1_tiny.base", training_stages()["r1_tiny.base"])
        path = PACKAGED_SHAPES.get(path.name, PACKAGED_SHAPES["Qwen2.5-7B"])
    return json.loads((path / "config.json").read_text())


def combination(name: str) -> str:
    """What the stage asks of the trainer: stages that ask the same are run once."""
    config = training_stages()[name]
    parts = (small_shape(name, config), small_layout(config.parallel), config.train.dtype, config.train.recompute)
    return repr((type(config).__name__, config.model.train_mtp, *parts))


def representatives() -> dict[str, str]:
    """Each stage: the first one that asks the same."""
    first: dict[str, str] = {}
    return {name: first.setdefault(combination(name), name) for name in training_stages()}
