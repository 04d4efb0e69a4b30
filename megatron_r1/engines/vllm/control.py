"""The control plane of weight transfer: vLLM's RL routes on all servers of a transfer at once, with the
token.

No tensors pass here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from megatron_r1.engines.vllm.client import EngineClient
from megatron_r1.engines.vllm.engine import Engine

Result = TypeVar("Result")

RECOVERY_SECONDS = 30.0
"""For a server to go on after an update that failed."""

MEETING_SECONDS = 600.0
"""For the meeting of the trainer and all workers of all servers."""


class ControlPlane:
    """Calls every server concurrently; the first error is raised after all have answered.

    Servers appear to a transfer as one: their workers are ranked one server after another. `version` is
    reported to the servers with the next finish_weight_update.
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.clients: tuple[EngineClient, ...] = tuple(engine.client for engine in engines)
        self.workers_per_engine = engines[0].config.tensor_parallel if engines else 1
        self.version = 0
        # Two each: while an update that hangs is waited for, its server is asked to go on.
        self.pool = ThreadPoolExecutor(max(1, 2 * len(self.clients)), thread_name_prefix="vllm-control")

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        def init(position: int, client: EngineClient) -> None:
            info = dict(init_info)
            if "first_worker" in info:
                info["first_worker"] += position * self.workers_per_engine
            client.request("POST", "/init_weight_transfer_engine", {"init_info": info}, timeout=MEETING_SECONDS)

        self.each(init)

    def shutdown_weight_transfer_engine(self) -> None:
        self.each(lambda _, client: client.request("POST", "/shutdown_weight_transfer_engine", {}))

    def start_weight_update(self) -> None:
        self.post("/start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.post("/update_weights", {"update_info": update_info})

    def finish_weight_update(self) -> None:
        self.post("/finish_weight_update", {"weight_version": str(self.version)})

    def pause(self) -> None:
        """Let running requests finish, admit no more, and drop the KV and prefix caches, which the old
        weights made.
        """
        self.each(lambda _, client: client.pause())

    def resume(self) -> None:
        self.each(lambda _, client: client.request("POST", "/resume", {}))

    def resume_after_failure(self) -> list[int]:
        """Have all servers go on; returns the positions of those that do not say so in RECOVERY_SECONDS."""
        path, seconds = "/resume", RECOVERY_SECONDS
        pending = [self.pool.submit(client.request, "POST", path, {}, timeout=seconds) for client in self.clients]
        return [position for position, future in enumerate(pending) if future.exception() is not None]

    def weight_versions(self) -> list[int]:
        return self.each(lambda _, client: client.weight_version())

    def post(self, path: str, body: object = None) -> None:
        """Time enough to receive and to load all weights: any of these may be the one that does it."""
        sent = {} if body is None else body
        self.each(lambda _, client: client.request("POST", path, sent, timeout=client.transfer_seconds))

    def each(self, call: Callable[[int, EngineClient], Result]) -> list[Result]:
        pending = [self.pool.submit(call, position, client) for position, client in enumerate(self.clients)]
        errors = [error for error in (future.exception() for future in pending) if error is not None]
        if errors:
            raise errors[0]
        return [future.result() for future in pending]

    def close(self) -> None:
        self.pool.shutdown(wait=False)
