"""What becomes of each config.json field, by architecture: the one table.

A field is honoured, or has no effect on what is computed here, or may hold only the values that are built (any other is
refused by its name). The names are those of the transformers configuration classes and of the publishers' own code;
tests/model/test_config_fields.py changes every field of every class and holds the result to transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

ARCHITECTURES = ("deepseek_v2", "deepseek_v3", "llama", "qwen2", "qwen3", "qwen3_moe")

LATENT = ("deepseek_v2", "deepseek_v3")
"""Those with latent attention."""

MODEL_TYPES = {"kimi_k2": "deepseek_v3"}
"""Other names of an architecture: Kimi-K2's folders bring DeepSeek-V3's classes under their own model_type."""

ALIASES = {
    "deepseek_v2": {"num_experts": "n_routed_experts"},
    "deepseek_v3": {"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"},
    "qwen3_moe": {"num_local_experts": "num_experts"},
}
"""Other spellings of transformers 5, and the published ones."""

_COMMON_DEFAULTS = {
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "initializer_range": 0.02, "tie_word_embeddings": False,
    "rope_theta": 10000.0,
}  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {
    "deepseek_v2": _COMMON_DEFAULTS
    | {
        "n_shared_experts": 2, "routed_scaling_factor": 1.0, "q_lora_rank": 1536, "n_group": None, "topk_group": None,
        "first_k_dense_replace": 0, "topk_method": "greedy",
    },
    "deepseek_v3": _COMMON_DEFAULTS
    | {
        "n_shared_experts": 1, "routed_scaling_factor": 2.5, "q_lora_rank": 1536, "n_group": 8, "topk_group": 4,
        "first_k_dense_replace": 3, "norm_topk_prob": True,
    },
    "llama": _COMMON_DEFAULTS | {"attention_bias": False},
    "qwen2": _COMMON_DEFAULTS | {"num_key_value_heads": 32},
    "qwen3": _COMMON_DEFAULTS | {"num_key_value_heads": 32, "head_dim": 128},
    "qwen3_moe": _COMMON_DEFAULTS
    | {"num_key_value_heads": 4, "norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": None},
}  # fmt: skip
"""What transformers takes for an absent field (its classes' own defaults; a test compares). Sizes are not among them
unless a published folder leaves them out: a config without them is refused."""

_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "initializer_range",
    "rope_theta", "rope_scaling", "rope_parameters", "quantization_config", "architectures", "num_labels", "id2label",
)  # fmt: skip
_DEEPSEEK = (
    "moe_intermediate_size", "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "n_group", "topk_group",
    "first_k_dense_replace", "routed_scaling_factor", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim",
    "qk_rope_head_dim", "v_head_dim",
)  # fmt: skip
_HONOURED = {
    "deepseek_v2": (*_DEEPSEEK, "num_experts", "topk_method"),
    "deepseek_v3": (*_DEEPSEEK, "num_local_experts", "norm_topk_prob", "num_nextn_predict_layers", "num_mtp_layers"),
    "llama": ("head_dim", "attention_bias"),
    "qwen2": ("head_dim",),
    "qwen3": ("head_dim",),
    "qwen3_moe": (
        "head_dim", "moe_intermediate_size", "num_experts", "num_local_experts", "num_experts_per_tok",
        "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers",
    ),
}  # fmt: skip

_FULL = "full_attention"
_LIMITED: dict[str, tuple[tuple[Any, ...], str]] = {
    "hidden_act": (("silu", "swish"), "SwiGLU"),
    "attention_bias": ((False,), "vLLM leaves out the output's bias, or Megatron the latents'"),
    "mlp_bias": ((False,), "feed-forward projections have no biases"),
    "use_sliding_window": ((False,), "attention is to all that came before"),
    "layer_types": ((_FULL,), "attention is to all that came before; each entry of the list is held to it"),
    "partial_rotary_factor": ((1.0,), "all of a head is rotated"),
    "is_causal": ((True,), "attention is to all that came before"),
    "transformers_weights": (
        ("model.safetensors", "model.safetensors.index.json"),
        "transformers alone would load another file",
    ),
}
_CHUNKS = {"dual_chunk_attention_config": ((None,), "vLLM alone reads it, and attends otherwise")}
_LIMITED_BY_ARCHITECTURE: dict[str, dict[str, tuple[tuple[Any, ...], str]]] = {
    "llama": {
        "bias": ((False,), "vLLM alone reads it: use attention_bias"),
        "logit_scale": ((1.0,), "vLLM alone reads it"),
    },
    "qwen2": {**_CHUNKS, "qk_norm": ((False,), "vLLM alone reads it")},
    "qwen3": _CHUNKS,
    "qwen3_moe": {**_CHUNKS, "shared_expert_intermediate_size": ((0,), "vLLM alone reads it")},
    "deepseek_v2": {
        "scoring_func": (("softmax",), "DeepSeek-V2's router"),
        "norm_topk_prob": ((False,), "vLLM alone reads it"),
        "moe_layer_freq": ((1,), "every layer after the dense ones has experts"),
    },
    "deepseek_v3": {
        "index_topk": ((None,), "the sparse attention of DeepSeek-V3.2"),
        "rope_interleave": ((True,), "Megatron-Core and vLLM pair neighbours"),
        "scoring_func": (("sigmoid",), "DeepSeek-V3's router"),
        "topk_method": (("noaux_tc",), "DeepSeek-V3's router"),
        "moe_layer_freq": ((1,), "every layer after the dense ones has experts"),
    },
}
WITHOUT_EFFECT = {
    "attention_dropout": "training here has no dropout",
    "use_cache": "of generation",
    "pad_token_id": "of tokenization", "bos_token_id": "of tokenization", "eos_token_id": "of tokenization",
    "pretraining_tp": "not read by transformers 5",
    "output_router_logits": "of transformers' training", "router_aux_loss_coef": "of transformers' training",
    "sliding_window": "while use_sliding_window is false", "max_window_layers": "while use_sliding_window is false",
    "transformers_version": "a note", "dtype": "train.dtype decides", "torch_dtype": "train.dtype decides",
    "output_hidden_states": "of transformers' output", "return_dict": "of transformers' output",
    "label2id": "names", "problem_type": "of transformers' training",
    "chunk_size_feed_forward": "not read by these models", "is_encoder_decoder": "not read by these models",
}  # fmt: skip

_WITHOUT_EFFECT_BY_ARCHITECTURE = {
    "deepseek_v2": {"head_dim": "set from qk_rope_head_dim"},
    "qwen2": {"attention_bias": "not read: queries, keys and values have biases, whatever it says"},
}


@dataclass(frozen=True, slots=True)
class Field:
    """`values` are the only ones built, for a limited field; `note` says why, or why a field has no effect."""

    name: str
    treatment: Literal["honoured", "limited", "without effect"]
    values: tuple[Any, ...] = ()
    note: str = ""


def config_fields(architecture: str) -> tuple[Field, ...]:
    """Every field that is known for `architecture`, for the reader and for docs/models.md."""
    return tuple(_fields(architecture))


def _fields(architecture: str) -> Iterator[Field]:
    for name in (*_SIZES, *_HONOURED[architecture]):
        yield Field(name, "honoured")
    for name, (values, note) in limited_fields(architecture).items():
        yield Field(name, "limited", values, note)
    for name, note in (WITHOUT_EFFECT | _WITHOUT_EFFECT_BY_ARCHITECTURE.get(architecture, {})).items():
        yield Field(name, "without effect", note=note)


def limited_fields(architecture: str) -> Mapping[str, tuple[tuple[Any, ...], str]]:
    """Fields that would change the computation: (the values that are built, why no others)."""
    limited = _LIMITED | _LIMITED_BY_ARCHITECTURE.get(architecture, {})
    others = {*_HONOURED[architecture], *_WITHOUT_EFFECT_BY_ARCHITECTURE.get(architecture, ())}
    return {name: entry for name, entry in limited.items() if name not in others}
