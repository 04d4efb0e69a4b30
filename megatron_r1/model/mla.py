"""Multi-latent attention as DeepSeek's checkpoints have it, where Megatron's differs.

Without query compression there is no norm between the layer's own and the query's projection. Megatron-Core 0.19 puts
one there when it is asked for the key-value norm (`qk_layernorm`): another function, with a weight that no checkpoint
has, and an error with the local spec.

Megatron's local spec splits the down projections over tensor-parallel ranks and gathers their output. The gather's
backward keeps only a rank's own slice, but the shared rotary key receives a gradient from the heads of every rank, so
the key's part from the other ranks is lost.
Transformer Engine's spec replicates these two small projections instead; here the same is done with plain torch.
"""

# Megatron's annotations are narrower than what it takes.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalCall=false

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules


class ReplicatedLinear(torch.nn.Module):
    """y = x W^T with the same W on every tensor-parallel rank; returns (y, None) as Megatron's linears do."""

    def __init__(self, config: TransformerConfig, in_size: int, out_size: int) -> None:
        super().__init__()
        device = torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.empty(out_size, in_size, dtype=config.params_dtype, device=device))
        config.init_method(self.weight)
        # Each rank sees its own tokens only; Megatron sums such gradients over tensor-parallel ranks.
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return F.linear(x, self.weight), None


class SpecifiedMLASelfAttention(MLASelfAttention):
    """MLASelfAttention with the query and key-value modules that its spec names, no others."""

    def _resolve_qk_norm_config(self, submodules: MLASelfAttentionSubmodules) -> dict[str, object]:
        """Called by megatron-core 0.19 and newer; older ones build what the spec names."""
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
        return {name: getattr(submodules, name) for name in names}


class LocalMLASelfAttention(SpecifiedMLASelfAttention):
    """MLASelfAttention whose down projections are ReplicatedLinear. Needs sequence parallelism if tensor > 1."""

    def __init__(self, config: TransformerConfig, *args: object, **kwargs: object) -> None:
        super().__init__(config, *args, **kwargs)
        if config.tensor_model_parallel_size > 1 and not config.sequence_parallel:
            raise ValueError("multi-latent attention with tensor parallelism needs parallel.sequence=True")
        hidden = config.hidden_size
        self.linear_kv_down_proj = ReplicatedLinear(config, hidden, config.kv_lora_rank + config.qk_pos_emb_head_dim)
        if config.q_lora_rank is not None:
            self.linear_q_down_proj = ReplicatedLinear(config, hidden, config.q_lora_rank)


def set_latent_epsilon(attention: torch.nn.Module, epsilon: float) -> None:
    """Give the norms of the latents their epsilon. They stand alone, or in Transformer Engine's linear behind them."""
    for norm, linear in (("q_layernorm", "linear_q_up_proj"), ("kv_layernorm", "linear_kv_up_proj")):
        candidates = [getattr(attention, name, None) for name in (norm, linear)]
        owners = [module for module in candidates if module is not None and hasattr(module, "eps")]
        if hasattr(attention, linear) and len(owners) != 1:
            raise TypeError(f"{type(attention).__name__}: the epsilon of {norm} is not where it is expected")
        for owner in owners:
            owner.eps = epsilon
