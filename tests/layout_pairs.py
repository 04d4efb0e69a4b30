"""Pairs of layouts, a trainer's and servers', of small models: for tests of what a weight sync sends."""

from __future__ import annotations

import dataclasses
from typing import Any

from config_cases import config_of
from hypothesis import strategies as st

from megatron_r1.config.schema import ParallelConfig
from megatron_r1.config.shape import ModelShape, shape_from_config

_WIDE = {
    "hidden_size": 64, "num_attention_heads": 16, "intermediate_size": 96, "vocab_size": 203, "num_hidden_layers": 4,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "v3": ("deepseek_v3", _WIDE | {"num_key_value_heads": 16, "moe_intermediate_size": 32, "n_routed_experts": 16}),
    "v3 dense first": ("deepseek_v3", _WIDE | {"num_key_value_heads": 16, "first_k_dense_replace": 3}),
    "qwen3 moe": (
        "qwen3_moe",
        _WIDE | {"head_dim": 8, "num_key_value_heads": 4, "num_experts": 16, "moe_intermediate_size": 32},
    ),
    "qwen2": ("qwen2", _WIDE | {"num_key_value_heads": 2}),
    "llama, tied": ("llama", _WIDE | {"num_key_value_heads": 4, "tie_word_embeddings": True}),
}


def shape_of(model: str) -> ModelShape:
    architecture, fields = MODELS[model]
    return dataclasses.replace(shape_from_config(config_of(architecture, fields)), num_mtp_layers=0)


@dataclasses.dataclass(frozen=True)
class Served:
    tensor: int
    expert_parallel: bool
    pipeline: int
    replicas: int


@st.composite
def pairs(draw) -> tuple[str, ParallelConfig, Served]:
    """(model, the trainer's layout, the servers'): TP, PP, VPP, EP, ETP, DP and CP there, TP, EP, PP and replicas here.
    Experts' sizes divide what a pipeline rank's ranks are."""
    model = draw(st.sampled_from(sorted(MODELS)))
    sparse = shape_of(model).moe is not None
    tensor = draw(st.sampled_from([1, 2, 4, 8]))
    context = draw(st.sampled_from([1, 1, 2]))
    data = draw(st.sampled_from([1, 2, 3, 4]))
    pipeline = draw(st.sampled_from([1, 2, 4]))
    virtual = draw(st.sampled_from([1, 2])) if pipeline == 2 else 1
    inner = tensor * context * data
    splits = [(ep, etp) for ep in (1, 2, 4, 8) for etp in (1, 2, 4) if inner % (ep * etp) == 0]
    expert, expert_tensor = draw(st.sampled_from(splits)) if sparse else (1, 1)
    trainer = ParallelConfig(
        tensor=tensor, pipeline_parallel=pipeline, virtual_pipeline=virtual, context=context, expert=expert,
        expert_tensor=expert_tensor, sequence=True, world_size=inner * pipeline,
    )  # fmt: skip
    served = Served(
        tensor=draw(st.sampled_from([1, 2, 4, 8])),
        expert_parallel=sparse and draw(st.booleans()),
        pipeline=draw(st.sampled_from([1, 1, 2])),
        replicas=draw(st.sampled_from([1, 2, 3])),
    )
    return model, trainer, served
