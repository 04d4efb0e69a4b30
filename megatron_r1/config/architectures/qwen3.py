"""Qwen3: queries and keys are normalised, head by head."""

from __future__ import annotations

from megatron_r1.config.architectures.base import CHUNKS, PAIRS, WINDOW, Architecture, plain

ARCHITECTURE = Architecture(
    name="qwen3",
    classifier="Qwen3ForSequenceClassification",
    read=lambda given: plain(given, qk_norm=True),
    defaults={"num_key_value_heads": 32, "head_dim": 128},
    honoured=("head_dim",),
    limited=CHUNKS,
    without_effect=WINDOW,
    laws=(PAIRS,),
)
