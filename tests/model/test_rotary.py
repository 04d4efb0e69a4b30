"""Frequencies of every rope scaling, field by field, beside those of transformers' own layer.

Heads are as wide as published ones: of narrow ones a ramp has two or three frequencies, and rounds alike whatever it is
told.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from megatron_r1.config.rope import ROPE_FIELDS
from megatron_r1.config.shape import shape_from_config
from megatron_r1.errors import ConfigError
from megatron_r1.model.rotary import rotary_frequencies

WIDTH = 64
BASE = {
    "vocab_size": 61, "hidden_size": 4 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 40, "max_position_embeddings": 256,
}  # fmt: skip
NUMBERS = {"factor": 4.0, "original_max_position_embeddings": 64, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
OTHERS = {
    "factor": [1.0, 40], "original_max_position_embeddings": [256], "low_freq_factor": [2.0], "high_freq_factor": [8.0],
    "attention_factor": [1.5], "beta_fast": [0, 16], "beta_slow": [0, 2], "mscale": [0, 0.7],
    "mscale_all_dim": [0, 1.0], "truncate": [False, True], "rope_theta": [5e5],
}  # fmt: skip
"""Values of each field besides null and none at all."""


def cases() -> dict[str, tuple[str, dict[str, Any]]]:
    """By name, (field, scaling): every type, with one field of it changed."""
    found = {}
    for kind, (needed, optional) in ROPE_FIELDS.items():
        usual = {"rope_type": kind} | {name: NUMBERS[name] for name in needed}
        found[kind] = "rope_type", usual
        for field in (*needed, *optional, "rope_theta", "rope_type", "partial_rotary_factor"):
            for value in [None, *OTHERS.get(field, [])]:
                found[f"{kind}, {field} {value}"] = field, usual | {field: value}
            found[f"{kind}, no {field}"] = field, {name: value for name, value in usual.items() if name != field}
    return found


def theirs(raw: dict[str, Any]) -> tuple[torch.Tensor, float]:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    layer = LlamaRotaryEmbedding(LlamaConfig(**copy.deepcopy(raw)))
    return layer.get_buffer("inv_freq"), layer.attention_scaling


@pytest.mark.parametrize("name", cases())
def test_frequencies_are_transformers_or_the_field_is_refused(name):
    field, scaling = cases()[name]
    raw = BASE | {"rope_scaling": scaling}
    try:
        shape = shape_from_config({"model_type": "llama", **raw})
    except ConfigError as error:
        assert field in str(error)
        return
    frequencies, factor = theirs(raw)
    if shape.rope.kind == "default":  # Megatron's own: theta^(-2i / width)
        ours = shape.rope.theta ** (-torch.arange(0, WIDTH, 2, dtype=torch.float32) / WIDTH), 1.0
    else:
        ours = rotary_frequencies(shape.rope, WIDTH, shape.max_positions)
    torch.testing.assert_close(ours[0], frequencies, rtol=1e-6, atol=0)
    assert ours[1] == pytest.approx(factor, rel=1e-12)
