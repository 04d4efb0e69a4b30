"""Llama 2 and 3, and what has their config.json: SmolLM2, DeepSeek's Llama students."""

from __future__ import annotations

from typing import Any

from megatron_r1.config.architectures.base import PAIRS, Architecture, plain
from megatron_r1.config.laws import Law, whole_heads
from megatron_r1.config.reader import Reader


def read(given: Reader) -> dict[str, Any]:
    biases = given.boolean("attention_bias")
    return plain(given, qkv_bias=biases, output_bias=biases)


def refuse(given: Reader) -> None:
    if "qkv_bias" in given.raw and given.raw.get("attention_bias"):
        given.refuse("qkv_bias is given beside attention_bias, and vLLM alone reads it: remove it")


ARCHITECTURE = Architecture(
    name="llama",
    classifier="LlamaForSequenceClassification",
    read=read,
    defaults={"attention_bias": False},
    honoured=("head_dim", "attention_bias"),
    limited={
        "bias": ((False,), "vLLM alone reads it: use attention_bias"),
        "qkv_bias": ((False,), "vLLM alone reads it: use attention_bias"),
        "logit_scale": ((1.0,), "vLLM alone reads it"),
    },
    laws=(Law("initializer_range", lambda value, _: value <= 1, "be at most 1"), whole_heads(), PAIRS),
    refuse=refuse,
)
