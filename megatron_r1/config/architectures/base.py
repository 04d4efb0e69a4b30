"""What an architecture is: one object in one file, and a line in this folder's table.

It says what becomes of each field of its config.json and which numbers of a ModelShape only it knows how to read. How
its parameters are called and cut is weights/table.py, which follows from the shape: an architecture of known parts adds
nothing there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_r1.config.laws import Law, turns_in_pairs
from megatron_r1.config.reader import Reader

Limits = Mapping[str, tuple[tuple[Any, ...], str]]
"""By field: (the only values that are built, why no others)."""

DEFAULTS: Mapping[str, Any] = {
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "initializer_range": 0.02, "tie_word_embeddings": False,
    "rope_theta": 10000.0,
}  # fmt: skip

CHUNKS: Limits = {"dual_chunk_attention_config": ((None,), "vLLM alone reads it, and attends otherwise")}
WINDOW: Mapping[str, str] = {"sliding_window": "while use_sliding_window is false"}
PAIRS = turns_in_pairs("head_dim")


def _nothing(read: Reader) -> None:
    """Refuses nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """One of transformers' causal language models."""

    name: str
    """The model_type of its config.json."""
    classifier: str
    """transformers' class for a reward model of it; vLLM knows it by that name too."""
    read: Callable[[Reader], dict[str, Any]]
    """Fields of a ModelShape: num_kv_heads, head_dim, and those of ModelShape's that are not as `plain` has them."""
    other_names: tuple[str, ...] = ()
    """Other model_types that bring the same classes."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What transformers takes for an absent field, beside DEFAULTS (its classes' own; a test compares). Sizes are not
    among them unless a published folder leaves them out: a config without them is refused."""
    honoured: tuple[str, ...] = ()
    """Fields that decide what is computed, beside every architecture's."""
    limited: Limits = field(default_factory=dict)
    """Fields that may hold only what is built, beside every architecture's."""
    without_effect: Mapping[str, str] = field(default_factory=dict)
    """Fields that change nothing here, with the reason."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other spellings of transformers 5, and the published ones."""
    laws: tuple[Law, ...] = ()
    """What its numbers must be, beside every architecture's."""
    refuse: Callable[[Reader], None] = _nothing
    """Refuses what several fields together make impossible."""
    serves_head_dim: bool = True
    """Whether vLLM reads head_dim."""


def plain(read: Reader, **own: Any) -> dict[str, Any]:
    """Grouped-query attention and dense layers, with what `own` says otherwise."""
    return {
        # As many as query heads if null, in the classes that allow it.
        "num_kv_heads": read.optional_integer("num_key_value_heads") or read.integer("num_attention_heads"),
        "head_dim": own["head_dim"] if "head_dim" in own else _head_dim(read),
        "qkv_bias": False,
        "output_bias": False,
        "qk_norm": False,
        "mla": None,
        "moe": None,
        "num_mtp_layers": 0,
        **own,
    }


def _head_dim(read: Reader) -> int:
    if (given := read.optional_integer("head_dim")) is not None:
        return given
    heads, hidden = read.integer("num_attention_heads"), read.integer("hidden_size")
    if hidden < heads:
        read.refuse(f"hidden_size is {hidden}; it must be at least num_attention_heads {heads}")
    if hidden // heads % 2:
        read.refuse(
            f"hidden_size is {hidden} with num_attention_heads {heads}, which makes heads of {hidden // heads}; they "
            "must be even: rotary embeddings turn pairs of numbers"
        )
    return hidden // heads
