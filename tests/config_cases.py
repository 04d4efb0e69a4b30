"""Tiny models for the tests of config.json: a base of each architecture, and other values for each of its fields.

The base gives only what makes the model tiny; everything else is left to the transformers class's own default.
"""

from __future__ import annotations

from typing import Any

import torch

TINY = {
    "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 40, "max_position_embeddings": 256,
}  # fmt: skip
_LATENT_TINY = TINY | {
    "num_key_value_heads": 4, "q_lora_rank": 12, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 12, "n_routed_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}  # fmt: skip
BASES: dict[str, dict[str, Any]] = {
    "deepseek_v2": _LATENT_TINY,
    "deepseek_v3": _LATENT_TINY | {"num_nextn_predict_layers": 0},
    "llama": TINY,
    "qwen2": TINY,
    "qwen3": TINY | {"head_dim": 16},
    "qwen3_moe": TINY | {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 32,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
}  # fmt: skip

ALTERNATIVES: dict[str, list[Any]] = {
    "vocab_size": [53], "hidden_size": [48], "intermediate_size": [56], "moe_intermediate_size": [24],
    "num_hidden_layers": [3], "num_attention_heads": [8], "num_key_value_heads": [4, 1, None],
    "n_shared_experts": [2], "n_routed_experts": [24], "num_experts": [6], "routed_scaling_factor": [1.0, 0.7],
    "kv_lora_rank": [20], "q_lora_rank": [None, 20], "qk_rope_head_dim": [12], "v_head_dim": [8],
    "qk_nope_head_dim": [12], "head_dim": [24], "n_group": [1, 4], "topk_group": [2, 8],
    "num_experts_per_tok": [1, 3, 6, 8], "first_k_dense_replace": [0, 2], "norm_topk_prob": [False, True],
    "hidden_act": ["swish", "gelu"], "max_position_embeddings": [512], "initializer_range": [0.1],
    "rms_norm_eps": [1e-3, 1e-5], "tie_word_embeddings": [True], "rope_interleave": [False, None],
    "rope_parameters": [YARN, LLAMA3, {"rope_type": "linear", "factor": 2.0}, {"rope_theta": 500.0},
                        {"rope_type": "dynamic", "factor": 2.0}],
    "topk_method": ["group_limited_greedy", "noaux_tc"],
    "attention_bias": [True], "mlp_bias": [True], "use_sliding_window": [True], "sliding_window": [4],
    "max_window_layers": [0], "layer_types": [["full_attention", "sliding_attention"], ["full_attention"] * 2],
    "decoder_sparse_step": [2], "mlp_only_layers": [[0], [1]], "num_mtp_layers": [0],
    # What follows changes no logits.
    "attention_dropout": [0.5], "use_cache": [False], "pad_token_id": [3], "bos_token_id": [3], "eos_token_id": [3],
    "pretraining_tp": [2], "output_router_logits": [True], "router_aux_loss_coef": [0.5],
    "transformers_version": ["4.0"], "architectures": [["AnyForCausalLM"]], "output_hidden_states": [True],
    "return_dict": [False], "dtype": ["bfloat16"], "chunk_size_feed_forward": [4], "is_encoder_decoder": [True],
    "id2label": [{"0": "a"}], "label2id": [{"a": 0}], "problem_type": ["regression"],
}  # fmt: skip
"""By field, for whichever class has it. A field that is not here fails the test: look what it does, then add it."""

_YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
_DENSE = {
    "yarn by type": {"rope_scaling": _YARN},
    "yarn by rope_type": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
    "yarn by both": {"rope_theta": 5e4, "rope_scaling": _YARN | {"rope_type": "yarn"}},
    "yarn with attention_factor": {"rope_scaling": _YARN | {"attention_factor": 1.7}},
    "yarn with betas": {"rope_scaling": _YARN | {"beta_fast": 16, "beta_slow": 2}},
    "yarn without truncation": {"rope_scaling": _YARN | {"truncate": False}},
    "yarn with mscale": {"rope_scaling": _YARN | {"mscale": 0.7}},
    "yarn with mscale_all_dim": {"rope_scaling": _YARN | {"mscale_all_dim": 0.7}},
    "yarn with both mscales": {"rope_scaling": _YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}},
    "yarn with mscale 0": {"rope_scaling": _YARN | {"mscale": 0, "mscale_all_dim": 1.0}},
    "yarn with mscale_all_dim 0": {"rope_scaling": _YARN | {"mscale": 1.0, "mscale_all_dim": 0}},
    "yarn with an unknown number": {"rope_scaling": _YARN | {"attn_factor": 2.0}},
    "yarn with mscale below 0": {"rope_scaling": _YARN | {"mscale": -1, "mscale_all_dim": 1.0}},
    "yarn with betas of 0": {"rope_scaling": _YARN | {"beta_fast": 0, "beta_slow": 0}},
    "yarn with one beta": {"rope_scaling": _YARN | {"beta_fast": 4, "beta_slow": 4}},
    "yarn of factor 1": {"rope_scaling": _YARN | {"factor": 1}},
    "yarn with a whole attention_factor": {"rope_scaling": _YARN | {"attention_factor": 2}},
    "yarn of all positions": {"rope_scaling": {"type": "yarn", "factor": 4.0}},
    "yarn of positions beside it": {
        "rope_scaling": {"type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 32,
    },
    "llama3 of all positions": {
        "rope_scaling": {name: value for name, value in LLAMA3.items() if not name.startswith("original")},
    },
    "llama3": {"rope_scaling": LLAMA3 | {"low_freq_factor": 2.0, "high_freq_factor": 8.0}},
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "rope_theta alone": {"rope_theta": 500.0},
    "both spellings": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rope_scaling": _YARN},
    "both spellings and rope_theta": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rope_scaling": _YARN, "rope_theta": 700.0,
    },
    "part of a head": {"partial_rotary_factor": 0.5},
}  # fmt: skip


def _routing(top_k: int, groups: int, kept: int, experts: int = 16, **further: Any) -> dict[str, Any]:
    return {
        "num_experts_per_tok": top_k, "n_group": groups, "topk_group": kept, "n_routed_experts": experts,
    } | further  # fmt: skip


_PUBLISHED = {  # DeepSeek-V3's own fields
    "rope_scaling": {
        "type": "yarn", "factor": 40, "original_max_position_embeddings": 32, "beta_fast": 32, "beta_slow": 1,
        "mscale": 1.0, "mscale_all_dim": 1.0,
    },
    "scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1, "ep_size": 1, "seq_aux": True,
    "aux_loss_alpha": 0.001,
}  # fmt: skip
_LATENT = {
    "published": _PUBLISHED,
    **{
        f"k{top_k} g{groups} tg{kept} of {experts}": _routing(top_k, groups, kept, experts)
        for top_k, groups, kept, experts in (
            (2, 4, 2, 16), (3, 4, 2, 16), (4, 4, 3, 16), (6, 4, 2, 16), (8, 4, 2, 16), (6, 8, 4, 32), (4, 2, 1, 16),
            (1, 4, 2, 16), (1, 1, 1, 16), (8, 8, 4, 32), (4, 4, 4, 16),
        )
    },
    "more heads": {"num_attention_heads": 8, "num_key_value_heads": 8},
    "k1 unnormalised": _routing(1, 1, 1, norm_topk_prob=False),
    "k4 unnormalised in groups": _routing(4, 4, 2, norm_topk_prob=False),
    "scaling 0": {"routed_scaling_factor": 0.0},
    "scaling below 0": {"routed_scaling_factor": -1.0},
    "scaling 1 in groups": _routing(3, 4, 2, routed_scaling_factor=1.0),
    "too many for the groups": _routing(9, 4, 2),
    "groups of one": _routing(4, 16, 8),
    "a plain query with yarn": {"q_lora_rank": None, "rope_scaling": _YARN | {"mscale_all_dim": 0.7}},
    "latent norms beside eps 1e-2": {"rms_norm_eps": 1e-2},
    "latent norms beside eps 1e-2, plain query": {"rms_norm_eps": 1e-2, "q_lora_rank": None},
    "scored by softmax": {"scoring_func": "softmax"},
    "chosen greedily": {"topk_method": "greedy"},
    "experts in every second layer": {"moe_layer_freq": 2},
}  # fmt: skip
_GROUPS = {"topk_method": "group_limited_greedy"}
_DEEPSEEK_V2 = {
    "published Lite": {
        "rope_scaling": {
            "type": "yarn", "factor": 40, "original_max_position_embeddings": 32, "beta_fast": 32, "beta_slow": 1,
            "mscale": 0.707, "mscale_all_dim": 0.707,
        },
        "q_lora_rank": None, "scoring_func": "softmax", "topk_method": "greedy", "moe_layer_freq": 1, "ep_size": 1,
        "seq_aux": True, "aux_loss_alpha": 0.001, "n_group": 1, "topk_group": 1, "norm_topk_prob": False,
    },
    "in groups": _routing(6, 8, 3, 32, routed_scaling_factor=16.0, **_GROUPS),
    "one of a group": _routing(1, 4, 2, **_GROUPS),
    "groups that greed passes over": _routing(4, 4, 2),
    "one expert": {"num_experts_per_tok": 1},
    "groups of one expert each": _routing(4, 16, 8, **_GROUPS),
    "renormalised": {"norm_topk_prob": True},
    "scored by sigmoid": {"scoring_func": "sigmoid"},
    "latent norms beside eps 1e-2": {"rms_norm_eps": 1e-2},
    "scaling 0": {"routed_scaling_factor": 0.0},
}  # fmt: skip
_QWEN3_MOE = {
    "k1 normalised": {"num_experts_per_tok": 1, "norm_topk_prob": True},
    "k1": {"num_experts_per_tok": 1, "norm_topk_prob": False},
    "k3 normalised": {"num_experts_per_tok": 3, "norm_topk_prob": True},
    "dense in the middle": {"num_hidden_layers": 4, "mlp_only_layers": [2]},
    "every second, and one listed": {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [1]},
    "none with experts": {"mlp_only_layers": [0, 1]},
}
_SLIDING = {
    "sliding layers": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "listed sliding layers": {
        "use_sliding_window": True, "sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"],
    },
}  # fmt: skip
COMPUTED = (
    "yarn with mscale below 0", "yarn with betas of 0", "yarn with one beta", "yarn of factor 1",
    "yarn with a whole attention_factor", "yarn of all positions", "yarn of positions beside it",
    "llama3 of all positions", "scaling 0", "scaling below 0", "a switch that is not read",
)  # fmt: skip
"""Of the combinations below, numbers that look odd and that transformers computes: they must not be refused."""

COMBINATIONS: dict[str, dict[str, dict[str, Any]]] = {
    "deepseek_v2": _DENSE | _DEEPSEEK_V2,
    "deepseek_v3": _DENSE | _LATENT,
    "llama": _DENSE | {"no mention of rope": {}, "biases and yarn": {"attention_bias": True, "rope_scaling": _YARN}},
    "qwen2": _DENSE | _SLIDING | {"a switch that is not read": {"attention_bias": True}},
    "qwen3": _DENSE | _SLIDING | {"no head_dim": {"head_dim": ...}},
    "qwen3_moe": _DENSE | _SLIDING | _QWEN3_MOE,
}
"""By architecture: what is changed in its base; ... takes the field out."""


def config_of(architecture: str, change: dict[str, Any]) -> dict[str, Any]:
    """A config.json: the base with `change`."""
    fields = {"model_type": architecture} | BASES[architecture] | change
    return {name: value for name, value in fields.items() if value is not ...}


def make_model(config: dict[str, Any]):
    """transformers' own model of a config.json, seeded, in fp32, with weights far enough from 0 that fields show."""
    import copy

    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    made = CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(config))
    made.return_dict = True  # the form in which the models here give their output, whatever the file says
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(made, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            noise = torch.randn(tensor.shape, generator=generator)
            if "norm" in name:
                tensor.copy_(1 + 0.1 * noise)
            elif "_a_proj" in name:
                tensor.copy_(0.02 * noise)  # small latents, beside which a norm's epsilon shows
            elif name.endswith("bias"):
                tensor.copy_(0.1 * noise)
            elif "inv_freq" not in name:
                tensor.copy_(noise / tensor.shape[-1] ** 0.5)
    return model
