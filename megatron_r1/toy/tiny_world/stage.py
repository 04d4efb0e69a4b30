"""The tiny world's data as a kind of stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_r1.planning.needs import Needs
from megatron_r1.stages.stage import Stage
from megatron_r1.toy.tiny_world.config import TINY_WORLD_FILES, TinyWorldConfig, validate_tiny_world
from megatron_r1.toy.tiny_world.names import SUMMARY_NAMES


def needs(config: TinyWorldConfig) -> Needs:
    return Needs(name=config.name, run_dir=config.run_dir, exports=0)


def load() -> Callable[..., dict[str, Any]]:
    from megatron_r1.toy.tiny_world.run import make_tiny_world

    return make_tiny_world


STAGE = Stage(
    name="tiny world",
    config=TinyWorldConfig,
    validate=validate_tiny_world,
    needs=needs,
    load=load,
    outputs=tuple(f"{name}.jsonl" for name in TINY_WORLD_FILES),
    summary=SUMMARY_NAMES,
    common=tuple("run_dir if_exists seed base cold_start other problems scenarios pairs held_out".split()),
)
