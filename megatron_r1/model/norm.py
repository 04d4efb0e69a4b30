"""RMSNorm for the local (Transformer-Engine-free) spec.

Megatron's torch wrapper refuses sequence parallelism because torch's norm does not mark its weight; this one marks it,
so that Megatron all-reduces the norm's gradient over tensor-parallel ranks.
"""

# Megatron reads an attribute of the parameter.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """x * rsqrt(mean(x^2) + eps) * weight, over the last dimension; any leading shape."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel
