"""A stage without a trainer, in the one process that the launcher started for it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from megatron_r1.config.schema import StageConfig
from megatron_r1.parent import die_with_parent, end_in_order_at_sigterm
from megatron_r1.pipeline.launch import PARENT_VARIABLE


def run_single(config: StageConfig, loop: Callable[[Any], dict[str, Any]]) -> int:
    """Run the stage. Its errors are the command line's to print."""
    if parent := int(os.environ.get(PARENT_VARIABLE, "0")):
        die_with_parent(parent, "the launcher")
    end_in_order_at_sigterm()
    loop(config)
    return 0
