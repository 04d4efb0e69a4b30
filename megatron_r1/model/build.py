"""Build a Megatron-Core GPTModel from a ModelShape."""

# Megatron's annotations are narrower than what it takes.
# pyright: reportArgumentType=false

from __future__ import annotations

from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer import TransformerConfig

from megatron_r1.config.shape import ModelShape
from megatron_r1.model.policy_model import PolicyModel
from megatron_r1.model.spec import decoder_spec, mtp_spec


def build_model_chunks(
    shape: ModelShape, config: TransformerConfig, *, transformer_engine: bool, logprob_chunk_tokens: int = 1024
) -> list[PolicyModel]:
    """This rank's model: one PolicyModel, or one per virtual pipeline stage.

    Needs Megatron's parallel groups to exist. The vocabulary is padded to a multiple of the tensor-parallel size.
    """
    virtual = config.virtual_pipeline_model_parallel_size
    stages: list[int | None] = [None] if virtual is None else list(range(virtual))
    return [_build_chunk(shape, config, stage, transformer_engine, logprob_chunk_tokens) for stage in stages]


def padded_vocab_size(shape: ModelShape, tensor_parallel: int) -> int:
    """The vocabulary rounded up so that every tensor-parallel rank holds the same number of rows."""
    return -(-shape.vocab_size // tensor_parallel) * tensor_parallel


def _build_chunk(
    shape: ModelShape, config: TransformerConfig, stage: int | None, transformer_engine: bool, chunk_tokens: int
) -> PolicyModel:
    first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage)
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage)
    model = PolicyModel(
        config=config,
        transformer_layer_spec=decoder_spec(config, transformer_engine=transformer_engine, vp_stage=stage),
        vocab_size=padded_vocab_size(shape, config.tensor_model_parallel_size),
        max_sequence_length=shape.max_positions,
        pre_process=first,
        post_process=last,
        share_embeddings_and_output_weights=shape.tie_embeddings and not shape.reward_head,
        position_embedding_type="rope",
        rotary_base=shape.rope.theta,
        mtp_block_spec=mtp_spec(config, transformer_engine=transformer_engine, vp_stage=stage) if last else None,
        vp_stage=stage,
    )
    if shape.reward_head and last:
        model.add_reward_head()
    model.real_vocab_size = shape.vocab_size
    model.logprob_chunk_tokens = chunk_tokens
    if shape.mla is None and shape.rope.kind == "llama3":
        _scale_llama3_rope(model.rotary_pos_emb, shape)
    return model


def _scale_llama3_rope(rotary: RotaryEmbedding, shape: ModelShape) -> None:
    """Llama 3.x frequency scaling with the checkpoint's own numbers (Megatron's constructor fixes three of four)."""
    factors = shape.rope.factors
    rotary.inv_freq = rotary._apply_scaling(
        rotary.inv_freq,
        factor=factors["factor"],
        low_freq_factor=factors.get("low_freq_factor", 1.0),
        high_freq_factor=factors.get("high_freq_factor", 4.0),
        original_max_position_embeddings=int(factors["original_max_position_embeddings"]),
    )
