"""Work of all trainer ranks that fails on all if it fails on one: nobody waits for one that has given up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_r1.errors import UserError

Result = TypeVar("Result")


def trainers() -> int:
    """Ranks of the trainer; 1 where there is no process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def together(work: Callable[[], Result]) -> Result:
    """This rank's result. A collective: raises this rank's error, or that of the lowest rank that had one (as a
    RuntimeError with its words, if it is none that users see)."""
    error: Exception | None = None
    result: Any = None
    try:
        result = work()
    except Exception as caught:
        error = caught
    if trainers() > 1:
        said: list[Any] = [None] * trainers()
        known = error
        if error is not None and not isinstance(error, (UserError, OSError)):
            known = RuntimeError(f"{type(error).__name__}: {error}")
        dist.all_gather_object(said, known)
        if error is None and (others := [other for other in said if other is not None]):
            raise others[0]
    if error is not None:
        raise error
    return result


def from_rank_zero(work: Callable[[], Result], rank: int) -> Result:
    """What rank 0's `work` gives (picklable), on every rank; the others do nothing. Errors as in `together`."""
    found = [together(lambda: work() if rank == 0 else None)]
    if trainers() > 1:
        dist.broadcast_object_list(found, src=0)
    return found[0]  # type: ignore[return-value]
