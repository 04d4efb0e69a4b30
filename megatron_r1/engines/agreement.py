"""Work of all trainer ranks that fails on all if it fails on one: nobody waits for one that has given up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_r1.errors import EngineError

Result = TypeVar("Result")


def trainers() -> int:
    """Ranks of the trainer; 1 where there is no process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def together(work: Callable[[], Result]) -> Result:
    """This rank's result. A collective: raises this rank's error, or EngineError with that of the lowest rank that had
    one."""
    error: Exception | None = None
    result: Any = None
    try:
        result = work()
    except Exception as caught:
        error = caught
    if trainers() > 1:
        said: list[Any] = [None] * trainers()
        dist.all_gather_object(said, None if error is None else f"{error or type(error).__name__}")
        if error is None and (others := [(rank, text) for rank, text in enumerate(said) if text is not None]):
            rank, text = others[0]
            raise EngineError(f"trainer rank {rank}: {text}" if rank else text)
    if error is not None:
        raise error
    return result


def from_rank_zero(work: Callable[[], Result], rank: int) -> Result:
    """What rank 0's `work` gives (picklable), on every rank; the others do nothing. Errors as in `together`."""
    found = [together(lambda: work() if rank == 0 else None)]
    if trainers() > 1:
        dist.broadcast_object_list(found, src=0)
    return found[0]  # type: ignore[return-value]
