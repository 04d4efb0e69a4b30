"""Megatron's multi-token-prediction layer with a recomputation (train.recompute full) that works in every version.

Megatron's own hands all arguments of the layer to the checkpoint function:

- 0.16 and 0.17 positionally, the packing (PackedSeqParams) among them, which save_for_backward refuses; in FP8 by name,
  where Transformer Engine's function passes them on but gives their tensors no gradient.
- 0.18 adds a `padding_mask` that its own function does not take.

Here tensors go through the checkpoint and everything else rides in a closure, as Megatron has it from 0.19 on.
"""

# Megatron's annotations are narrower than what it takes.
# pyright: reportIncompatibleMethodOverride=false

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer


class RecomputedMTPLayer(MultiTokenPredictionLayer):
    """MultiTokenPredictionLayer; only what train.recompute full does with it is ours."""

    def _checkpointed_forward(self, *_: object, **inputs: Any) -> torch.Tensor:
        """hidden [S, 1, H] of the layer's `inputs`, whose activations are computed again in the backward pass."""
        names = [name for name, value in inputs.items() if isinstance(value, torch.Tensor)]
        others = {name: value for name, value in inputs.items() if name not in names}

        def forward(*tensors: torch.Tensor) -> torch.Tensor:
            return self._proj_and_transformer_layer(**dict(zip(names, tensors, strict=True)), **others)

        tensors, shared = [inputs[name] for name in names], self.config.distribute_saved_activations
        if not self.config.fp8:
            return tensor_parallel.checkpoint(forward, shared, *tensors)
        from megatron.core.extensions.transformer_engine import te_checkpoint

        # Scales of past values are stashed for the second pass only where FP8 is on around the checkpoint.
        around = get_fp8_context(self.config) if self.config.fp8_recipe == "delayed" else nullcontext()
        group = parallel_state.get_tensor_model_parallel_group()
        with around:
            return te_checkpoint(forward, shared, tensor_parallel.random.get_cuda_rng_tracker, group, *tensors)
