"""The name table: which Hugging Face tensors make which Megatron parameter.

One Entry for each Megatron parameter of the whole model (global layer and expert numbers, no layout in it). Loading,
export to a folder, the stream to vLLM and the planner's count of parameters and bytes all read this table; nothing else
maps names or knows sizes. Adding an architecture is adding lines here, and a shape in config/shape.py. How tensors
combine and split is transforms.py. No torch: the planner reads this before it is imported.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_r1.config.shape import ModelShape

Kind = Literal["plain", "gated", "qkv", "vocabulary"]
"""plain: one tensor. gated: gate and up projections stacked. qkv: query, key and value interleaved by query group.
vocabulary: one tensor whose rows are padded to a multiple of the tensor-parallel size."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One Megatron parameter.

    `hf` names the tensors that it is made of, `hf_shapes` their shapes; `partition` is the dimension that tensor
    parallelism splits (None: replicated); expert entries split over the expert-tensor group instead.
    `float32` marks what stays fp32 in every precision, `fp8` what DeepSeek's FP8 format quantises (the linear layers;
    not embeddings, head, norms, router and MTP's projection). `aliases` are further HF names with the same content.
    """

    name: str
    hf: tuple[str, ...]
    hf_shapes: tuple[tuple[int, ...], ...]
    kind: Kind = "plain"
    partition: int | None = None
    expert: bool = False
    float32: bool = False
    fp8: bool = False
    aliases: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Numbers of the whole parameter."""
        return sum(math.prod(shape) for shape in self.hf_shapes)


def shard_shape(entry: Entry, count: int) -> tuple[int, ...]:
    """Shape of one of `count` tensor-parallel shards; a replicated entry is whole on each."""
    rows = sum(full[0] for full in entry.hf_shapes)
    tail = entry.hf_shapes[0][1:]
    if entry.kind == "vocabulary":
        return (-(-rows // count), *tail)
    if entry.partition is None:
        return (rows, *tail)
    full = [rows, *tail]
    full[entry.partition] //= count
    return tuple(full)


def build_table(shape: ModelShape) -> list[Entry]:
    """All entries in Hugging Face's order: embedding, decoder layers, final norm, head, MTP layers."""
    entries = [embedding_entry(shape)]
    for layer in range(shape.num_layers):
        entries += layer_entries(shape, f"decoder.layers.{layer}", f"model.layers.{layer}", shape.is_moe_layer(layer))
    entries.append(Entry("decoder.final_layernorm.weight", ("model.norm.weight",), ((shape.hidden_size,),)))
    if (head := head_entry(shape)) is not None:
        entries.append(head)
    for index in range(shape.num_mtp_layers):
        entries += mtp_entries(shape, index)
    return entries


def embedding_entry(shape: ModelShape) -> Entry:
    return _vocabulary(shape, "embedding.word_embeddings.weight", "model.embed_tokens.weight", "embed_tokens")


def head_entry(shape: ModelShape) -> Entry | None:
    """What makes logits, or a reward, of the last hidden states; None where it is the embedding."""
    if shape.reward_head:
        return Entry("reward_head.weight", ("score.weight",), ((1, shape.hidden_size),))
    if shape.tie_embeddings:
        return None
    return _vocabulary(shape, "output_layer.weight", "lm_head.weight", "shared_head.head")


def _vocabulary(shape: ModelShape, name: str, hf: str, mtp_name: str) -> Entry:
    """Embedding or head; each MTP layer of the checkpoint holds a copy, called `mtp_name` there."""
    layers = range(shape.num_layers, shape.num_layers + shape.num_mtp_layers)
    aliases = tuple(f"model.layers.{layer}.{mtp_name}.weight" for layer in layers)
    return Entry(name, (hf,), ((shape.vocab_size, shape.hidden_size),), "vocabulary", 0, aliases=aliases)


def mtp_entries(shape: ModelShape, index: int, experts: Iterable[int] | None = None) -> Iterator[Entry]:
    """DeepSeek-V3 keeps MTP layer k as decoder layer num_layers + k, with own norms and copies of the vocabulary."""
    hidden = shape.hidden_size
    mtp, hf = f"mtp.layers.{index}", f"model.layers.{shape.num_layers + index}"
    yield Entry(f"{mtp}.enorm.weight", (f"{hf}.enorm.weight",), ((hidden,),))
    yield Entry(f"{mtp}.hnorm.weight", (f"{hf}.hnorm.weight",), ((hidden,),))
    yield Entry(f"{mtp}.eh_proj.weight", (f"{hf}.eh_proj.weight",), ((hidden, 2 * hidden),), partition=0)
    yield from layer_entries(shape, f"{mtp}.transformer_layer", hf, shape.moe is not None, experts)
    yield Entry(f"{mtp}.final_layernorm.weight", (f"{hf}.shared_head.norm.weight",), ((hidden,),))


def layer_entries(
    shape: ModelShape, mcore: str, hf: str, sparse: bool, experts: Iterable[int] | None = None
) -> Iterator[Entry]:
    """One decoder layer, called `mcore` there and `hf` in Hugging Face's form. `experts`: these alone (None: all)."""
    hidden = shape.hidden_size
    yield Entry(f"{mcore}.input_layernorm.weight", (f"{hf}.input_layernorm.weight",), ((hidden,),))
    attention = _mla if shape.mla is not None else _attention
    yield from attention(shape, f"{mcore}.self_attention", f"{hf}.self_attn")
    yield Entry(f"{mcore}.pre_mlp_layernorm.weight", (f"{hf}.post_attention_layernorm.weight",), ((hidden,),))
    if sparse:
        yield from _experts(shape, f"{mcore}.mlp", f"{hf}.mlp", experts)
    else:
        yield from _gated_mlp(shape, f"{mcore}.mlp", f"{hf}.mlp", shape.ffn_size)


def _attention(shape: ModelShape, mcore: str, hf: str) -> Iterator[Entry]:
    hidden, width = shape.hidden_size, shape.head_dim
    rows = (shape.num_heads * width, shape.num_kv_heads * width, shape.num_kv_heads * width)
    parts = ("q_proj", "k_proj", "v_proj")
    weights = tuple(f"{hf}.{part}.weight" for part in parts)
    yield Entry(f"{mcore}.linear_qkv.weight", weights, tuple((row, hidden) for row in rows), "qkv", 0, fp8=True)
    if shape.qkv_bias:
        biases = tuple(f"{hf}.{part}.bias" for part in parts)
        yield Entry(f"{mcore}.linear_qkv.bias", biases, tuple((row,) for row in rows), "qkv", 0)
    if shape.qk_norm:
        yield Entry(f"{mcore}.q_layernorm.weight", (f"{hf}.q_norm.weight",), ((width,),))
        yield Entry(f"{mcore}.k_layernorm.weight", (f"{hf}.k_norm.weight",), ((width,),))
    yield Entry(f"{mcore}.linear_proj.weight", (f"{hf}.o_proj.weight",), ((hidden, rows[0]),), partition=1, fp8=True)
    if shape.output_bias:
        yield Entry(f"{mcore}.linear_proj.bias", (f"{hf}.o_proj.bias",), ((hidden,),))


def _mla(shape: ModelShape, mcore: str, hf: str) -> Iterator[Entry]:
    mla, hidden, heads = shape.mla, shape.hidden_size, shape.num_heads
    assert mla is not None
    query_rows = heads * (mla.qk_nope_dim + mla.qk_rope_dim)
    rows = [("linear_kv_down_proj", "kv_a_proj_with_mqa", mla.kv_lora_rank + mla.qk_rope_dim, hidden)]
    rows += [("linear_kv_up_proj", "kv_b_proj", heads * (mla.qk_nope_dim + mla.v_dim), mla.kv_lora_rank)]
    if mla.q_lora_rank is None:
        rows += [("linear_q_proj", "q_proj", query_rows, hidden)]
    else:
        rows += [("linear_q_down_proj", "q_a_proj", mla.q_lora_rank, hidden)]
        rows += [("linear_q_up_proj", "q_b_proj", query_rows, mla.q_lora_rank)]
        yield Entry(f"{mcore}.q_layernorm.weight", (f"{hf}.q_a_layernorm.weight",), ((mla.q_lora_rank,),))
    yield Entry(f"{mcore}.kv_layernorm.weight", (f"{hf}.kv_a_layernorm.weight",), ((mla.kv_lora_rank,),))
    for name, hf_name, out_size, in_size in rows:
        weight = ((f"{hf}.{hf_name}.weight",), ((out_size, in_size),))
        # The latents are whole on every tensor-parallel rank (model/mla.py, and Transformer Engine's).
        yield Entry(f"{mcore}.{name}.weight", *weight, partition=None if "down" in name else 0, fp8=True)
    output_shape = (hidden, heads * mla.v_dim)
    yield Entry(f"{mcore}.linear_proj.weight", (f"{hf}.o_proj.weight",), (output_shape,), partition=1, fp8=True)


def _gated_mlp(shape: ModelShape, mcore: str, hf: str, width: int, expert: bool = False) -> Iterator[Entry]:
    hidden = shape.hidden_size
    gate_up = (f"{hf}.gate_proj.weight", f"{hf}.up_proj.weight")
    yield Entry(f"{mcore}.linear_fc1.weight", gate_up, ((width, hidden),) * 2, "gated", 0, expert, fp8=True)
    down = (f"{hf}.down_proj.weight",)
    yield Entry(f"{mcore}.linear_fc2.weight", down, ((hidden, width),), partition=1, expert=expert, fp8=True)


def _experts(shape: ModelShape, mcore: str, hf: str, experts: Iterable[int] | None) -> Iterator[Entry]:
    moe, hidden = shape.moe, shape.hidden_size
    assert moe is not None
    yield Entry(f"{mcore}.router.weight", (f"{hf}.gate.weight",), ((moe.num_experts, hidden),))
    if moe.router == "sigmoid":
        bias = (f"{hf}.gate.e_score_correction_bias",)
        yield Entry(f"{mcore}.router.expert_bias", bias, ((moe.num_experts,),), float32=True)
    for expert in range(moe.num_experts) if experts is None else experts:
        names = (f"{mcore}.experts.{expert}", f"{hf}.experts.{expert}")
        yield from _gated_mlp(shape, *names, moe.expert_ffn_size, expert=True)
    if moe.num_shared_experts:
        width = moe.num_shared_experts * moe.expert_ffn_size
        yield from _gated_mlp(shape, f"{mcore}.shared_experts", f"{hf}.shared_experts", width)


_FUSED_BY_ATTENTION = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
}
_FUSED_BY_LATENT_ATTENTION = {
    "self_attention.q_layernorm.weight": "self_attention.linear_q_up_proj.layer_norm_weight",
    "self_attention.kv_layernorm.weight": "self_attention.linear_kv_up_proj.layer_norm_weight",
}
_FUSED_BY_DENSE_MLP = {"pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight"}
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_LAYER = re.compile(r"(decoder\.layers\.(\d+)|mtp\.layers\.\d+\.transformer_layer)\.(.+)")


def checkpoint_key(entry: Entry, shape: ModelShape) -> tuple[str, int | None]:
    """Where Megatron's torch_dist checkpoints keep the entry: (key, index along a leading expert dimension or None).

    These are the keys of a Transformer Engine model, which fuses norms into linears; all experts of a layer share one
    key. Layers have keys of their own (content metadata `non_homogeneous_layers`).
    """
    if match := _EXPERT.search(entry.name):
        return entry.name.replace(match[0], ".experts.experts.", 1), int(match[1])
    match = _LAYER.match(entry.name)
    if match is None:
        return entry.name, None
    layer, number, rest = match.groups()
    sparse = shape.moe is not None if number is None else shape.is_moe_layer(int(number))
    fused = _FUSED_BY_LATENT_ATTENTION if shape.mla is not None else _FUSED_BY_ATTENTION
    if not sparse:
        fused = fused | _FUSED_BY_DENSE_MLP
    return f"{layer}.{fused.get(rest, rest)}", None
