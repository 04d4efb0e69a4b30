"""What becomes of each config.json field: those of every architecture, and with them those of one (architectures/).

A field is honoured, or has no effect on what is computed here, or may hold only the values that are built (any other is
refused by its name). The names are those of the transformers configuration classes and of the publishers' own code;
tests/model/test_config_fields.py changes every field of every class and holds the result to transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from megatron_r1.config.architectures.base import Architecture, Limits

_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "initializer_range",
    "rope_theta", "rope_scaling", "rope_parameters", "quantization_config", "architectures", "num_labels", "id2label",
)  # fmt: skip
_FULL = "full_attention"
_LIMITED: dict[str, tuple[tuple[Any, ...], str]] = {
    "hidden_act": (("silu", "swish"), "SwiGLU"),
    "attention_bias": ((False,), "vLLM leaves out the output's bias, or Megatron the latents'"),
    "mlp_bias": ((False,), "feed-forward projections have no biases"),
    "use_sliding_window": ((False,), "attention is to all that came before"),
    "layer_types": ((_FULL,), "attention is to all that came before; each entry of the list is held to it"),
    "partial_rotary_factor": ((1.0,), "all of a head is rotated"),
    "is_causal": ((True,), "attention is to all that came before"),
    "sliding_window": ((None,), "vLLM alone reads it, and attends to that many"),
    "compression_config": ((None,), "vLLM alone reads it, for a quantisation"),
    "transformers_weights": (
        ("model.safetensors", "model.safetensors.index.json"),
        "transformers alone would load another file",
    ),
}
WITHOUT_EFFECT = {
    "attention_dropout": "training here has no dropout",
    "use_cache": "of generation",
    "pad_token_id": "of tokenization", "bos_token_id": "of tokenization", "eos_token_id": "of tokenization",
    "pretraining_tp": "not read by transformers 5",
    "output_router_logits": "of transformers' training", "router_aux_loss_coef": "of transformers' training",
    "max_window_layers": "while use_sliding_window is false",
    "transformers_version": "a note", "dtype": "train.dtype decides", "torch_dtype": "train.dtype decides",
    "output_hidden_states": "of transformers' output", "return_dict": "of transformers' output",
    "label2id": "names", "problem_type": "of transformers' training",
    "chunk_size_feed_forward": "not read by these models", "is_encoder_decoder": "not read by these models",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Field:
    """`values` are the only ones built, for a limited field; `note` says why, or why a field has no effect."""

    name: str
    treatment: Literal["honoured", "limited", "without effect"]
    values: tuple[Any, ...] = ()
    note: str = ""


def config_fields(architecture: Architecture) -> tuple[Field, ...]:
    """Every field that is known for `architecture`, for the reader and for docs/models.md."""
    return tuple(_fields(architecture))


def _fields(architecture: Architecture) -> Iterator[Field]:
    for name in (*_SIZES, *architecture.honoured):
        yield Field(name, "honoured")
    for name, (values, note) in limited_fields(architecture).items():
        yield Field(name, "limited", values, note)
    for name, note in (WITHOUT_EFFECT | dict(architecture.without_effect)).items():
        yield Field(name, "without effect", note=note)


def limited_fields(architecture: Architecture) -> Limits:
    """Fields that would change the computation: (the values that are built, why no others)."""
    limited = _LIMITED | dict(architecture.limited)
    others = {*architecture.honoured, *architecture.without_effect}
    return {name: entry for name, entry in limited.items() if name not in others}
