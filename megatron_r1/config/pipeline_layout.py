"""Megatron's pipeline layout string, `Ettt|(tttt|)*14ttmL`: which stage builds which parts of a model.

E is the embedding, t a decoder layer, m a multi-token-prediction (MTP) layer, L the loss, | ends a stage. Left out:
stages for MTP layers alone (this project builds them beside the loss).
"""

from __future__ import annotations

import re

from megatron_r1.config.schema import ParallelConfig
from megatron_r1.config.shape import ModelShape
from megatron_r1.errors import ConfigError


def layout_stages(shape: ModelShape, parallel: ParallelConfig) -> list[str]:
    """The letters of each stage of parallel.pipeline_layout, repeats written out. Raises ConfigError unless it holds
    each part of the model once, at a place where it can be built."""
    text = parallel.pipeline_layout
    stages = _unroll(text).split("|")
    expected = parallel.pipeline_parallel * parallel.virtual_pipeline
    if len(stages) != expected:
        raise ConfigError(
            f"parallel.pipeline_layout is {text!r}, {len(stages)} stages; pipeline_parallel * virtual_pipeline is "
            f"{expected}"
        )
    faults = [
        f"parallel.pipeline_layout is {text!r}; it has {found} {what}, the model has {wanted}{remedy}"
        for what, letter, wanted, remedy in (
            ("embedding (E)", "E", 1, ""),
            ("decoder layers (t)", "t", shape.num_layers, ""),
            ("MTP layers (m)", "m", shape.num_mtp_layers, _mtp_remedy(text, shape)),
            ("loss (L)", "L", 1, ""),
        )
        if (found := sum(stage.count(letter) for stage in stages)) != wanted
    ]
    if not faults and ("E" not in stages[0] or "L" not in stages[-1] or any("m" in stage for stage in stages[:-1])):
        faults = [f"parallel.pipeline_layout is {text!r}; E must be in its first stage, m and L in its last"]
    if faults:
        raise ConfigError(faults)
    return stages


def _mtp_remedy(text: str, shape: ModelShape) -> str:
    """config.json's MTP layers are built whether they are trained or not."""
    return f": write {re.sub('[m,]', '', text).replace('L', 'm' * shape.num_mtp_layers + 'L')!r}"


def _unroll(text: str) -> str:
    """`(ab|)*2` -> `ab|ab|`, `t*3` -> `ttt`, as Megatron does."""
    plain = text.replace(",", "")
    for pattern in (r"\(([^)]+)\)\*(\d+)", r"(.)\*(\d+)"):
        plain = re.sub(pattern, lambda match: match.group(1) * int(match.group(2)), plain)
    unknown = sorted(set(plain) - set("Etm|L"))
    if unknown:
        raise ConfigError(f"parallel.pipeline_layout is {text!r}; it may have E, t, m, L, | and repeats, not {unknown}")
    return plain
