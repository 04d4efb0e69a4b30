"""config.json of published models: the fields that change the computation, and the sizes.

Typed by hand, without the published files at hand: compare with your folder's own where it matters.
`tiny` narrows a model: its widths, depth and number of experts, the lengths that its rope is scaled over, and a
window that is switched off; every switch, rope type, epsilon and routing rule stays as published.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168,
    "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8,
    "n_group": 8, "topk_group": 4, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True,
    "routed_scaling_factor": 2.5, "first_k_dense_replace": 3, "moe_layer_freq": 1, "q_lora_rank": 1536,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "hidden_act": "silu",
    "rms_norm_eps": 1e-6, "max_position_embeddings": 163840, "rope_theta": 10000, "attention_bias": False,
    "attention_dropout": 0.0, "num_nextn_predict_layers": 1, "tie_word_embeddings": False, "initializer_range": 0.02,
    "ep_size": 1, "rope_scaling": {
        "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
        "mscale": 1.0, "mscale_all_dim": 1.0,
    },
}  # fmt: skip
_V2_LITE = {key: value for key, value in _V3.items() if key != "num_nextn_predict_layers"} | {
    "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 2048,
    "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16, "intermediate_size": 10944,
    "moe_intermediate_size": 1408, "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6,
    "n_group": 1, "topk_group": 1, "topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False,
    "routed_scaling_factor": 1.0, "first_k_dense_replace": 1, "q_lora_rank": None, "aux_loss_alpha": 0.001,
    "seq_aux": True, "rope_scaling": _V3["rope_scaling"] | {"mscale": 0.707, "mscale_all_dim": 0.707},
}  # fmt: skip
_V2 = _V2_LITE | {
    "hidden_size": 5120, "num_hidden_layers": 60, "num_attention_heads": 128, "num_key_value_heads": 128,
    "intermediate_size": 12288, "moe_intermediate_size": 1536, "n_routed_experts": 160, "n_group": 8, "topk_group": 3,
    "topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0, "q_lora_rank": 1536,
}  # fmt: skip
_KIMI_K2 = _V3 | {
    "model_type": "kimi_k2", "vocab_size": 163840, "num_attention_heads": 64, "num_key_value_heads": 64,
    "n_routed_experts": 384, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827, "first_k_dense_replace": 1,
    "max_position_embeddings": 131072, "rope_theta": 50000.0, "num_nextn_predict_layers": 0, "rope_scaling": {
        "type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "beta_fast": 1.0, "beta_slow": 1.0,
        "mscale": 1.0, "mscale_all_dim": 1.0,
    },
}  # fmt: skip
_MOONLIGHT = {key: value for key, value in _V3.items() if key != "rope_scaling"} | {
    "vocab_size": 163840, "hidden_size": 2048, "num_hidden_layers": 27, "num_attention_heads": 16,
    "num_key_value_heads": 16, "intermediate_size": 11264, "moe_intermediate_size": 1408, "n_routed_experts": 64,
    "n_shared_experts": 2, "num_experts_per_tok": 6, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.446,
    "first_k_dense_replace": 1, "q_lora_rank": None, "rms_norm_eps": 1e-5, "max_position_embeddings": 8192,
    "rope_theta": 50000.0, "num_nextn_predict_layers": 0,
}  # fmt: skip


def _qwen2(hidden: int, heads: int, groups: int, layers: int, ffn: int, **further: Any) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 152064, "hidden_size": hidden,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": groups,
        "intermediate_size": ffn, "hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 131072,
        "rope_theta": 1000000.0, "use_sliding_window": False, "sliding_window": 131072, "max_window_layers": layers,
        "attention_dropout": 0.0, "initializer_range": 0.02, "tie_word_embeddings": False,
    } | further  # fmt: skip


def _qwen3(hidden: int, heads: int, layers: int, ffn: int, **further: Any) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936, "hidden_size": hidden,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128,
        "intermediate_size": ffn, "hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 40960,
        "rope_theta": 1000000, "rope_scaling": None, "use_sliding_window": False, "sliding_window": None,
        "max_window_layers": layers, "attention_bias": False, "attention_dropout": 0.0, "initializer_range": 0.02,
        "tie_word_embeddings": False,
    } | further  # fmt: skip


def _qwen3_moe(hidden: int, heads: int, layers: int, **further: Any) -> dict[str, Any]:
    return _qwen3(hidden, heads, layers, 3 * hidden) | {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_key_value_heads": 4,
        "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "router_aux_loss_coef": 0.001, "output_router_logits": False,
    } | further  # fmt: skip


def _llama(hidden: int, heads: int, groups: int, layers: int, ffn: int, **further: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": hidden,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": groups,
        "intermediate_size": ffn, "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 131072,
        "rope_theta": 500000.0, "attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False,
        "pretraining_tp": 1, "initializer_range": 0.02, "tie_word_embeddings": False, "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    } | further  # fmt: skip


_LLAMA2 = {
    "vocab_size": 32000, "max_position_embeddings": 4096, "rope_theta": 10000.0, "rope_scaling": None,
}  # fmt: skip
_MATH = {"max_position_embeddings": 4096, "rope_theta": 10000, "sliding_window": 4096}
_LONG = {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}
_SMALL3 = {"head_dim": 64, "tie_word_embeddings": True}

PUBLISHED: Mapping[str, dict[str, Any]] = {
    "DeepSeek-V2-Lite": _V2_LITE,
    "DeepSeek-V2, V2.5": _V2,
    "DeepSeek-V3, V3-0324, V3.1, R1, R1-0528, R1-Zero": _V3,
    "Kimi-K2-Base, -Instruct": _KIMI_K2,
    "Moonlight-16B-A3B": _MOONLIGHT,
    "Qwen2.5-0.5B": _qwen2(896, 14, 2, 24, 4864, vocab_size=151936, tie_word_embeddings=True),
    "Qwen2.5-1.5B": _qwen2(1536, 12, 2, 28, 8960, vocab_size=151936, tie_word_embeddings=True),
    "Qwen2.5-3B": _qwen2(2048, 16, 2, 36, 11008, vocab_size=151936, tie_word_embeddings=True),
    "Qwen2.5-7B": _qwen2(3584, 28, 4, 28, 18944),
    "Qwen2.5-14B": _qwen2(5120, 40, 8, 48, 13824, rms_norm_eps=1e-5),
    "Qwen2.5-32B": _qwen2(5120, 40, 8, 64, 27648, rms_norm_eps=1e-5),
    "Qwen2.5-72B": _qwen2(8192, 64, 8, 80, 29568, rms_norm_eps=1e-5),
    "Qwen2.5-7B-Instruct with YaRN, as its card says": _qwen2(3584, 28, 4, 28, 18944) | _LONG,
    "Qwen2.5-Math-1.5B": _qwen2(1536, 12, 2, 28, 8960, vocab_size=151936, tie_word_embeddings=True) | _MATH,
    "Qwen2.5-Math-7B": _qwen2(3584, 28, 4, 28, 18944) | _MATH,
    "R1-Distill-Qwen-1.5B": _qwen2(1536, 12, 2, 28, 8960, vocab_size=151936) | {"rope_theta": 10000},
    "R1-Distill-Qwen-7B": _qwen2(3584, 28, 4, 28, 18944) | {"rope_theta": 10000},
    "R1-Distill-Qwen-14B, -32B": _qwen2(5120, 40, 8, 48, 13824, rms_norm_eps=1e-5),
    "Qwen3-0.6B": _qwen3(1024, 16, 28, 3072, tie_word_embeddings=True),
    "Qwen3-1.7B, -4B": _qwen3(2560, 32, 36, 9728, tie_word_embeddings=True),
    "Qwen3-8B, -14B, -32B": _qwen3(4096, 32, 36, 12288),
    "Qwen3-8B with YaRN, as its card says": _qwen3(4096, 32, 36, 12288) | _LONG,
    "R1-0528-Qwen3-8B, its attn_factor written as attention_factor": _qwen3(4096, 32, 36, 12288)
    | {"max_position_embeddings": 131072, "rope_scaling": _LONG["rope_scaling"] | {"attention_factor": 1.0}},
    "Qwen3-30B-A3B": _qwen3_moe(2048, 32, 48),
    "Qwen3-235B-A22B": _qwen3_moe(4096, 64, 94, moe_intermediate_size=1536),
    "Llama-2-7b": _llama(4096, 32, 32, 32, 11008) | _LLAMA2,
    "Llama-2-70b": _llama(8192, 64, 8, 80, 28672) | _LLAMA2,
    "Llama-3.1-8B, R1-Distill-Llama-8B": _llama(4096, 32, 8, 32, 14336),
    "Llama-3.1-70B, Llama-3.3-70B, R1-Distill-Llama-70B": _llama(8192, 64, 8, 80, 28672),
    "Llama-3.2-1B": _llama(2048, 32, 8, 16, 8192, tie_word_embeddings=True, head_dim=64)
    | {"rope_scaling": _llama(1, 1, 1, 1, 1)["rope_scaling"] | {"factor": 32.0}},
    "Llama-3.2-3B": _llama(3072, 24, 8, 28, 8192, tie_word_embeddings=True, head_dim=128)
    | {"rope_scaling": _llama(1, 1, 1, 1, 1)["rope_scaling"] | {"factor": 32.0}},
}  # fmt: skip
"""By name. Models whose files differ in sizes alone share one."""

VOCABULARY = 104
POSITIONS = 256
ORIGINAL_POSITIONS = 32
"""Of scaled ropes: 96 tokens then lie beyond them."""


def tiny(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a narrow model that computes as the published one does."""
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    found = dict(config) | {
        "vocab_size": VOCABULARY, "hidden_size": 128, "num_hidden_layers": 3, "intermediate_size": 128,
        "num_attention_heads": 4, "num_key_value_heads": 4 if groups == heads else 1 if heads // groups > 4 else 2,
        "max_position_embeddings": POSITIONS,
    }  # fmt: skip
    if config.get("head_dim") is not None:
        found["head_dim"] = 32 if config["head_dim"] * heads == config["hidden_size"] else 64
    if config.get("sliding_window") is not None:
        found["sliding_window"] = 8
    if config.get("max_window_layers") is not None:
        found["max_window_layers"] = found["num_hidden_layers"]
    if isinstance(config.get("rope_scaling"), dict):
        found["rope_scaling"] = config["rope_scaling"] | {"original_max_position_embeddings": ORIGINAL_POSITIONS}
        original = config["rope_scaling"]["original_max_position_embeddings"]
        longer = config["max_position_embeddings"] // original * ORIGINAL_POSITIONS
        found["max_position_embeddings"] = max(POSITIONS, longer)
    if "n_routed_experts" in config:
        found |= {
            "n_routed_experts": 32, "moe_intermediate_size": 64, "first_k_dense_replace": 1, "kv_lora_rank": 48,
            "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32,
            "q_lora_rank": 64 if config["q_lora_rank"] else None,
        }  # fmt: skip
    if "num_experts" in config:
        found |= {"num_experts": 16, "moe_intermediate_size": 64}
    return found
