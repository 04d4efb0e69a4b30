"""The names in summary.json of the small world's data."""

from __future__ import annotations

from megatron_r1.observe.names import Names, Number
from megatron_r1.toy.tiny_world.config import TINY_WORLD_FILES

SUMMARY_NAMES: Names = {f"lines/{name}": Number("count", f"Lines of {name}.jsonl.") for name in TINY_WORLD_FILES}
