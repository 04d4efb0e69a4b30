"""Build a Megatron-Core GPTModel from a ModelShape."""

# Megatron's annotations are narrower than what it takes.
# pyright: reportArgumentType=false

from __future__ import annotations

from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.multi_latent_attention import MultiLatentAttention

from megatron_r1.config.shape import ModelShape
from megatron_r1.model.mla import set_latent_epsilon
from megatron_r1.model.policy_model import PolicyModel
from megatron_r1.model.rotary import ScaledRotaryEmbedding, rotary_frequencies
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
        transformer_layer_spec=decoder_spec(config, shape, transformer_engine=transformer_engine, vp_stage=stage),
        vocab_size=padded_vocab_size(shape, config.tensor_model_parallel_size),
        max_sequence_length=shape.max_positions,
        pre_process=first,
        post_process=last,
        share_embeddings_and_output_weights=shape.tie_embeddings and not shape.reward_head,
        position_embedding_type="rope",
        rotary_base=shape.rope.theta,
        mtp_block_spec=mtp_spec(config, shape, transformer_engine=transformer_engine, vp_stage=stage) if last else None,
        vp_stage=stage,
    )
    if shape.reward_head and last:
        model.add_reward_head()
    model.real_vocab_size = shape.vocab_size
    model.logprob_chunk_tokens = chunk_tokens
    _fit_attention(model, shape)
    return model


def _fit_attention(model: PolicyModel, shape: ModelShape) -> None:
    """Frequencies of a scaled rope, and the epsilon of the latents' norms, which Megatron takes from the layers'."""
    scaled, mla = shape.rope.kind != "default", shape.mla
    if mla is None:
        if scaled:
            frequencies, _ = rotary_frequencies(shape.rope, shape.head_dim, shape.max_positions)
            model.rotary_pos_emb.inv_freq = frequencies.to(model.rotary_pos_emb.inv_freq.device)
        return
    rotary = None
    for attention in model.modules():
        if isinstance(attention, MultiLatentAttention):
            set_latent_epsilon(attention, mla.norm_eps)
            if scaled:
                group = attention.rotary_pos_emb.cp_group
                rotary = rotary or ScaledRotaryEmbedding(shape.rope, mla.qk_rope_dim, shape.max_positions, group)
                attention.rotary_pos_emb = rotary
