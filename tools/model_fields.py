"""The parts of docs/models.md that follow from config/fields.py, config/architectures/ and config/rope.py: fields by
architecture, and what is missing for others."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_r1.config.architectures import ARCHITECTURES
from megatron_r1.config.fields import Field, config_fields
from megatron_r1.config.rope import ROPE_FIELDS
from megatron_r1.config.shape import shape_from_config
from megatron_r1.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Missing:
    """A model that is not built. `shown_by`: fields of its transformers class that stand for what is missing."""

    model: str
    model_type: str
    needs: str
    shown_by: tuple[str, ...]


MISSING = (
    Missing(
        "DeepSeek-V3.2",
        "deepseek_v32",
        "sparse attention: each token attends to index_topk others that a small indexer with weights of its own picks; "
        "neither Megatron's core attention here nor the planner has it",
        ("index_topk", "index_head_dim", "index_n_heads"),
    ),
    Missing(
        "GLM-4.5, 4.6",
        "glm4_moe",
        "V3's router over grouped-query attention with biases, norms of queries and keys by a switch, and half of each "
        "head rotated; the parts exist apart, rotating a part of a head does not",
        ("use_qk_norm", "attention_bias", "n_group"),
    ),
    Missing(
        "GLM-5",
        "glm_moe_dsa",
        "DeepSeek-V3.2's indexer over latent attention",
        ("index_topk", "index_head_dim", "index_n_heads"),
    ),
    Missing(
        "gpt-oss-20b, -120b",
        "gpt_oss",
        "attention with sinks, sliding windows in every second layer, a clamped SwiGLU, experts with biases, and "
        "weights in MXFP4",
        ("sliding_window", "swiglu_alpha", "swiglu_limit", "layer_types"),
    ),
    Missing(
        "Qwen3.5",
        "qwen3_5_text",
        "three of four layers are gated delta nets (linear attention with a state and a convolution), the others gate "
        "attention's output; its folders hold a vision tower too",
        ("linear_conv_kernel_dim", "linear_key_head_dim", "linear_num_value_heads", "layer_types"),
    ),
)


def fields_text() -> str:
    """Markdown between the marks of docs/models.md."""
    parts = ["## config.json, field by field", ""]
    common = set.intersection(*({field for field in config_fields(each)} for each in ARCHITECTURES.values()))
    parts += [
        "### Every architecture",
        "",
        *_lists(field for field in config_fields(ARCHITECTURES["llama"]) if field in common),
    ]
    for architecture in ARCHITECTURES.values():
        title = ", ".join((architecture.name, *architecture.other_names))
        own = [field for field in config_fields(architecture) if field not in common]
        parts += [f"### {title}", "", *_lists(own)]
        if architecture.aliases:
            spelt = ", ".join(f"`{other}` for `{name}`" for other, name in architecture.aliases.items())
            parts += [_wrapped(f"Other spellings: {spelt}."), ""]
    parts += ["### Rope types", ""]
    for kind, (needed, optional) in ROPE_FIELDS.items():
        words = [f"`{name}`" for name in needed] + [f"`{name}` (optional)" for name in optional]
        parts.append(_wrapped(f"- `{kind}`: {', '.join(words) or 'no numbers'}", "  "))
    parts += ["", _wrapped("Any other number in a scaling is refused by its name, and so is any other type."), ""]
    parts += ["## What is missing for others", "", "| model | model_type | what it would take |", "| --- | --- | --- |"]
    parts += [f"| {each.model} | `{each.model_type}` | {each.needs} |" for each in MISSING]
    parts += ["", _wrapped(f"Each is refused in these words: `{refusal('deepseek_v32')}`.")]
    return "\n".join(parts)


def refusal(model_type: str) -> str:
    """What the reader says of a config.json of that type."""
    try:
        shape_from_config({"model_type": model_type})
    except ConfigError as error:
        return error.faults[0]
    raise AssertionError(f"{model_type} is not refused")


def _lists(fields: Iterable[Field]) -> list[str]:
    fields = list(fields)
    found = []
    honoured = [f"`{field.name}`" for field in fields if field.treatment == "honoured"]
    if honoured:
        found += [_wrapped(f"Honoured: {', '.join(honoured)}."), ""]
    limited = [field for field in fields if field.treatment == "limited"]
    if limited:
        found += ["Built for these values only; any other is refused by the field's name:", ""]
        for field in limited:
            values = " or ".join(f"`{value!r}`" for value in field.values)
            found.append(_wrapped(f"- `{field.name}`: {values} ({field.note})", "  "))
        found.append("")
    without = [field for field in fields if field.treatment == "without effect"]
    if without:
        said = ", ".join(f"`{field.name}` ({field.note})" for field in without)
        found += [_wrapped(f"Without effect: {said}."), ""]
    return found or ["Nothing beyond that.", ""]


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
