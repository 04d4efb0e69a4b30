"""Recipes: typed functions that return the configuration of a stage or of a pipeline. The command line overrides any
field."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from megatron_r1.config.pipeline import PipelineConfig
from megatron_r1.config.schema import StageConfig
from megatron_r1.recipes.few_gpus import (
    distill_qwen_7b,
    grpo_moe_16b,
    grpo_qwen_1_5b,
    grpo_qwen_7b,
    grpo_qwen_7b_colocated,
)
from megatron_r1.recipes.r1_671b import distill_32b, r1_671b, sft_671b
from megatron_r1.recipes.r1_tiny import on_policy_distill_tiny, r1_tiny, r1_zero_tiny
from megatron_r1.recipes.r1_zero import grpo_671b
from megatron_r1.recipes.tiny import grpo_smollm2, quickstart, tiny

RECIPES: Mapping[str, Callable[[], StageConfig | PipelineConfig]] = {
    recipe.__name__: recipe
    for recipe in (
        quickstart,
        tiny,
        r1_tiny,
        r1_zero_tiny,
        on_policy_distill_tiny,
        grpo_smollm2,
        grpo_qwen_1_5b,
        grpo_qwen_7b,
        grpo_qwen_7b_colocated,
        grpo_moe_16b,
        distill_qwen_7b,
        grpo_671b,
        sft_671b,
        distill_32b,
        r1_671b,
    )
}
"""Every recipe by the name that the command line uses."""

PACKAGED_SHAPES: Mapping[str, Path] = {
    name: Path(__file__).parent / folder
    for name, folder in {
        "DeepSeek-V3-Base": "deepseek_v3",
        "Qwen2.5-Math-1.5B": "qwen2_5_math_1_5b",
        "Qwen2.5-Math-7B": "qwen2_5_math_7b",
        "Qwen2.5-7B": "qwen2_5_7b",
        "Moonlight-16B-A3B": "moonlight_16b",
    }.items()
}
"""Folders with the sizes of published models, by the name of the folder that a recipe expects: for planning before
anything is downloaded."""
