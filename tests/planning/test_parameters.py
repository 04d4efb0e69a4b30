"""Parameter counts against DeepSeek-V3's published numbers and against transformers' own models."""

from pathlib import Path

import pytest

from megatron_r1.config import ParallelConfig, load_shape
from megatron_r1.config.shape import shape_from_config
from megatron_r1.planning.parameters import bytes_per_rank, count_parameters

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


def test_bytes_of_one_rank_alone_are_eighteen_a_weight():
    shape = shape_from_config(DENSE | {"rope_theta": 1e4, "model_type": "llama"})
    # Untied embedding, three layers, last norm.
    layer = 2 * 48 + 48 * (48 + 24 + 24 + 48) + 3 * 48 * 80
    assert bytes_per_rank(shape, ParallelConfig()) == 18 * (2 * 96 * 48 + 3 * layer + 48)


def test_data_parallel_ranks_share_the_optimizer_state():
    shape = shape_from_config(DENSE | {"rope_theta": 1e4, "model_type": "llama"})
    weights = count_parameters(shape).total
    assert bytes_per_rank(shape, ParallelConfig(world_size=4)) == (6 + 3) * weights
    assert bytes_per_rank(shape, ParallelConfig(world_size=4), fp32=True) == (8 + 2) * weights
    assert bytes_per_rank(shape, ParallelConfig(world_size=4), distributed_optimizer=False) == 18 * weights
    # With moments in bf16: 4 for the master weight, twice 2.
    assert bytes_per_rank(shape, ParallelConfig(world_size=4), moments="bf16") == (6 + 2) * weights
    # Context-parallel ranks hold the same weights, so they share it too.
    assert bytes_per_rank(shape, ParallelConfig(world_size=4, context=2)) == (6 + 3) * weights
    assert bytes_per_rank(shape, ParallelConfig(world_size=4, tensor=2)) == (6 + 6) * weights / 2
    assert bytes_per_rank(shape, ParallelConfig(world_size=4, pipeline_parallel=4)) == 18 * weights / 4


def test_experts_are_split_over_their_own_ranks():
    shape = shape_from_config(DENSE | {"rope_theta": 1e4} | TINY_DEEPSEEK)
    count = count_parameters(shape)
    # EP4 of 8 data-parallel ranks: 4 expert shards, each on 2 ranks that share its optimizer state.
    expected = (6 + 12 / 8) * count.dense + (6 + 12 / 2) * count.routed / 4
    assert bytes_per_rank(shape, ParallelConfig(world_size=8, expert=4)) == round(expected)


def test_deepseek_v3_fits_80_gb_gpus_at_pp16_ep32():
    size = bytes_per_rank(DEEPSEEK_V3, ParallelConfig(world_size=512, pipeline_parallel=16, expert=32))
    # dense 17.12B at 6.375 bytes / 16, routed 653.91B at 18 bytes / 512
    assert size / 1e9 == pytest.approx(17.1176 * (6 + 12 / 32) / 16 + 653.9088 * 18 / 512, rel=1e-4)
    assert size < 40e9
