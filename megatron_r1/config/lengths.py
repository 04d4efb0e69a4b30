"""Whether a model has a position for every token of a stage's longest sequence."""

from __future__ import annotations

from megatron_r1.config.shape import ModelShape


def length_faults(field: str, length: int, shape: ModelShape | None, *, served: bool) -> list[str]:
    """`field` is the setting that allows `length` tokens; `served`: by vLLM, whose rotary table of a YaRN scaling has
    factor * original_max_position_embeddings rows, whatever max_position_embeddings says."""
    if shape is None:
        return []
    rows = yarn_rows(shape)
    if length > shape.max_positions:
        remedy = f": raise that in config.json to the {rows} that its YaRN scaling reaches" if rows >= length else ""
        return [f"{field} is {length}; the model has max_position_embeddings = {shape.max_positions}{remedy}"]
    if served and 0 < rows < length:
        return [
            f"{field} is {length}; the model's YaRN scaling reaches {rows} positions (factor * "
            f"original_max_position_embeddings), and vLLM has no more: use at most {rows}, or raise factor"
        ]
    return []


def yarn_rows(shape: ModelShape) -> int:
    """Positions that a YaRN scaling reaches; 0 without one."""
    factors = shape.rope.factors
    return int(factors["factor"] * factors["original_max_position_embeddings"]) if shape.rope.kind == "yarn" else 0
