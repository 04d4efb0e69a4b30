"""Which modules a layer is made of: Transformer Engine's on GPUs, Megatron's local ones elsewhere.

Both come from Megatron's own spec functions. Into the local spec go parts of ours, because Megatron's cannot do
what the recipe needs: core attention (MLA, packed sequences, context parallel), RMSNorm (sequence parallel) and MLA's
down projections (gradients under tensor parallelism). Ours in both are latent attention without query compression
(mla.py says why), a router that chooses otherwise than Megatron's (router.py), and the recomputation of
multi-token-prediction layers (mtp.py).
"""

# Megatron's annotations are narrower than what it takes.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalIterable=false, reportIndexIssue=false

from __future__ import annotations

import copy
import dataclasses
import functools

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_decoder_layer_specs,
    get_gpt_mtp_block_spec,
)
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_r1.config.shape import ModelShape, MoEShape
from megatron_r1.model.attention import SDPACoreAttention
from megatron_r1.model.mla import LocalMLASelfAttention, SpecifiedMLASelfAttention
from megatron_r1.model.mtp import RecomputedMTPLayer
from megatron_r1.model.norm import RMSNorm
from megatron_r1.model.router import SpecifiedRouter, megatron_routes_alike


def decoder_spec(
    config: TransformerConfig, shape: ModelShape, *, transformer_engine: bool, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """The decoder layers that this pipeline rank (and virtual stage) builds."""
    spec = get_gpt_decoder_block_spec(
        config, use_transformer_engine=transformer_engine, normalization="RMSNorm", vp_stage=vp_stage
    )
    layers = [_own_parts(layer, config, shape, transformer_engine=transformer_engine) for layer in spec.layer_specs]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=spec.layer_norm if transformer_engine else RMSNorm)


def mtp_spec(
    config: TransformerConfig, shape: ModelShape, *, transformer_engine: bool, vp_stage: int | None
) -> MultiTokenPredictionBlockSubmodules | None:
    """The multi-token-prediction layers, on the last pipeline stage only; None elsewhere or if there are none.

    An MTP layer is built as the next decoder layer would be: with experts, also where every decoder layer is dense.
    """
    if not config.mtp_num_layers:
        return None
    sparse = copy.copy(config)
    sparse.moe_layer_freq = [1] * config.num_layers
    last_layer = get_gpt_decoder_layer_specs(sparse, transformer_engine, "RMSNorm")[-1]
    last_layer = _own_parts(last_layer, config, shape, transformer_engine=transformer_engine)
    spec = get_gpt_mtp_block_spec(config, last_layer, use_transformer_engine=transformer_engine, vp_stage=vp_stage)
    if spec is None:
        return None
    norms = {} if transformer_engine else {"enorm": RMSNorm, "hnorm": RMSNorm, "layer_norm": RMSNorm}
    layers = [
        ModuleSpec(
            module=RecomputedMTPLayer,
            params=layer.params,
            submodules=dataclasses.replace(layer.submodules, **norms),
        )
        for layer in spec.layer_specs
    ]
    return MultiTokenPredictionBlockSubmodules(layer_specs=layers)


def _own_parts(
    layer: ModuleSpec, config: TransformerConfig, shape: ModelShape, *, transformer_engine: bool
) -> ModuleSpec:
    if shape.moe is not None and _is_sparse(layer) and not megatron_routes_alike(shape.moe):
        layer = _with_router(layer, shape.moe)
    if shape.output_bias:
        layer = _with_output_bias(layer)
    if not transformer_engine:
        return _localise(layer, config)
    if not config.multi_latent_attention or config.q_lora_rank is not None:
        return layer
    attention = dataclasses.replace(layer.submodules.self_attention, module=SpecifiedMLASelfAttention)
    return dataclasses.replace(layer, submodules=dataclasses.replace(layer.submodules, self_attention=attention))


def _with_output_bias(layer: ModuleSpec) -> ModuleSpec:
    """The same layer with a bias in attention's output projection; Megatron has one switch for that and all others."""
    attention = layer.submodules.self_attention
    linear: type = attention.submodules.linear_proj

    class Biased(linear):  # pyright: ignore[reportGeneralTypeIssues]
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **{**kwargs, "bias": True})

    attention = dataclasses.replace(attention, submodules=dataclasses.replace(attention.submodules, linear_proj=Biased))
    return dataclasses.replace(layer, submodules=dataclasses.replace(layer.submodules, self_attention=attention))


def _with_router(layer: ModuleSpec, moe: MoEShape) -> ModuleSpec:
    """The same layer with our router."""
    mlp = layer.submodules.mlp
    router = functools.partial(SpecifiedRouter, moe=moe)
    if isinstance(mlp, functools.partial):
        submodules = dataclasses.replace(mlp.keywords["submodules"], router=router)
        mlp = functools.partial(mlp.func, *mlp.args, **{**mlp.keywords, "submodules": submodules})
    else:
        mlp = dataclasses.replace(mlp, submodules=dataclasses.replace(mlp.submodules, router=router))
    return dataclasses.replace(layer, submodules=dataclasses.replace(layer.submodules, mlp=mlp))


def _localise(layer: ModuleSpec, config: TransformerConfig) -> ModuleSpec:
    """The same layer with our core attention and norms."""
    attention = layer.submodules.self_attention
    norms = {
        name: RMSNorm
        for name in ("q_layernorm", "k_layernorm", "kv_layernorm")
        if getattr(attention.submodules, name, IdentityOp) not in (IdentityOp, None)
    }
    module = LocalMLASelfAttention if config.multi_latent_attention else attention.module
    submodules = dataclasses.replace(attention.submodules, core_attention=SDPACoreAttention, **norms)
    return ModuleSpec(
        module=layer.module,
        params=layer.params,
        submodules=dataclasses.replace(
            layer.submodules,
            input_layernorm=RMSNorm,
            pre_mlp_layernorm=RMSNorm,
            self_attention=ModuleSpec(module=module, params=attention.params, submodules=submodules),
            sharded_state_dict_keys_map=_transformer_engine_keys(layer, config),
        ),
        metainfo=layer.metainfo,
    )


def _transformer_engine_keys(layer: ModuleSpec, config: TransformerConfig) -> dict[str, str]:
    """Norms that Transformer Engine fuses into the linear behind them: a checkpoint holds them under its names.

    Megatron's own local spec leaves MLA's out, and maps a sparse layer's norm to a name that does not exist there.
    """
    if config.multi_latent_attention:
        keys = {
            "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
            "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
        }
    else:
        keys = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    if not _is_sparse(layer):
        keys["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    return keys


def _is_sparse(layer: ModuleSpec) -> bool:
    """Whether it has experts. The MLP is a ModuleSpec up to megatron-core 0.17, a functools.partial from 0.18."""
    mlp = layer.submodules.mlp
    return (mlp.func if isinstance(mlp, functools.partial) else mlp.module) is MoELayer
