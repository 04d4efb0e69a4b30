"""Qwen2 and Qwen2.5: queries, keys and values have biases."""

from __future__ import annotations

from megatron_r1.config.architectures.base import CHUNKS, PAIRS, WINDOW, Architecture, plain

ARCHITECTURE = Architecture(
    name="qwen2",
    classifier="Qwen2ForSequenceClassification",
    read=lambda given: plain(given, qkv_bias=True),
    defaults={"num_key_value_heads": 32},
    honoured=("head_dim",),
    limited={**CHUNKS, "qk_norm": ((False,), "vLLM alone reads it")},
    without_effect={**WINDOW, "attention_bias": "not read: queries, keys and values have biases, whatever it says"},
    laws=(PAIRS,),
    serves_head_dim=False,
)
