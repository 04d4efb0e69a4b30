"""A model's shape, read from a Hugging Face config.json without transformers or torch.

The one place that knows the field names of config.json. Everything that needs a dimension (the Megatron builder, the
weight table, validation, the planner) reads a ModelShape. fields.py says what becomes of each. No remote code, no
defaults for missing sizes: a config that lacks one is refused with the field's name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_r1.config.fields import ALIASES, ARCHITECTURES, DEFAULTS, LATENT, MODEL_TYPES, limited_fields
from megatron_r1.config.laws import hold_field_laws
from megatron_r1.config.model_folder import folder_faults, hf_files, lacks_layers
from megatron_r1.config.reader import Reader, short
from megatron_r1.config.rope import RopeShape, read_rope
from megatron_r1.errors import ConfigError

__all__ = [
    "ARCHITECTURES",
    "MLAShape",
    "MoEShape",
    "ModelShape",
    "RopeShape",
    "hf_files",
    "load_shape",
    "shape_from_config",
]

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
    """One value a token instead of a distribution over the vocabulary (transformers' ...ForSequenceClassification)."""

    def is_moe_layer(self, layer: int) -> bool:
        """Whether decoder layer `layer` (from 0; MTP layers follow the decoder's) has routed experts."""
        return self.moe is not None and layer not in self.moe.dense_layers


def load_shape(path: Path) -> ModelShape:
    """Read the config.json of a model folder (or that file itself). Raises ConfigError naming the file and the
    field. A folder whose weights lack every tensor of its MTP layers has a shape without them
    (model_folder.mtp_left_out has the word to say)."""
    file = hf_files(path) / "config.json" if path.is_dir() else path
    if not file.exists():
        raise ConfigError(f"model.path: {file} does not exist; it must be a Hugging Face folder with a config.json")
    if not file.is_file():
        raise ConfigError(f"{file}: is not a file; it must be the model's config.json")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{file}: holds a {type(raw).__name__}; it must be a JSON object")
    shape = shape_from_config(raw, str(file))
    if not path.is_dir():
        return shape
    if faults := folder_faults(path):
        raise ConfigError(faults)
    if shape.num_mtp_layers and lacks_layers(path, shape.num_layers, shape.num_mtp_layers):
        return replace(shape, num_mtp_layers=0)
    return shape


def shape_from_config(raw: Mapping[str, Any], source: str = "config.json") -> ModelShape:
    """A ModelShape from a parsed config.json."""
    given = raw.get("model_type")
    architecture = MODEL_TYPES.get(given, given) if isinstance(given, str) else None
    if architecture not in ARCHITECTURES:
        known = ", ".join((*ARCHITECTURES, *MODEL_TYPES))
        raise ConfigError(f"{source}: model_type is {short(given)}; supported are {known}")
    read = Reader(_with_published_names(raw, architecture, source), source, DEFAULTS[architecture])
    _refuse_unsupported(read, architecture)
    num_heads = read.integer("num_attention_heads")
    hidden_size = read.integer("hidden_size")
    mla = _mla_shape(read) if architecture in LATENT else None
    if mla:
        head_dim = mla.qk_nope_dim + mla.qk_rope_dim
    else:
        head_dim = read.optional_integer("head_dim") or hidden_size // num_heads
        if not head_dim:
            read.refuse(f"hidden_size is {hidden_size}; it must be at least num_attention_heads {num_heads}")
    output_bias = architecture == "llama" and read.boolean("attention_bias")
    shape = ModelShape(
        architecture=architecture,
        vocab_size=read.integer("vocab_size"),
        hidden_size=hidden_size,
        num_layers=read.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_heads if mla else _num_kv_heads(read, architecture),
        head_dim=head_dim,
        ffn_size=read.integer("intermediate_size"),
        norm_eps=read.number("rms_norm_eps"),
        max_positions=read.integer("max_position_embeddings"),
        tie_embeddings=read.boolean("tie_word_embeddings"),
        qkv_bias=architecture == "qwen2" or output_bias,
        output_bias=output_bias,
        qk_norm=architecture in ("qwen3", "qwen3_moe"),
        init_std=read.number("initializer_range"),
        rope=read_rope(read),
        mla=mla,
        moe=_moe_shape(read, architecture),
        num_mtp_layers=read.count("num_nextn_predict_layers") if architecture == "deepseek_v3" else 0,
        fp8_block=_fp8_block(read),
        reward_head=_has_reward_head(read),
    )
    hold_field_laws(read, architecture)
    if head_dim % 2 and mla is None:
        read.refuse(
            f"hidden_size is {hidden_size} with num_attention_heads {num_heads}, which makes heads of {head_dim}; they "
            "must be even: rotary embeddings turn pairs of numbers"
        )
    return shape


def _num_kv_heads(read: Reader, architecture: str) -> int:
    """As many as query heads if null, in the classes that allow it."""
    if architecture == "qwen3_moe":
        return read.integer("num_key_value_heads")
    return read.optional_integer("num_key_value_heads") or read.integer("num_attention_heads")


def _has_reward_head(read: Reader) -> bool:
    """Whether the folder is a reward model's: a classifier with one label."""
    architectures = read.raw.get("architectures")
    if not isinstance(architectures, list) or not str(architectures[:1]).endswith("ForSequenceClassification']"):
        return False
    names = read.raw.get("id2label")
    # transformers writes num_labels only as the names of the labels, and nothing at all for two.
    labels = read.raw.get("num_labels", len(names) if isinstance(names, dict) else 2)
    if labels != 1:
        read.refuse(f"num_labels is {short(labels)}; a reward model has one")
    return True


_MOST_EXPERTS = 1_000_000
"""In all layers together: far above any model's, low enough to list their names in seconds."""


def _with_published_names(raw: Mapping[str, Any], architecture: str, source: str) -> dict[str, Any]:
    """`raw` with transformers 5's other spellings replaced by the published ones."""
    found = dict(raw)
    for other, name in ALIASES.get(architecture, {}).items():
        if other in found:
            value = found.pop(other)
            if found.setdefault(name, value) != value:
                raise ConfigError(f"{source}: {name} is {short(found[name])} and {other}, the same, {short(value)}")
    return found


def _refuse_unsupported(read: Reader, architecture: str) -> None:
    for field, (built, why) in limited_fields(architecture).items():
        value = read.raw.get(field)
        for each in value if field == "layer_types" and isinstance(value, list) else [value]:
            if each is not None and each not in built:
                read.refuse(f"{field} is {short(value)}; only {built[0]!r} is supported ({why})")
    if architecture == "deepseek_v3" and "rope_interleave" in read.raw and read.raw["rope_interleave"] is None:
        read.refuse("rope_interleave is null, which transformers takes for false; only True is supported")
    _refuse_sizes(read, architecture)


def _refuse_sizes(read: Reader, architecture: str) -> None:
    heads, groups = read.integer("num_attention_heads"), read.optional_integer("num_key_value_heads")
    if architecture in LATENT and groups not in (None, heads):
        read.refuse(f"num_key_value_heads is {groups}; with latent attention it must be num_attention_heads, {heads}")
    if groups and heads % groups:
        read.refuse(f"num_key_value_heads is {groups}; it must divide num_attention_heads {heads}")
    experts = next((count for name in ("n_routed_experts", "num_experts") if (count := read.count(name))), 0)
    top_k = read.count("num_experts_per_tok")
    if experts and top_k > experts:
        read.refuse(f"num_experts_per_tok is {top_k}; there are only {experts} experts")
    layers = read.integer("num_hidden_layers")
    if layers * experts > _MOST_EXPERTS:
        read.refuse(f"num_hidden_layers is {layers} with {experts} experts each; at most {_MOST_EXPERTS} are read")
    if architecture == "deepseek_v3" or read.raw.get("topk_method") == "group_limited_greedy":
        _refuse_groups(read, experts, top_k)
    if architecture == "deepseek_v3":
        dense = read.count("first_k_dense_replace")
        if dense > layers and read.count("num_nextn_predict_layers"):
            read.refuse(
                f"first_k_dense_replace is {dense}; beside MTP layers, which are built with experts, it must be at "
                f"most num_hidden_layers {layers}"
            )


def _refuse_groups(read: Reader, experts: int, top_k: int) -> None:
    """What the group-limited router cannot choose from."""
    kept, all_groups = read.optional_integer("topk_group"), read.optional_integer("n_group")
    if not (experts and all_groups and kept):
        return
    if kept > all_groups:
        read.refuse(f"topk_group is {kept}; there are only {all_groups} groups (n_group)")
    if all_groups == 1:
        return
    if experts % all_groups or experts < 2 * all_groups:
        read.refuse(f"n_group is {all_groups}; groups must be equal, of two or more of the {experts} experts")
    if top_k > kept * (experts // all_groups):
        read.refuse(
            f"num_experts_per_tok is {top_k}; topk_group {kept} leaves {kept * (experts // all_groups)} experts"
        )


def _fp8_block(read: Reader) -> int | None:
    """The one quantisation that is read: DeepSeek's e4m3 with a `weight_scale_inv` for each square block."""
    found = read.raw.get("quantization_config")
    if found is None:
        return None
    fields = found if isinstance(found, dict) else {}
    block = fields.get("weight_block_size")
    sizes = block if isinstance(block, list) else []
    side = sizes[0] if len(sizes) == 2 and sizes[0] == sizes[1] else None
    known = fields.get("quant_method") == "fp8" and fields.get("fmt", "e4m3") == "e4m3"
    known = known and fields.get("scale_fmt") in (None, "float", "ue8m0")
    if not known or isinstance(side, bool) or not isinstance(side, int) or not 0 < side < 2**31:
        read.refuse(
            f"quantization_config is {short(found)}; only quant_method fp8, fmt e4m3, scale_fmt ue8m0 or none, with a "
            "square weight_block_size (DeepSeek's format) is read; dequantise the folder to bf16 with the tool that "
            "made it"
        )
    return side


def _mla_shape(read: Reader) -> MLAShape:
    return MLAShape(
        q_lora_rank=read.optional_integer("q_lora_rank"),
        kv_lora_rank=read.integer("kv_lora_rank"),
        qk_nope_dim=read.integer("qk_nope_head_dim"),
        qk_rope_dim=read.integer("qk_rope_head_dim"),
        v_dim=read.integer("v_head_dim"),
    )


def _moe_shape(read: Reader, architecture: str) -> MoEShape | None:
    if architecture in LATENT:
        first = read.count("first_k_dense_replace", nullable=False)
        groups, kept = _groups(read, architecture)
        limited = groups > 1 and kept is not None
        return MoEShape(
            num_experts=read.integer("n_routed_experts"),
            top_k=read.integer("num_experts_per_tok"),
            expert_ffn_size=read.integer("moe_intermediate_size"),
            num_shared_experts=read.count("n_shared_experts", nullable=False),
            dense_layers=frozenset(range(min(first, read.integer("num_hidden_layers")))),
            router="sigmoid" if architecture == "deepseek_v3" else "softmax",
            num_groups=groups if limited else 1,
            topk_groups=kept if limited and kept else 1,
            routed_scaling=read.number("routed_scaling_factor"),
            normalise_topk=architecture == "deepseek_v3" and read.boolean("norm_topk_prob"),
        )
    if architecture == "qwen3_moe":
        return MoEShape(
            num_experts=read.integer("num_experts"),
            top_k=read.integer("num_experts_per_tok"),
            expert_ffn_size=read.integer("moe_intermediate_size"),
            num_shared_experts=0,
            dense_layers=_dense_layers(read),
            router="softmax",
            num_groups=1,
            topk_groups=1,
            routed_scaling=1.0,
            normalise_topk=read.boolean("norm_topk_prob"),
        )
    return None


def _groups(read: Reader, architecture: str) -> tuple[int, int | None]:
    """(groups of experts, how many of them a token may go to). DeepSeek-V3: to any, where either number is null.
    DeepSeek-V2 has groups where its topk_method says so."""
    if architecture == "deepseek_v3":
        return read.optional_integer("n_group") or 1, read.optional_integer("topk_group")
    method = read.raw.get("topk_method")
    if method == "greedy":
        return 1, None
    if method != "group_limited_greedy":
        read.refuse(f"topk_method is {short(method)}; supported are greedy and group_limited_greedy")
    groups, kept = read.optional_integer("n_group"), read.optional_integer("topk_group")
    if groups is None or kept is None:
        read.refuse("topk_method is group_limited_greedy; it needs n_group and topk_group")
    return groups, kept


def _dense_layers(read: Reader) -> frozenset[int]:
    """Qwen3-MoE: layers that are listed, and those whose number (from 1) is no multiple of decoder_sparse_step."""
    listed = read.raw.get("mlp_only_layers") or []
    if not isinstance(listed, list) or any(isinstance(each, bool) or not isinstance(each, int) for each in listed):
        read.refuse(f"mlp_only_layers is {short(listed)}; it must be a list of layers' numbers")
    layers, step = read.integer("num_hidden_layers"), read.integer("decoder_sparse_step")
    dense = frozenset(layer for layer in range(layers) if layer in set(listed) or (layer + 1) % step)
    if len(dense) == layers:
        read.refuse("mlp_only_layers and decoder_sparse_step leave no layer with experts; one at least must have some")
    return dense
