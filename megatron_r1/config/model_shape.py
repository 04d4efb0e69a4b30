"""What a model is, in numbers: all that its builder, the weight table, validation and the planner need to know."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_r1.config.rope import RopeShape

LATENT_NORM_EPS = 1e-6
"""Of q_a_layernorm and kv_a_layernorm, whatever rms_norm_eps is: DeepseekV3RMSNorm's own default in transformers and
in DeepSeek's published code."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MLAShape:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): ranks and per-head widths."""

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_dim: int
    qk_rope_dim: int
    v_dim: int
    norm_eps: float = LATENT_NORM_EPS


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEShape:
    """Mixture of experts. `router` is sigmoid with a score-correction bias (DeepSeek-V3; its groups are
    ranked by their best two experts) or softmax (Qwen3-MoE, DeepSeek-V2; by their best). `dense_layers`
    are the decoder layers without experts."""

    num_experts: int
    top_k: int
    expert_ffn_size: int
    num_shared_experts: int
    dense_layers: frozenset[int]
    router: str
    num_groups: int
    topk_groups: int
    routed_scaling: float
    normalise_topk: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    norm_eps: float
    max_positions: int
    tie_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    """Whether attention's output projection has a bias."""
    qk_norm: bool
    init_std: float
    rope: RopeShape
    mla: MLAShape | None
    moe: MoEShape | None
    num_mtp_layers: int
    fp8_block: int | None = None
    """Side of the square blocks that share a scale, if the folder's linear weights are FP8 (e4m3); else None."""
    reward_head: bool = False
    """One value per token, not a distribution over the vocabulary (transformers' ...ForSequenceClassification)."""

    def is_moe_layer(self, layer: int) -> bool:
        """Whether decoder layer `layer` (from 0; MTP layers follow the decoder's) has routed experts."""
        return self.moe is not None and layer not in self.moe.dense_layers
