"""Architectures: one file each, and one line here."""

from __future__ import annotations

from megatron_r1.config.architectures import deepseek_v2, deepseek_v3, llama, qwen2, qwen3, qwen3_moe
from megatron_r1.config.architectures.base import Architecture

ARCHITECTURES: dict[str, Architecture] = {
    each.ARCHITECTURE.name: each.ARCHITECTURE for each in (deepseek_v2, deepseek_v3, llama, qwen2, qwen3, qwen3_moe)
}
"""By model_type."""


def architecture_of(model_type: object) -> Architecture | None:
    """The architecture that a config.json's model_type names; None if there is none."""
    named = (each for each in ARCHITECTURES.values() if model_type in (each.name, *each.other_names))
    return next(named, None)
