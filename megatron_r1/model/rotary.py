"""Scaled rotary embeddings: transformers computes the frequencies, Megatron-Core rotates.

Megatron has YaRN and Llama 3's scaling too, each with some of the numbers fixed or read in another way. One table of
frequencies and one factor say all that any of them does, and transformers' functions are what a checkpoint was made
for.
"""

# Megatron's annotations are narrower than what it takes.
# pyright: reportArgumentType=false

from __future__ import annotations

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from megatron_r1.config.shape import ModelShape, RopeShape


def rotary_frequencies(rope: RopeShape, width: int, max_positions: int) -> tuple[torch.Tensor, float]:
    """(f32[width / 2] radians a position, factor on cosine and sine) of a scaled rope, as transformers has them."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    factors = {key: int(value) if value.is_integer() else value for key, value in rope.factors.items()}
    if "attention_factor" in factors:
        factors["attention_factor"] = float(factors["attention_factor"])
    config = LlamaConfig(
        hidden_size=width,
        num_attention_heads=1,
        head_dim=width,
        max_position_embeddings=max_positions,
        rope_parameters={"rope_type": rope.kind, "rope_theta": rope.theta, **factors},
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS[rope.kind](config)
    return frequencies, float(factor)


def attention_factor(shape: ModelShape) -> float:
    """What a dense model's cosine and sine are multiplied by: attention scores are multiplied by its square."""
    if shape.rope.kind != "yarn":
        return 1.0
    return rotary_frequencies(shape.rope, shape.head_dim, shape.max_positions)[1]


class ScaledRotaryEmbedding(RotaryEmbedding):
    """Returns (angles f32[S, 1, 1, width], factor), as latent attention expects of Megatron's YarnRotaryEmbedding."""

    def __init__(self, rope: RopeShape, width: int, max_positions: int, cp_group: object) -> None:
        super().__init__(kv_channels=width, rotary_percent=1.0, rotary_base=rope.theta, cp_group=cp_group)
        frequencies, self.factor = rotary_frequencies(rope, width, max_positions)
        self.inv_freq = frequencies.to(self.inv_freq.device)

    def forward(self, max_seq_len: int, *args: object, **kwargs: object) -> tuple[torch.Tensor, float]:
        return super().forward(max_seq_len, *args, **kwargs), self.factor
