"""A push of the policy's weights that outlives its servers: one that has died, or dies of it, is started again.

How weights travel is the engine's (engines/base.py); who has the memory meanwhile is colocation.py's."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_r1.agreement import on_rank_zero
from megatron_r1.engines.base import Engine, RequestError, SyncReport, WeightSync
from megatron_r1.errors import EngineError
from megatron_r1.stages.grpo.colocation import Colocation


def push_weights(sync: WeightSync, colocation: Colocation, version: int) -> SyncReport:
    """Weights to every server, twice if the first push fails. A collective over the trainer's ranks.

    Raises EngineError on every rank when a server is past its restarts or the second push fails too.
    """
    failure = _attempt(sync, colocation, version, suspect=False)
    if isinstance(failure, EngineError):
        colocation.for_training()  # woken servers would leave no room for a start, or for the weights
        failure = _attempt(sync, colocation, version, suspect=True)
    if isinstance(failure, EngineError):
        raise EngineError(f"weight sync failed twice; {failure}") from failure
    return failure


def _attempt(sync: WeightSync, colocation: Colocation, version: int, *, suspect: bool) -> SyncReport | EngineError:
    """The report on each rank, or the error that rank 0 had, on all."""
    colocation.revive(lambda: fallen(sync.engines, suspect=suspect))
    report: SyncReport | None = None
    failure: EngineError | RequestError | None = None
    with colocation.for_sync():
        try:
            report = sync.push(version)
        except (EngineError, RequestError) as error:  # on rank 0 only: the others' part of the push is done
            failure = error
        failure = on_rank_zero(lambda: failure)
    if isinstance(failure, RequestError):  # a new server would refuse it too
        raise failure
    if failure is not None:
        return failure
    assert report is not None
    return report


def fallen(engines: Sequence[Engine], *, suspect: bool) -> list[Engine]:
    """Servers that have died; if `suspect`, after a push that failed, also those that live and do not answer."""
    return [engine for engine in engines if not engine.alive() or (suspect and not engine.client.healthy())]
