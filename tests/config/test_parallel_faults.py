"""A layout that cannot hold the model is refused before anything is built."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_r1.config.pipeline_layout import layout_stages
from megatron_r1.config.schema import ParallelConfig
from megatron_r1.config.shape import load_shape
from megatron_r1.config.trainer_faults import parallel_faults
from megatron_r1.recipes import PACKAGED_SHAPES, RECIPES

V3 = load_shape(PACKAGED_SHAPES["DeepSeek-V3-Base"])
QWEN = load_shape(PACKAGED_SHAPES["Qwen2.5-7B"])


def layout(text: str, pipeline: int = 2) -> ParallelConfig:
    return ParallelConfig(world_size=pipeline, pipeline_parallel=pipeline, pipeline_layout=text)


def test_the_stages_of_the_671b_recipe():
    stages = layout_stages(V3, RECIPES["grpo_671b"]().parallel)
    assert (len(stages), stages[0], stages[1], stages[-1]) == (16, "Ettt", "tttt", "ttmL")
    assert parallel_faults(RECIPES["sft_671b"]().parallel, V3) == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        # It was built without the layer, and ended in "no rank holds all shards of mtp.layers.0.enorm.weight".
        ("Et*30|t*31L", "it has 0 MTP layers (m), the model has 1: write 'Et*30|t*31mL'"),
        ("Et*30|t*31mmL", "it has 2 MTP layers (m), the model has 1: write 'Et*30|t*31mL'"),
        ("Et*30m|t*31L", "E must be in its first stage, m and L in its last"),
        ("Et*30|t*30mL", "it has 60 decoder layers (t), the model has 61"),
        ("t*30|t*31mL", "it has 0 embedding (E), the model has 1"),
        ("Et*61mL", "1 stages; pipeline_parallel * virtual_pipeline is 2"),
        ("Et*30|x", "not ['x']"),
    ],
)
def test_what_a_layout_lacks_is_named(text, says):
    (fault,) = parallel_faults(layout(text), V3)[:1]
    assert fault.startswith(f"parallel.pipeline_layout is {text!r}") and says in fault


def test_a_reward_model_has_no_place_for_mtp():
    """Its shape has none, whatever its base has (config/reward_model.py)."""
    value = dataclasses.replace(V3, num_mtp_layers=0)
    assert parallel_faults(layout("Et*30|t*31L"), value) == []
    assert parallel_faults(RECIPES["r1_671b"]().helpful.parallel, value) == []  # pyright: ignore
    (fault,) = parallel_faults(layout("Et*30|t*31mL"), value)
    assert "it has 1 MTP layers (m), the model has 0: write 'Et*30|t*31L'" in fault


@pytest.mark.parametrize(
    ("heads", "groups", "tensor", "says"),
    [
        (16, 2, 2, None),
        (16, 2, 8, None),  # four ranks share each key-value head
        (12, 2, 4, None),
        (28, 4, 8, "it must divide the number of attention heads 28"),
        (12, 4, 6, "it must divide the number of key-value heads 4: use 1, 2, 4"),
    ],
)
def test_tensor_parallel_ranks_may_share_a_key_value_head(heads, groups, tensor, says):
    shape = dataclasses.replace(QWEN, num_heads=heads, num_kv_heads=groups, ffn_size=48 * 14)
    faults = parallel_faults(ParallelConfig(world_size=tensor, tensor=tensor), shape)
    assert (not faults) if says is None else says in faults[0]
