"""ModelShape + layout -> Megatron's TransformerConfig.

A table of what each config.json number is called in Megatron; the layout and precision arrive beside it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_config import MLATransformerConfig

from megatron_r1.config.schema import FP8Config, ModelConfig, ParallelConfig, TrainConfig
from megatron_r1.config.shape import ModelShape
from megatron_r1.model.rotary import attention_factor
from megatron_r1.model.router import megatron_routes_alike

PARAMETER_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}


def transformer_config(
    shape: ModelShape,
    parallel: ParallelConfig,
    train: TrainConfig,
    model: ModelConfig | None = None,
    *,
    transformer_engine: bool,
) -> TransformerConfig:
    """The TransformerConfig of `shape` in this layout. Dropout is 0; the loss is a plain sum over tokens
    (`calculate_per_token_loss`), because token weights carry all normalisation."""
    fields: dict[str, Any] = {
        **_dense_fields(shape),
        **_parallel_fields(parallel),
        **_precision_fields(train),
        **(_fp8_fields(train.fp8, experts=shape.moe is not None) if train.dtype == "fp8" else {}),
        "transformer_impl": "transformer_engine" if transformer_engine else "local",
    }
    if shape.moe is not None:
        fields |= _moe_fields(shape, model.router_bias_update_rate if model else 0.0, transformer_engine)
    if shape.num_mtp_layers:
        fields["mtp_num_layers"] = shape.num_mtp_layers
    if train.recompute != "none":
        fields["recompute_granularity"] = train.recompute
        if train.recompute == "full":
            fields |= {"recompute_method": "uniform", "recompute_num_layers": 1}
        elif not transformer_engine:
            fields["recompute_modules"] = ["core_attn"]
    if shape.mla is None:
        return TransformerConfig(**fields)
    return MLATransformerConfig(**fields, **_mla_fields(shape))


def _dense_fields(shape: ModelShape) -> dict[str, Any]:
    # All of a dense model's head is rotated, so YaRN's factor on queries and keys is one on their product.
    factor = attention_factor(shape) if shape.mla is None else 1.0
    return {
        "softmax_scale": factor**2 / math.sqrt(shape.head_dim) if factor != 1.0 else None,
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "num_attention_heads": shape.num_heads,
        "num_query_groups": shape.num_kv_heads,
        "kv_channels": shape.head_dim,
        "ffn_hidden_size": shape.ffn_size,
        "layernorm_epsilon": shape.norm_eps,
        "init_method_std": shape.init_std,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "add_qkv_bias": shape.qkv_bias,
        "qk_layernorm": shape.qk_norm or shape.mla is not None,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "calculate_per_token_loss": True,
    }


def _parallel_fields(parallel: ParallelConfig) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline_parallel,
        "context_parallel_size": parallel.context,
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": parallel.expert_tensor,
        "sequence_parallel": parallel.sequence,
        # Packed rows differ in length between microbatches, so pipeline stages exchange shapes first.
        "variable_seq_lengths": parallel.pipeline_parallel > 1,
        # Megatron refuses its default together with that, also for models without experts.
        "moe_token_dispatcher_type": "alltoall",
    }
    if parallel.virtual_pipeline > 1:
        fields["virtual_pipeline_model_parallel_size"] = parallel.virtual_pipeline
        # Batched point-to-point would put two sends to the same peer in one batch at pipeline = 2, and swap them.
        fields |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    if parallel.pipeline_layout:
        fields["pipeline_model_parallel_layout"] = parallel.pipeline_layout
    return fields


def _precision_fields(train: TrainConfig) -> dict[str, Any]:
    dtype = PARAMETER_DTYPE[train.dtype]
    return {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "deterministic_mode": train.deterministic,
    }


def _fp8_fields(fp8: FP8Config, *, experts: bool) -> dict[str, Any]:
    """Megatron wraps the transformer layers alone in Transformer Engine's context: embedding and head are outside it,
    norms and router compute no FP8 product, and attention's own products are left out by name."""
    fields: dict[str, Any] = {
        "fp8": fp8.format,
        "fp8_recipe": fp8.recipe,
        "fp8_dot_product_attention": False,
        "fp8_multi_head_attention": False,
        "fp8_wgrad": True,
    }
    if fp8.recipe == "delayed":
        fields |= {"fp8_amax_history_len": fp8.amax_history, "fp8_amax_compute_algo": "max"}
    if fp8.first_layers_bf16 or fp8.last_layers_bf16:
        fields |= {
            "first_last_layers_bf16": True,
            "num_layers_at_start_in_bf16": fp8.first_layers_bf16,
            "num_layers_at_end_in_bf16": fp8.last_layers_bf16,
        }
    if experts:
        # An expert's tokens are the rows of its product, which must be a multiple of 16 (32 for mxfp8).
        fields["moe_router_padding_for_quantization"] = True
    return fields


def _moe_fields(shape: ModelShape, bias_update_rate: float, transformer_engine: bool) -> dict[str, Any]:
    moe = shape.moe
    assert moe is not None
    sigmoid = moe.router == "sigmoid"
    # What Megatron's router cannot say is said to ours (spec.py); these fields then only have to pass its checks.
    alike = megatron_routes_alike(moe)
    grouped = alike and moe.num_groups > 1
    return {
        "num_moe_experts": moe.num_experts,
        "moe_ffn_hidden_size": moe.expert_ffn_size,
        "moe_router_topk": moe.top_k,
        "moe_layer_freq": [int(shape.is_moe_layer(layer)) for layer in range(shape.num_layers)],
        "moe_shared_expert_intermediate_size": moe.num_shared_experts * moe.expert_ffn_size or None,
        "moe_router_score_function": moe.router,
        "moe_router_pre_softmax": not sigmoid and (not moe.normalise_topk or not alike),
        "moe_router_enable_expert_bias": sigmoid,
        "moe_router_bias_update_rate": bias_update_rate,
        "moe_router_num_groups": moe.num_groups if grouped else None,
        "moe_router_group_topk": moe.topk_groups if grouped else None,
        "moe_router_topk_scaling_factor": moe.routed_scaling,
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
        "moe_grouped_gemm": transformer_engine,
    }


def _mla_fields(shape: ModelShape) -> dict[str, Any]:
    mla, factors = shape.mla, shape.rope.factors
    assert mla is not None
    fields: dict[str, Any] = {
        "q_lora_rank": mla.q_lora_rank,
        "kv_lora_rank": mla.kv_lora_rank,
        "qk_head_dim": mla.qk_nope_dim,
        "qk_pos_emb_head_dim": mla.qk_rope_dim,
        "v_head_dim": mla.v_dim,
        "rotary_base": shape.rope.theta,
        "rope_type": "rope",
        "rotary_scaling_factor": 1.0,
    }
    if shape.rope.kind != "default":
        # build.py replaces Megatron's frequencies and factor; the scale of the scores comes from these two numbers.
        fields |= {
            "rope_type": "yarn",
            "rotary_scaling_factor": factors["factor"],
            "mscale_all_dim": factors.get("mscale_all_dim", 0.0),
        }
    return fields
