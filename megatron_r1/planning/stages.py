"""Which parts of a model each pipeline rank builds: Megatron's own split, from ModelShape and layout alone.

Even splits and Megatron's layout string (`Ettt|(tttt|)*14ttmL`: E embedding, t decoder layer, m MTP layer, L loss) are
read. Left out: stages for MTP alone (this project builds MTP layers beside the loss).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from megatron_r1.config.pipeline_layout import layout_stages
from megatron_r1.config.schema import ParallelConfig
from megatron_r1.config.shape import ModelShape
from megatron_r1.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """One model chunk: `layers` are decoder layers by number; `mtp` is how many MTP layers it holds."""

    layers: tuple[int, ...]
    embedding: bool = False
    mtp: int = 0
    loss: bool = False


def pipeline_chunks(shape: ModelShape, parallel: ParallelConfig) -> list[list[Chunk]]:
    """chunks[p][v]: virtual stage v of pipeline rank p. Raises ConfigError if the layout does not hold the model."""
    if parallel.pipeline_layout:
        stages = _from_layout(shape, parallel)
    else:
        count = parallel.pipeline_parallel * parallel.virtual_pipeline
        if shape.num_layers % count:
            raise ConfigError(
                f"parallel.pipeline_parallel * virtual_pipeline is {count}; it must divide the number of layers "
                f"{shape.num_layers}, or set parallel.pipeline_layout"
            )
        each = shape.num_layers // count
        stages = [
            Chunk(
                layers=tuple(range(i * each, (i + 1) * each)),
                embedding=i == 0,
                mtp=shape.num_mtp_layers if i == count - 1 else 0,
                loss=i == count - 1,
            )
            for i in range(count)
        ]
    # Megatron deals stages to ranks in turn: stage i is virtual stage i // pipeline of rank i % pipeline.
    return [stages[rank :: parallel.pipeline_parallel] for rank in range(parallel.pipeline_parallel)]


def even_layout(shape: ModelShape, stages: int) -> str:
    """A layout string that spreads the decoder layers, the embedding and the loss over `stages`, or "" where Megatron's
    even split does. The first and last stage get fewer layers, because embedding and head are work and memory too."""
    if shape.num_layers % stages == 0 and not shape.num_mtp_layers:
        return ""
    extra = 1 + shape.num_mtp_layers
    slots = shape.num_layers + 1 + extra
    each, more = divmod(slots, stages)
    sizes = [each + (1 if 0 < i <= more else 0) for i in range(stages)]
    sizes[0] -= 1
    sizes[-1] -= extra
    short = sum(sizes) - shape.num_layers
    assert short <= 0
    for i in range(-short):
        sizes[1 + i % max(1, stages - 2)] += 1
    if min(sizes) < 1:
        raise ValueError(f"{stages} stages are too many for {shape.num_layers} layers")
    first, last = "E" + "t" * sizes[0], "t" * sizes[-1] + "m" * shape.num_mtp_layers + "L"
    middle = "".join(f"({'t' * size}|)*{len(list(run))}" for size, run in itertools.groupby(sizes[1:-1]))
    return f"{first}|{middle}{last}"


def _from_layout(shape: ModelShape, parallel: ParallelConfig) -> list[Chunk]:
    chunks, first = [], 0
    for stage in layout_stages(shape, parallel):
        count = stage.count("t")
        chunks.append(
            Chunk(
                layers=tuple(range(first, first + count)), embedding="E" in stage, mtp=stage.count("m"),
                loss="L" in stage,
            )
        )  # fmt: skip
        first += count
    return chunks
