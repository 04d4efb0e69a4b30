"""Work of all trainer ranks that fails on all if it fails on one: nobody waits for one that has given up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_r1.errors import EngineError, UserError

Result = TypeVar("Result")


def trainers() -> int:
    """Ranks of the trainer; 1 where there is no process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def together(work: Callable[[], Result]) -> Result:
    """This rank's result. A collective: if any rank had an error, all raise the same, on other ranks as a RuntimeError
    with its words if it is none that users see. Which: the lowest rank's, but of no rank that has a plain EngineError
    if another has anything else, since that may be the other's leaving as this rank or a server saw it."""
    error: Exception | None = None
    result: Any = None
    try:
        result = work()
    except Exception as caught:
        error = caught
    if trainers() > 1:
        said: list[Any] = [None] * trainers()
        dist.all_gather_object(said, error if error is None else as_told(error))
        failed = [rank for rank, other in enumerate(said) if other is not None]
        failed.sort(key=lambda rank: type(said[rank]) is EngineError)
        if failed and failed[0] != dist.get_rank():
            raise said[failed[0]] from error
    if error is not None:
        raise error
    return result


def on_rank_zero(work: Callable[[], Result]) -> Result:
    """Do `work` on rank 0 only; every rank returns its (picklable) result, or raises what it raised there
    (as `together` does).

    Without this an error on rank 0 would leave the other ranks waiting in a collective.
    """
    if trainers() == 1:
        return work()
    outcome: list[Any] = [None, None]
    failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            outcome[0] = work()
        except Exception as error:
            failure, outcome[1] = error, as_told(error)
    dist.broadcast_object_list(outcome, src=0)
    result, told = outcome
    if told is not None:
        raise failure or told
    return result


def as_told(error: Exception) -> Exception:
    """`error` as other ranks are told of it: itself, or a RuntimeError with its words if users do not see such ones,
    which need not be made of what can be sent."""
    return error if isinstance(error, (UserError, OSError)) else RuntimeError(f"{type(error).__name__}: {error}")


def sum_over_ranks(numbers: torch.Tensor) -> torch.Tensor:
    """The sum of every rank's tensor, of the same shape and dtype (int64 modulo 2^64), on each; a collective."""
    if trainers() > 1:
        dist.all_reduce(numbers)
    return numbers


class Alarm:
    """What any trainer rank can tell all others at any time, without a collective: that `name` has failed. Every use
    needs a name of its own."""

    def __init__(self, name: str) -> None:
        self._name, self._rung = name, False
        self._store = dist.distributed_c10d._get_default_store() if trainers() > 1 else None

    def ring(self) -> None:
        self._rung = True
        if self._store is not None:
            self._store.set(self._name, "rung")

    def heard(self) -> bool:
        return self._rung or (self._store is not None and self._store.check([self._name]))
