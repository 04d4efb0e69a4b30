"""A model's shape, read from a Hugging Face config.json without transformers or torch.

Everything that needs a dimension (the Megatron builder, the weight table, validation, the planner) reads a ModelShape.
What each architecture's fields are called and mean is architectures/, what becomes of each fields.py. No remote code,
no defaults for missing sizes: a config that lacks one is refused with the field's name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_r1.config.architectures import ARCHITECTURES, Architecture, architecture_of
from megatron_r1.config.architectures.base import DEFAULTS
from megatron_r1.config.fields import limited_fields
from megatron_r1.config.laws import hold_field_laws
from megatron_r1.config.model_folder import folder_faults, hf_files, lacks_layers
from megatron_r1.config.model_shape import MLAShape, ModelShape, MoEShape
from megatron_r1.config.reader import Reader, short
from megatron_r1.config.rope import RopeShape, read_rope
from megatron_r1.errors import ConfigError

__all__ = [
    "MLAShape",
    "MoEShape",
    "ModelShape",
    "RopeShape",
    "hf_files",
    "load_shape",
    "shape_from_config",
    "shape_or_faults",
]

_MOST_EXPERTS = 1_000_000
"""In all layers together: far above any model's, low enough to list their names in seconds."""


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


def shape_or_faults(path: Path, field: str = "model.path") -> tuple[ModelShape | None, list[str]]:
    """load_shape's, or None and what is wrong with the folder, which a configuration names by `field`."""
    try:
        return load_shape(path), []
    except ConfigError as error:
        return None, [fault.replace("model.path", field, 1) for fault in error.faults]


def shape_from_config(raw: Mapping[str, Any], source: str = "config.json") -> ModelShape:
    """A ModelShape from a parsed config.json."""
    architecture = architecture_of(raw.get("model_type"))
    if architecture is None:
        others = [name for each in ARCHITECTURES.values() for name in each.other_names]
        known = ", ".join((*ARCHITECTURES, *others))
        raise ConfigError(f"{source}: model_type is {short(raw.get('model_type'))}; supported are {known}")
    fields = _with_published_names(raw, architecture, source)
    read = Reader(fields, source, {**DEFAULTS, **architecture.defaults})
    _refuse_unsupported(read, architecture)
    shape = ModelShape(
        architecture=architecture.name,
        vocab_size=read.integer("vocab_size"),
        hidden_size=read.integer("hidden_size"),
        num_layers=read.integer("num_hidden_layers"),
        num_heads=read.integer("num_attention_heads"),
        ffn_size=read.integer("intermediate_size"),
        norm_eps=read.number("rms_norm_eps"),
        max_positions=read.integer("max_position_embeddings"),
        tie_embeddings=read.boolean("tie_word_embeddings"),
        init_std=read.number("initializer_range"),
        rope=read_rope(read),
        fp8_block=_fp8_block(read),
        reward_head=_has_reward_head(read, architecture),
        **architecture.read(read),
    )
    hold_field_laws(read, architecture.laws)
    return shape


def _has_reward_head(read: Reader, architecture: Architecture) -> bool:
    """Whether the folder is a reward model's: a classifier with one label. The trainer goes by model_type, and vLLM by
    the class that `architectures` names first: where that is another one they would be two models."""
    architectures = read.raw.get("architectures")
    classifier = architecture.classifier
    causal = classifier.replace("ForSequenceClassification", "ForCausalLM")
    if not architectures or architectures == [causal]:
        return False
    if architectures != [classifier]:
        read.refuse(
            f"architectures is {short(architectures)}, which vLLM goes by; beside model_type {architecture.name} only "
            f"[{causal!r}] and, for a reward model, [{classifier!r}] are supported"
        )
    names = read.raw.get("id2label")
    # transformers writes num_labels only as the names of the labels, and nothing at all for two.
    labels = read.raw.get("num_labels", len(names) if isinstance(names, dict) else 2)
    if labels != 1:
        read.refuse(f"num_labels is {short(labels)}; a reward model has one")
    return True


def _with_published_names(raw: Mapping[str, Any], architecture: Architecture, source: str) -> dict[str, Any]:
    """`raw` with transformers 5's other spellings replaced by the published ones."""
    found = dict(raw)
    for other, name in architecture.aliases.items():
        if other in found:
            value = found.pop(other)
            if found.setdefault(name, value) != value:
                raise ConfigError(f"{source}: {name} is {short(found[name])} and {other}, the same, {short(value)}")
    return found


def _refuse_unsupported(read: Reader, architecture: Architecture) -> None:
    for field, (built, why) in limited_fields(architecture).items():
        value = read.raw.get(field)
        for each in value if field == "layer_types" and isinstance(value, list) else [value]:
            if each is not None and each not in built:
                read.refuse(f"{field} is {short(value)}; only {built[0]!r} is supported ({why})")
    _refuse_sizes(read)
    architecture.refuse(read)


def _refuse_sizes(read: Reader) -> None:
    heads, groups = read.integer("num_attention_heads"), read.optional_integer("num_key_value_heads")
    if groups and heads % groups:
        read.refuse(f"num_key_value_heads is {groups}; it must divide num_attention_heads {heads}")
    experts = next((count for name in ("n_routed_experts", "num_experts") if (count := read.count(name))), 0)
    top_k = read.count("num_experts_per_tok")
    if experts and top_k > experts:
        read.refuse(f"num_experts_per_tok is {top_k}; there are only {experts} experts")
    layers = read.integer("num_hidden_layers")
    if layers * experts > _MOST_EXPERTS:
        read.refuse(f"num_hidden_layers is {layers} with {experts} experts each; at most {_MOST_EXPERTS} are read")


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
