"""Parameter counts against DeepSeek-V3's published numbers and against transformers' own models."""

from pathlib import Path

import pytest

from megatron_r1.config import ParallelConfig, load_shape
from megatron_r1.config.shape import shape_from_config
from megatron_r1.doctor.machine import look
from megatron_r1.doctor.needs import _memory_need
from megatron_r1.pipeline.kinds import needs_of
from megatron_r1.planning.hardware import Assumptions
from megatron_r1.planning.parameters import count_parameters
from megatron_r1.planning.plan import setups_of
from megatron_r1.planning.summary import describe_trainer
from megatron_r1.planning.trainer import TrainerSetup, fullest_state, trainer_memory
from megatron_r1.recipes import RECIPES

DEEPSEEK_V3 = load_shape(Path(__file__).parent / "deepseek_v3.json")  # its config.json, sizes only
EXPERT = 3 * 7168 * 2048


def test_deepseek_v3_has_its_published_numbers():
    count = count_parameters(DEEPSEEK_V3)
    # Megatron-Core's GPTModel of this shape counts 671,026,404,352; its 58 x 256 router biases are buffers.
    assert count.total == 671_026_404_352 + 58 * 256 == 671_026_419_200
    assert count.routed == 58 * 256 * EXPERT == 653_908_770_816
    assert count.active == count.total - 58 * (256 - 8) * EXPERT
    assert count.active / 1e9 == pytest.approx(37.55, abs=0.005)
    assert (count.active - 129280 * 7168) / 1e9 == pytest.approx(36.63, abs=0.005)
    assert count.mtp / 1e9 == pytest.approx(11.61, abs=0.005)
    # The published checkpoint also holds the MTP layer's own copies of embedding and head.
    assert (count.total + count.mtp + 2 * 129280 * 7168) / 1e9 == pytest.approx(684.49, abs=0.005)


DENSE = {
    "vocab_size": 96,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 128,
}
TINY_DEEPSEEK = {
    "model_type": "deepseek_v3",
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
}
QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "head_dim": 20,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
}
SMALL = {
    "llama": {"model_type": "llama"},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama-biases": {"model_type": "llama", "attention_bias": True},
    "llama-multi-head": {"model_type": "llama", "num_key_value_heads": 4},
    "qwen2": {"model_type": "qwen2"},
    "qwen2-tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 20},
    "qwen3_moe": QWEN3_MOE,
    "qwen3_moe-dense-layers": QWEN3_MOE | {"mlp_only_layers": [1]},
    "deepseek_v3": TINY_DEEPSEEK,
    "deepseek_v3-no-query-rank": TINY_DEEPSEEK | {"q_lora_rank": None},
}


@pytest.mark.parametrize("name", SMALL)
def test_the_count_is_that_of_transformers(name):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = DENSE | {"tie_word_embeddings": False} | SMALL[name]
    config = AutoConfig.for_model(**fields)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    weights = sum(parameter.numel() for parameter in model.parameters())
    biases = {key: value for key, value in model.named_buffers() if key.endswith("e_score_correction_bias")}
    count = count_parameters(shape_from_config(fields | {"rope_theta": 10000.0}))
    assert count.total == weights + sum(bias.numel() for bias in biases.values())
    experts = [value.numel() for key, value in model.named_parameters() if ".mlp.experts." in key]
    assert count.routed == sum(experts)
    assert len(biases) == (2 if "deepseek" in name else 0)


def test_a_token_uses_its_experts_and_everything_dense():
    count = count_parameters(shape_from_config(DENSE | {"rope_theta": 1e4} | QWEN3_MOE))
    assert count.active == count.dense + 3 * 2 * (3 * 48 * 20)


def test_all_of_a_dense_model_is_active():
    count = count_parameters(shape_from_config(DENSE | {"rope_theta": 1e4, "model_type": "llama"}))
    assert (count.active, count.routed, count.mtp) == (count.total, 0, 0)


def state_bytes(shape, parallel=None, **setup) -> int:
    return fullest_state(shape, TrainerSetup(parallel=parallel or ParallelConfig(), **setup)).total


def padded(numbers: int, multiple: int) -> int:
    return -(-numbers // multiple) * multiple


def test_bytes_of_one_rank_alone_are_eighteen_a_weight():
    shape = shape_from_config(DENSE | {"rope_theta": 1e4, "model_type": "llama"})
    # Untied embedding, three layers, last norm. A tensor starts at a multiple of 64, a buffer ends at one of 128.
    layer = (48, 48 * 48, 48 * 96, 48, 2 * 48 * 80, 48 * 80)
    numbers = 2 * 96 * 48 + 3 * sum(layer) + 48
    assert state_bytes(shape, distributed=False) == 18 * numbers
    buffer = padded(2 * 96 * 48 + 3 * sum(padded(size, 64) for size in layer) + padded(48, 64), 128)
    # The last tensor's own padding is the buffer's; optimizer state is for numbers, not for padding.
    assert state_bytes(shape) == 6 * buffer + 12 * numbers


def test_the_optimizer_state_is_shared_by_those_who_hold_the_same_weights():
    shape = shape_from_config(DENSE | {"rope_theta": 1e4, "model_type": "llama"})
    weights = count_parameters(shape).total
    for parallel, rate in (
        (ParallelConfig(world_size=4), 6 + 3),
        (ParallelConfig(world_size=4, context=2), 6 + 3),
        (ParallelConfig(world_size=4, tensor=2), (6 + 6) / 2),
    ):
        # Padding, and norms that tensor parallelism does not split.
        assert state_bytes(shape, parallel) == pytest.approx(rate * weights, rel=0.02)
    parallel = ParallelConfig(world_size=4)
    assert state_bytes(shape, parallel, dtype="fp32") == pytest.approx((8 + 2) * weights, rel=0.02)
    assert state_bytes(shape, parallel, moments="bf16") == pytest.approx((6 + 2) * weights, rel=0.02)
    assert state_bytes(shape, parallel, distributed=False) == 18 * weights


def test_experts_are_split_over_their_own_ranks():
    shape = shape_from_config(DENSE | {"rope_theta": 1e4} | TINY_DEEPSEEK)
    count = count_parameters(shape)
    # EP4 of 8 data-parallel ranks: 4 expert shards, each on 2 ranks that share its optimizer state.
    expected = (6 + 12 / 8) * count.dense + (6 + 12 / 2) * count.routed / 4
    assert state_bytes(shape, ParallelConfig(world_size=8, expert=4)) == pytest.approx(expected, rel=0.02)


def test_deepseek_v3_at_pp16_ep32_is_what_the_planner_says():
    parallel = RECIPES["grpo_671b"]().parallel
    state = state_bytes(DEEPSEEK_V3, parallel)
    # The fullest has four layers: 1,024 experts over 32 ranks at 18 bytes, attention and shared expert at 6 + 12 / 32.
    attention = 7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * 256 + 128 * 128 * 7168
    rest = attention + EXPERT + 256 * 7168
    assert state == pytest.approx(4 * (256 / 32 * EXPERT * 18 + rest * (6 + 12 / 32)), rel=1e-3)


def test_the_summary_the_doctor_and_the_planner_print_one_figure():
    stage = RECIPES["grpo_671b"]()
    needs = needs_of(stage)
    setup, _ = setups_of(needs)
    state = fullest_state(DEEPSEEK_V3, setup)
    assert trainer_memory(DEEPSEEK_V3, setup, needs.work, Assumptions()).state == state
    assert f"; {state.total / 2**30:.3g} GiB for weights" in describe_trainer(needs, DEEPSEEK_V3)[-1]
    assert f"({state.total / 2**30:.1f} GiB per rank" in _memory_need(needs, DEEPSEEK_V3, look()).needed
