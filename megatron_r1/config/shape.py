"""A model's shape, read from a Hugging Face config.json without transformers or torch.

The one place that knows the field names of config.json. Everything that needs a dimension (the Megatron builder, the
weight table, validation, the planner) reads a ModelShape. No remote code, no defaults for missing sizes: a config that
lacks one is refused with the field's name.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from megatron_r1.errors import ConfigError

ARCHITECTURES = ("deepseek_v3", "llama", "qwen2", "qwen3", "qwen3_moe")


@dataclass(frozen=True, slots=True, kw_only=True)
class MLAShape:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): ranks and per-head widths."""

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_dim: int
    qk_rope_dim: int
    v_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEShape:
    """Mixture of experts. `router` is sigmoid with a score-correction bias (V3) or softmax (Qwen3-MoE)."""

    num_experts: int
    top_k: int
    expert_ffn_size: int
    num_shared_experts: int
    num_dense_layers: int
    router: str
    num_groups: int
    topk_groups: int
    routed_scaling: float
    normalise_topk: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeShape:
    """Rotary embedding. `kind` is default, yarn or llama3; `factors` holds the scaling's own numbers."""

    theta: float
    kind: str
    factors: Mapping[str, float]


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
        return self.moe is not None and layer >= self.moe.num_dense_layers


def hf_files(folder: Path) -> Path:
    """Where a model folder keeps config.json and the tokenizer: itself, or hf/ in a torch_dist checkpoint."""
    inside = folder / "hf"
    return inside if not (folder / "config.json").exists() and (inside / "config.json").exists() else folder


def load_shape(path: Path) -> ModelShape:
    """Read the config.json of a model folder (or that file itself). Raises ConfigError naming the file and the
    field."""
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
    return shape_from_config(raw, str(file))


def shape_from_config(raw: Mapping[str, Any], source: str = "config.json") -> ModelShape:
    """A ModelShape from a parsed config.json."""
    architecture = raw.get("model_type")
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ConfigError(f"{source}: model_type is {architecture!r}; supported are {known}")
    read = _Reader(raw, source)
    _refuse_unsupported(read)
    num_heads = read.integer("num_attention_heads")
    hidden_size = read.integer("hidden_size")
    mla = _mla_shape(read) if architecture == "deepseek_v3" else None
    if mla:
        head_dim = mla.qk_nope_dim + mla.qk_rope_dim
    else:
        head_dim = read.optional_integer("head_dim") or hidden_size // num_heads
        if not head_dim:
            read.refuse(f"hidden_size is {hidden_size}; it must be at least num_attention_heads {num_heads}")
    return ModelShape(
        architecture=architecture,
        vocab_size=read.integer("vocab_size"),
        hidden_size=hidden_size,
        num_layers=read.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_heads if mla else read.optional_integer("num_key_value_heads") or num_heads,
        head_dim=head_dim,
        ffn_size=read.integer("intermediate_size"),
        norm_eps=read.number("rms_norm_eps"),
        max_positions=read.integer("max_position_embeddings"),
        tie_embeddings=read.boolean("tie_word_embeddings", False),
        qkv_bias=architecture == "qwen2",
        qk_norm=architecture in ("qwen3", "qwen3_moe"),
        init_std=read.number("initializer_range", 0.02),
        rope=_rope_shape(read),
        mla=mla,
        moe=_moe_shape(read, architecture),
        num_mtp_layers=read.count("num_nextn_predict_layers") if architecture == "deepseek_v3" else 0,
        fp8_block=_fp8_block(read),
        reward_head=_has_reward_head(read),
    )


def _has_reward_head(read: _Reader) -> bool:
    """Whether the folder is a reward model's: a classifier with one label."""
    architectures = read.raw.get("architectures")
    if not isinstance(architectures, list) or not str(architectures[:1]).endswith("ForSequenceClassification']"):
        return False
    names = read.raw.get("id2label")
    # transformers writes num_labels only as the names of the labels, and nothing at all for two.
    labels = read.raw.get("num_labels", len(names) if isinstance(names, dict) else 2)
    if labels != 1:
        read.refuse(f"num_labels is {_short(labels)}; a reward model has one")
    return True


class _Reader:
    def __init__(self, raw: Mapping[str, Any], source: str) -> None:
        self.raw, self.source = raw, source

    def value(self, field: str) -> Any:
        if self.raw.get(field) is None:
            raise ConfigError(f"{self.source}: field {field} is missing; copy it from the model's own config.json")
        return self.raw[field]

    def integer(self, field: str) -> int:
        value = self.value(field)
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise ConfigError(f"{self.source}: {field} is {_short(value)}; it must be a positive integer")
        most = _MOST.get(field, 2**31 - 1)
        if value > most:
            raise ConfigError(f"{self.source}: {field} is {_short(value)}; it must be a positive integer up to {most}")
        return value

    def optional_integer(self, field: str) -> int | None:
        """A positive integer; None if the field is absent, null or 0."""
        return self.integer(field) if self.raw.get(field) else None

    def count(self, field: str) -> int:
        """An integer that may be 0; absent or null is 0."""
        return self.optional_integer(field) or 0

    def number(self, field: str, default: float | None = None) -> float:
        value = self.raw.get(field)
        return self.finite(field, default if value is None and default is not None else self.value(field))

    def finite(self, field: str, value: Any) -> float:
        """`value`, which `field` holds, as a float."""
        number = math.nan
        if isinstance(value, int | float) and not isinstance(value, bool):
            with contextlib.suppress(OverflowError):
                number = float(value)
        if not math.isfinite(number):
            raise ConfigError(f"{self.source}: {field} is {_short(value)}; it must be a number")
        return number

    def boolean(self, field: str, default: bool) -> bool:
        value = self.raw.get(field)
        if value is not None and not isinstance(value, bool):
            raise ConfigError(f"{self.source}: {field} is {_short(value)}; it must be true or false")
        return default if value is None else value

    def refuse(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.source}: {message}")


def _short(value: object) -> str:
    """For messages: an integer may have more digits than Python will print."""
    if isinstance(value, int) and abs(value) >= 10**20:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."


_MOST = {
    "num_hidden_layers": 10_000, "num_nextn_predict_layers": 100, "n_routed_experts": 100_000, "num_experts": 100_000,
    "num_local_experts": 100_000,
}  # fmt: skip
_MOST_EXPERTS = 1_000_000
"""In all layers together: far above any model's, low enough to list their names in seconds."""

_ONLY = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "partial_rotary_factor": (1.0,),
    "moe_layer_freq": (1,),
}
"""Fields that would change the computation, and the values that are built; absent or null always is."""


def _refuse_unsupported(read: _Reader) -> None:
    for field, built in _ONLY.items():
        value = read.raw.get(field)
        if value is not None and value not in built:
            read.refuse(f"{field} is {value!r}; only {built[0]!r} is supported")
    heads, groups = read.integer("num_attention_heads"), read.optional_integer("num_key_value_heads")
    if groups and heads % groups:
        read.refuse(f"num_key_value_heads is {groups}; it must divide num_attention_heads {heads}")
    names = ("n_routed_experts", "num_experts", "num_local_experts")
    experts = next((count for name in names if (count := read.count(name))), 0)
    top_k = read.count("num_experts_per_tok")
    if experts and top_k > experts:
        read.refuse(f"num_experts_per_tok is {top_k}; there are only {experts} experts")
    layers = read.integer("num_hidden_layers")
    if layers * experts > _MOST_EXPERTS:
        read.refuse(f"num_hidden_layers is {layers} with {experts} experts each; at most {_MOST_EXPERTS} are read")
    kept, all_groups = read.count("topk_group"), read.count("n_group")
    if all_groups and kept > all_groups:
        read.refuse(f"topk_group is {kept}; there are only {all_groups} groups (n_group)")


def _fp8_block(read: _Reader) -> int | None:
    """The one quantisation that is read: DeepSeek's e4m3 with a float32 `weight_scale_inv` for each square block."""
    found = read.raw.get("quantization_config")
    if found is None:
        return None
    fields = found if isinstance(found, dict) else {}
    block = fields.get("weight_block_size")
    sizes = block if isinstance(block, list) else []
    side = sizes[0] if len(sizes) == 2 and sizes[0] == sizes[1] else None
    known = fields.get("quant_method") == "fp8" and fields.get("fmt", "e4m3") == "e4m3"
    if not known or isinstance(side, bool) or not isinstance(side, int) or not 0 < side < 2**31:
        read.refuse(
            f"quantization_config is {_short(found)}; only quant_method fp8, fmt e4m3 with a square weight_block_size "
            "(DeepSeek's format) is read; dequantise the folder to bf16 with the tool that made it"
        )
    return side


def _mla_shape(read: _Reader) -> MLAShape:
    return MLAShape(
        q_lora_rank=read.optional_integer("q_lora_rank"),
        kv_lora_rank=read.integer("kv_lora_rank"),
        qk_nope_dim=read.integer("qk_nope_head_dim"),
        qk_rope_dim=read.integer("qk_rope_head_dim"),
        v_dim=read.integer("v_head_dim"),
    )


def _moe_shape(read: _Reader, architecture: str) -> MoEShape | None:
    raw = read.raw
    if architecture == "deepseek_v3":
        if raw.get("scoring_func", "sigmoid") != "sigmoid" or raw.get("topk_method", "noaux_tc") != "noaux_tc":
            read.refuse("scoring_func and topk_method must be sigmoid and noaux_tc (the V3 router)")
        return MoEShape(
            num_experts=read.integer("n_routed_experts"),
            top_k=read.integer("num_experts_per_tok"),
            expert_ffn_size=read.integer("moe_intermediate_size"),
            num_shared_experts=read.count("n_shared_experts"),
            num_dense_layers=read.count("first_k_dense_replace"),
            router="sigmoid",
            num_groups=read.integer("n_group"),
            topk_groups=read.integer("topk_group"),
            routed_scaling=read.number("routed_scaling_factor", 1.0),
            normalise_topk=read.boolean("norm_topk_prob", True),
        )
    if architecture == "qwen3_moe":
        if raw.get("decoder_sparse_step", 1) != 1 or raw.get("mlp_only_layers"):
            read.refuse("decoder_sparse_step and mlp_only_layers are not supported; every layer must be sparse")
        return MoEShape(
            num_experts=read.integer("num_experts" if "num_experts" in raw else "num_local_experts"),
            top_k=read.integer("num_experts_per_tok"),
            expert_ffn_size=read.integer("moe_intermediate_size"),
            num_shared_experts=0,
            num_dense_layers=0,
            router="softmax",
            num_groups=1,
            topk_groups=1,
            routed_scaling=1.0,
            normalise_topk=read.boolean("norm_topk_prob", False),
        )
    return None


def _rope_shape(read: _Reader) -> RopeShape:
    """Both spellings: rope_theta + rope_scaling (transformers 4) and rope_parameters (transformers 5)."""
    raw = read.raw
    given = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(given, dict):
        read.refuse(f"rope_parameters or rope_scaling is {given!r}; it must be an object")
    parameters = dict(given)
    theta = parameters.pop("rope_theta", None)
    theta = raw.get("rope_theta") if theta is None else theta
    kind = parameters.pop("rope_type", None) or parameters.pop("type", None) or "default"
    parameters.pop("type", None)
    if theta is None:
        raise ConfigError(f"{read.source}: neither rope_theta nor rope_parameters.rope_theta is given")
    if kind not in ("default", "yarn", "llama3"):
        read.refuse(f"rope type is {kind!r}; supported are default, yarn and llama3")
    # + makes a number of true (YaRN's `truncate`)
    factors = {key: read.finite(key, +value) for key, value in parameters.items() if isinstance(value, int | float)}
    if kind != "default":
        for field in ("factor", "original_max_position_embeddings"):
            if field not in factors:
                read.refuse(f"rope scaling of type {kind} needs {field}")
    number = read.finite("rope_theta", theta)
    if number <= 0:
        read.refuse(f"rope_theta is {number}; it must be a number above 0")
    return RopeShape(theta=number, kind=kind, factors=factors)
