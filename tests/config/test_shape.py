"""ModelShape from config.json: every architecture, both spellings of the rope, every refusal."""

import json
import math
import os

import pytest

from megatron_r1.config.shape import load_shape, shape_from_config
from megatron_r1.errors import ConfigError

LLAMA = {
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
}
DEEPSEEK = {
    "model_type": "deepseek_v3",
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 1,
}
QWEN3_MOE = LLAMA | {
    "model_type": "qwen3_moe",
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "norm_topk_prob": True,
}


def test_deepseek_v3_has_latent_attention_experts_and_mtp():
    shape = shape_from_config(DEEPSEEK)
    assert shape.mla is not None and shape.moe is not None
    assert (shape.mla.q_lora_rank, shape.mla.kv_lora_rank, shape.mla.v_dim) == (24, 16, 10)
    assert shape.head_dim == 12 + 8
    assert shape.num_kv_heads == 4  # every head has its own keys once they are decompressed
    assert (shape.moe.num_experts, shape.moe.top_k, shape.moe.expert_ffn_size) == (8, 2, 32)
    assert (shape.moe.router, shape.moe.num_groups, shape.moe.topk_groups) == ("sigmoid", 4, 2)
    assert (shape.moe.num_shared_experts, shape.moe.routed_scaling, shape.moe.normalise_topk) == (
        1,
        2.5,
        True,
    )
    assert shape.num_mtp_layers == 1
    assert [shape.is_moe_layer(layer) for layer in range(4)] == [False, True, True, True]


def test_deepseek_v3_may_have_no_query_compression():
    shape = shape_from_config(DEEPSEEK | {"q_lora_rank": None})
    assert shape.mla is not None and shape.mla.q_lora_rank is None


@pytest.mark.parametrize(
    ("architecture", "qkv_bias", "qk_norm"),
    [("llama", False, False), ("qwen2", True, False), ("qwen3", False, True)],
)
def test_dense_architectures_differ_in_attention(architecture, qkv_bias, qk_norm):
    shape = shape_from_config(LLAMA | {"model_type": architecture, "head_dim": 16})
    assert (shape.architecture, shape.qkv_bias, shape.qk_norm) == (architecture, qkv_bias, qk_norm)
    assert (shape.num_heads, shape.num_kv_heads, shape.head_dim) == (4, 2, 16)
    assert shape.mla is None and shape.moe is None and shape.num_mtp_layers == 0
    assert not shape.is_moe_layer(2)


def test_qwen3_moe_has_a_softmax_router_in_every_layer():
    shape = shape_from_config(QWEN3_MOE)
    assert shape.moe is not None
    assert (shape.moe.router, shape.moe.num_groups, shape.moe.num_shared_experts) == ("softmax", 1, 0)
    assert shape.moe.normalise_topk and shape.qk_norm and shape.head_dim == 32
    assert shape.is_moe_layer(0)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_defaults_are_those_of_hugging_face(architecture):
    absent = ("num_key_value_heads", "rms_norm_eps", "rope_theta")
    raw = {key: value for key, value in LLAMA.items() if key not in absent} | {"model_type": architecture}
    if architecture == "qwen2":  # as many as its class says, whatever the number of heads
        with pytest.raises(ConfigError, match="num_key_value_heads is 32; it must divide num_attention_heads 4"):
            shape_from_config(raw)
        raw |= {"num_key_value_heads": None}
    shape = shape_from_config(raw)
    assert shape.num_kv_heads == 4
    assert not shape.tie_embeddings
    assert (shape.init_std, shape.norm_eps, shape.rope.theta) == (0.02, 1e-6, 10000.0)


def test_a_qwen3_without_head_dim_has_heads_of_128():
    assert shape_from_config(LLAMA | {"model_type": "qwen3"}).head_dim == 128
    assert shape_from_config(QWEN3_MOE | {"head_dim": None}).head_dim == 16


def test_deepseek_v3s_absent_fields_are_those_of_its_class():
    absent = ("n_group", "topk_group", "routed_scaling_factor", "n_shared_experts", "first_k_dense_replace")
    raw = {key: value for key, value in DEEPSEEK.items() if key not in absent}
    shape = shape_from_config(raw | {"n_routed_experts": 16})
    assert shape.moe is not None
    assert (shape.moe.num_groups, shape.moe.topk_groups, shape.moe.routed_scaling) == (8, 4, 2.5)
    assert (shape.moe.num_shared_experts, shape.moe.normalise_topk, len(shape.moe.dense_layers)) == (1, True, 3)


@pytest.mark.parametrize("change", [{"n_group": None}, {"topk_group": None}, {"n_group": 1, "topk_group": 1}])
def test_without_groups_or_their_number_a_token_may_go_to_any_expert(change):
    shape = shape_from_config(DEEPSEEK | change)
    assert shape.moe is not None
    assert (shape.moe.num_groups, shape.moe.topk_groups) == (1, 1)


def test_qwen3_moe_may_have_dense_layers():
    fields = QWEN3_MOE | {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    shape = shape_from_config(fields)
    assert [shape.is_moe_layer(layer) for layer in range(6)] == [False, True, False, False, False, True]


@pytest.mark.parametrize(
    ("architecture", "other", "name"),
    [("qwen3_moe", "num_local_experts", "num_experts"), ("deepseek_v3", "num_mtp_layers", "num_nextn_predict_layers")],
)
def test_transformers_5s_other_names_mean_the_same(architecture, other, name):
    raw = QWEN3_MOE if architecture == "qwen3_moe" else DEEPSEEK
    renamed = {other if key == name else key: value for key, value in raw.items()}
    assert shape_from_config(renamed) == shape_from_config(raw) == shape_from_config(renamed | raw)
    with pytest.raises(ConfigError, match=f"{name} is {raw[name]} and {other}, the same, 7"):
        shape_from_config(raw | {other: 7})


YARN = {"factor": 40, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 1.0}


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5e5, "rope_scaling": YARN | {"type": "yarn"}},
        {"rope_theta": 5e5, "rope_scaling": YARN | {"rope_type": "yarn", "type": "yarn"}},
        {"rope_theta": None, "rope_parameters": YARN | {"rope_type": "yarn", "rope_theta": 5e5}},
    ],
    ids=["transformers-4", "both-types", "transformers-5"],
)
def test_both_spellings_of_scaled_rope(spelling):
    rope = shape_from_config(LLAMA | spelling).rope
    assert (rope.theta, rope.kind) == (5e5, "yarn")
    assert rope.factors == {
        "factor": 40.0,
        "original_max_position_embeddings": 4096.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 1e4, "rope_scaling": None},
        {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ],
    ids=["transformers-4", "transformers-5"],
)
def test_both_spellings_of_plain_rope(spelling):
    rope = shape_from_config(LLAMA | spelling).rope
    assert (rope.theta, rope.kind, dict(rope.factors)) == (1e4, "default", {})


def test_llama3_rope_keeps_its_four_numbers():
    factors = {
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192.0,
    }
    rope = shape_from_config(LLAMA | {"rope_scaling": factors | {"rope_type": "llama3"}}).rope
    assert (rope.kind, rope.factors) == ("llama3", factors)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (LLAMA | {"model_type": "gpt2"}, ["model_type is 'gpt2'", "deepseek_v3", "qwen3_moe"]),
        ({}, ["model_type is None"]),
        (LLAMA | {"rope_theta": None}, ["neither rope_theta nor rope_parameters.rope_theta"]),
        (
            LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2}},
            ["rope type is 'dynamic'", "default, linear, llama3 and yarn"],
        ),
        (LLAMA | {"rope_scaling": {"type": "yarn"}}, ["yarn needs factor"]),
        (
            LLAMA | {"rope_scaling": {"rope_type": "llama3", "original_max_position_embeddings": 8}},
            ["llama3", "needs factor"],
        ),
        (
            LLAMA | {"rope_scaling": YARN | {"type": "llama3"}},
            ["llama3", "needs low_freq_factor"],
        ),
        (LLAMA | {"rope_scaling": YARN | {"type": "yarn", "attn_factor": 1.5}}, ["attn_factor is 1.5", "remove it"]),
        (
            # DeepSeek-R1-0528-Qwen3-8B's: 0.878249 * (0.1 * ln(4) + 1) = 1
            LLAMA | {"rope_scaling": {"attn_factor": 0.8782488562869419, **YARN, "type": "yarn", "factor": 4.0}},
            ["attn_factor is 0.878", "do not read it: remove it", "write attention_factor 1.0 in its place"],
        ),
        (LLAMA | {"rope_scaling": YARN | {"type": "yarn", "factor": 0}}, ["factor is 0.0", "yarn", "at least 1"]),
        (
            LLAMA | {"rope_scaling": YARN | {"type": "yarn"}, "original_max_position_embeddings": 64},
            ["original_max_position_embeddings is 64 and, in the rope scaling, 4096"],
        ),
        (LLAMA | {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, ["full_attention", "remove it"]),
        (LLAMA | {"rope_parameters": {"partial_rotary_factor": 0.5}}, ["partial_rotary_factor is 0.5"]),
        (LLAMA | {"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types", "full_attention"]),
        (DEEPSEEK | {"attention_bias": True}, ["attention_bias is True"]),
        (QWEN3_MOE | {"attention_bias": True}, ["attention_bias is True"]),
        (LLAMA | {"attention_bias": 1}, ["attention_bias is 1"]),
        (LLAMA | {"attention_bias": True, "qkv_bias": False}, ["qkv_bias is given beside attention_bias"]),
        (LLAMA | {"qkv_bias": True}, ["qkv_bias is True"]),
        # Qwen2.5-Math-PRM's and another model_type's: vLLM would take those classes
        (LLAMA | {"architectures": ["LlamaForProcessRewardModel"]}, ["architectures is", "['LlamaForCausalLM']"]),
        (DEEPSEEK | {"architectures": ["LlamaForCausalLM"]}, ["architectures is", "['DeepseekV3ForCausalLM']"]),
        (LLAMA | {"sliding_window": 64}, ["sliding_window is 64", "vLLM alone reads it"]),
        (DEEPSEEK | {"rope_interleave": False}, ["rope_interleave is False"]),
        (DEEPSEEK | {"rope_interleave": None}, ["rope_interleave is null"]),
        (DEEPSEEK | {"num_key_value_heads": 1}, ["num_key_value_heads is 1", "num_attention_heads, 4"]),
        (DEEPSEEK | {"n_group": 8}, ["n_group is 8", "two or more of the 8 experts"]),
        (DEEPSEEK | {"topk_group": 5}, ["topk_group is 5", "only 4 groups"]),
        (DEEPSEEK | {"num_experts_per_tok": 5}, ["num_experts_per_tok is 5", "leaves 4 experts"]),
        (DEEPSEEK | {"scoring_func": "softmax"}, ["scoring_func", "sigmoid"]),
        (DEEPSEEK | {"topk_method": "greedy"}, ["topk_method", "noaux_tc"]),
        (QWEN3_MOE | {"decoder_sparse_step": 4}, ["decoder_sparse_step", "no layer with experts"]),
        (QWEN3_MOE | {"mlp_only_layers": [0, "1"]}, ["mlp_only_layers", "a list of layers' numbers"]),
        (QWEN3_MOE | {"num_key_value_heads": None}, ["num_key_value_heads is missing"]),
    ],
)
def test_what_cannot_be_built_is_refused_with_the_file(raw, words):
    with pytest.raises(ConfigError) as caught:
        shape_from_config(raw, "here/config.json")
    for word in ["here/config.json", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "field",
    [
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "max_position_embeddings",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
        "n_routed_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
    ],
)
def test_a_missing_size_is_refused_by_name(field):
    with pytest.raises(ConfigError, match=rf"field {field} is missing"):
        shape_from_config({key: value for key, value in DEEPSEEK.items() if key != field})


@pytest.mark.parametrize("value", [0, -1, 2.5, "64", True])
def test_a_size_that_is_no_positive_integer_is_refused(value):
    with pytest.raises(ConfigError, match=r"hidden_size is .* must be a positive integer"):
        shape_from_config(LLAMA | {"hidden_size": value})


def test_load_shape_takes_the_folder_or_the_file(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(DEEPSEEK))
    assert load_shape(tmp_path) == load_shape(file) == shape_from_config(DEEPSEEK)


def test_load_shape_names_the_file_that_is_absent(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.path: .*no_such_model.* does not exist"):
        load_shape(tmp_path / "no_such_model")


@pytest.mark.parametrize("content", [b'{"model_type": ', b"\xff\xfe"])
def test_load_shape_names_the_file_that_is_no_json(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.json: not valid JSON"):
        load_shape(tmp_path)


@pytest.mark.parametrize(
    "raw",
    [
        LLAMA,
        LLAMA | {"model_type": "qwen2"},
        LLAMA | {"model_type": "qwen3", "head_dim": 32},
        QWEN3_MOE,
        DEEPSEEK,
    ],
    ids=lambda raw: raw["model_type"],
)
def test_a_config_saved_by_transformers_means_the_same(raw, tmp_path):
    from transformers import AutoConfig

    fields = raw | {"rope_parameters": {"rope_type": "default", "rope_theta": raw["rope_theta"]}}
    AutoConfig.for_model(**fields).save_pretrained(tmp_path)
    assert load_shape(tmp_path) == shape_from_config(raw)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "gelu"),
        ("mlp_bias", True),
        ("use_sliding_window", True),
        ("is_causal", False),
        ("logit_scale", 0.5),
        ("partial_rotary_factor", 0.5),
        ("quantization_config", {"quant_method": "fp8"}),
        ("num_key_value_heads", 3),
    ],
)
def test_what_the_model_would_not_honour_is_refused(field, value):
    raw = {
        "model_type": "llama", "vocab_size": 32, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
        "intermediate_size": 64, "rms_norm_eps": 1e-6, "max_position_embeddings": 64, "rope_theta": 1e4,
    }  # fmt: skip
    shape_from_config(raw)
    with pytest.raises(ConfigError, match=field):
        shape_from_config(raw | {field: value})


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (QWEN3_MOE | {"num_experts": "64"}, "num_experts is '64'"),
        (DEEPSEEK | {"topk_group": "a"}, "topk_group is 'a'"),
        (LLAMA | {"rms_norm_eps": 10**400}, "rms_norm_eps is an integer of 1329 bits"),
        (LLAMA | {"rope_theta": 10**400}, "rope_theta is an integer of 1329 bits"),
        (LLAMA | {"rope_theta": float("nan")}, "rope_theta is nan"),
        (LLAMA | {"rope_theta": 0}, "rope_theta is 0.0; it must be a number above 0"),
        (
            LLAMA | {"rope_scaling": {"type": "yarn", "factor": 10**400, "original_max_position_embeddings": 1}},
            "factor is an integer",
        ),
        (LLAMA | {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; it must be a positive integer up to"),
        (DEEPSEEK | {"num_hidden_layers": 10**4, "n_routed_experts": 10**4}, "at most 1000000 are read"),
        (LLAMA | {"vocab_size": 10**400}, "vocab_size is an integer of 1329 bits"),
        (LLAMA | {"hidden_size": 2}, "hidden_size is 2; it must be at least num_attention_heads 4"),
        (LLAMA | {"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; it must be true or false"),
        (QWEN3_MOE | {"norm_topk_prob": 1}, "norm_topk_prob is 1; it must be true or false"),
        (
            LLAMA | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [2**40, 2**40]}},
            "quantization_config is",
        ),
    ],
)
def test_values_of_the_wrong_kind_or_size_are_refused(raw, words):
    with pytest.raises(ConfigError) as caught:
        shape_from_config(raw, "here/config.json")
    assert "here/config.json: " in str(caught.value) and words in str(caught.value)


def test_a_config_that_is_nested_without_end_or_is_no_file(tmp_path):
    file = tmp_path / "config.json"
    file.write_text("[" * 200_000)
    with pytest.raises(ConfigError, match=r"config\.json: not valid JSON"):
        load_shape(tmp_path)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ConfigError, match=r"config\.json: is not a file"):
        load_shape(tmp_path)


def test_kimi_k2_is_deepseek_v3_under_another_name():
    """Its published config.json names DeepseekV3ForCausalLM, and vLLM reads it as such."""
    assert shape_from_config(DEEPSEEK | {"model_type": "kimi_k2"}) == shape_from_config(DEEPSEEK)
    with pytest.raises(ConfigError, match="kimi_k2"):
        shape_from_config(DEEPSEEK | {"model_type": ["kimi_k2"]})


def yarn(**numbers) -> dict:
    return LLAMA | {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64} | numbers}


def llama3(**numbers) -> dict:
    usual = {"factor": 8.0, "original_max_position_embeddings": 64, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return LLAMA | {"rope_scaling": {"rope_type": "llama3"} | usual | numbers}


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (LLAMA | {"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0; it must be above 0"),
        (LLAMA | {"rms_norm_eps": 0.0}, "rms_norm_eps is 0.0; it must be above 0"),
        (LLAMA | {"rms_norm_eps": 1}, "rms_norm_eps is 1; transformers takes no integer there: write 1.0"),
        (LLAMA | {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; it must be a number"),
        (LLAMA | {"initializer_range": -0.02}, "initializer_range is -0.02; it must be at least 0"),
        (LLAMA | {"initializer_range": 1.5}, "initializer_range is 1.5; it must be at most 1"),
        (LLAMA | {"head_dim": 15}, "head_dim is 15; it must be even"),
        (LLAMA | {"head_dim": 0}, "head_dim is 0; it must be a positive integer"),
        (LLAMA | {"hidden_size": 60}, "num_attention_heads 4, which makes heads of 15; they must be even"),
        (LLAMA | {"hidden_size": 66}, "hidden_size is 66; it must be a multiple of num_attention_heads"),
        (LLAMA | {"num_key_value_heads": 0}, "num_key_value_heads is 0; it must be a positive integer"),
        (LLAMA | {"rope_theta": -1.0}, "rope_theta is -1.0; it must be a number above 0"),
        (LLAMA | {"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor is 0.5 in the rope scaling"),
        (yarn(factor=0.5), "factor is 0.5 in the rope scaling of type yarn; it must be at least 1"),
        (yarn(beta_fast=-1), "beta_fast is -1.0 in the rope scaling of type yarn; it must be at least 0"),
        (yarn(beta_slow=-1), "beta_slow is -1.0 in the rope scaling of type yarn; it must be at least 0"),
        (yarn(beta_fast=1, beta_slow=32), "beta_fast is 1.0 in the rope scaling of type yarn; it must be at least"),
        (yarn(beta_slow=33), "beta_slow is 33.0 in the rope scaling of type yarn; it must be at most beta_fast"),
        (yarn(attention_factor=-1.0), "attention_factor is -1.0 in the rope scaling of type yarn; it must be"),
        # 0.1 * m * ln(4) + 1 = 0
        (yarn(mscale=1.0, mscale_all_dim=-10 / math.log(4)), "it must not make 0.1 * mscale_all_dim * ln(factor) + 1"),
        (yarn(rope_theta=1.0), "it must not be 1: YaRN divides by its logarithm"),
        (yarn(original_max_position_embeddings=0), "original_max_position_embeddings is 0.0 in the rope scaling"),
        (yarn(original_max_position_embeddings=None), "original_max_position_embeddings is null beside a rope"),
        (yarn() | {"original_max_position_embeddings": None}, "original_max_position_embeddings is null beside a"),
        (llama3(factor=0.5), "factor is 0.5 in the rope scaling of type llama3; it must be at least 1"),
        (llama3(low_freq_factor=0), "low_freq_factor is 0.0 in the rope scaling of type llama3; it must be a number"),
        (llama3(low_freq_factor=4), "high_freq_factor is 4.0 in the rope scaling of type llama3; it must be greater"),
        (llama3(low_freq_factor=8), "high_freq_factor is 4.0 in the rope scaling of type llama3; it must be greater"),
        (DEEPSEEK | {"qk_rope_head_dim": 7}, "qk_rope_head_dim is 7; it must be even"),
        (DEEPSEEK | {"head_dim": 64}, "head_dim is 64; it must be qk_rope_head_dim"),
        (DEEPSEEK | {"q_lora_rank": 0}, "q_lora_rank is 0; it must be a positive integer"),
        (DEEPSEEK | {"n_shared_experts": -1}, "n_shared_experts is -1; it must be 0 or a positive integer"),
        (DEEPSEEK | {"n_shared_experts": None}, "field n_shared_experts is missing"),
        (DEEPSEEK | {"first_k_dense_replace": -1}, "first_k_dense_replace is -1; it must be 0 or a positive integer"),
        (DEEPSEEK | {"first_k_dense_replace": None}, "field first_k_dense_replace is missing"),
        (DEEPSEEK | {"num_nextn_predict_layers": -1}, "num_nextn_predict_layers is -1; it must be 0 or a positive"),
        (DEEPSEEK | {"first_k_dense_replace": 4}, "it must be at most num_hidden_layers 3"),
        (DEEPSEEK | {"n_group": 0}, "n_group is 0; it must be a positive integer"),
        (DEEPSEEK | {"topk_group": 0}, "topk_group is 0; it must be a positive integer"),
        (DEEPSEEK | {"routed_scaling_factor": 1}, "routed_scaling_factor is 1; transformers takes no integer"),
    ],
)
def test_an_impossible_number_is_refused_with_its_law(raw, words):
    with pytest.raises(ConfigError) as caught:
        shape_from_config(raw, "here/config.json")
    assert "here/config.json: " in str(caught.value) and words in str(caught.value)


def test_all_decoder_layers_may_be_dense():
    """MTP layers, from layer 3 on, have experts then; without them first_k_dense_replace may be any number."""
    shape = shape_from_config(DEEPSEEK | {"first_k_dense_replace": 3})
    assert [shape.is_moe_layer(layer) for layer in range(4)] == [False, False, False, True]
    shape = shape_from_config(DEEPSEEK | {"first_k_dense_replace": 9, "num_nextn_predict_layers": 0})
    assert not any(shape.is_moe_layer(layer) for layer in range(3))


@pytest.mark.parametrize(
    ("raw", "positions"),
    [
        (yarn(), 64),
        (LLAMA | {"rope_scaling": {"type": "yarn", "factor": 4.0}}, 256),
        (LLAMA | {"rope_scaling": {"type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 32}, 32),
    ],
)
def test_the_positions_before_a_scaling_are_transformers(raw, positions):
    """Its own, the field beside it, or max_position_embeddings; the oracle is the class itself."""
    from transformers import CONFIG_MAPPING

    theirs = CONFIG_MAPPING["llama"].from_dict({key: value for key, value in raw.items() if key != "model_type"})
    theirs.standardize_rope_params()  # as its models and vLLM do
    assert theirs.rope_parameters["original_max_position_embeddings"] == positions
    assert shape_from_config(raw).rope.factors["original_max_position_embeddings"] == positions
