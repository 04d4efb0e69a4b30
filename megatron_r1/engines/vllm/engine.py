"""What a vLLM server is to the trainer, wherever its process runs: server.py has those of this host, attached.py those
of other nodes. Here is what both do alike: its client, its restarts, how long a start may take.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Self

from megatron_r1.config.deadlines import folder_bytes, start_seconds
from megatron_r1.engines.base import EngineSpec, Progress
from megatron_r1.engines.vllm.client import EngineClient
from megatron_r1.errors import EngineError


class Engine(ABC):
    """One vLLM server under supervision (engines.base.Engine).

    A server serves the start checkpoint when it comes up, also after a restart: pushing newer weights is the caller's
    business (sync.py). Attributes: `starts`, how many times it was started (it names an incarnation: weights and
    connections made for an older one are gone); `failures`, how many incarnations ended by themselves since the last
    whole rollout (`forgive`); `client`, for the current incarnation; `name`, vllm-INDEX if the spec has none.
    """

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self.config, self.index = spec.config, spec.index
        self.name = spec.name or f"vllm-{spec.index}"
        self.starts = 0
        self.failures = 0
        self.client = EngineClient("", token="", config=spec.config)

    @property
    @abstractmethod
    def where(self) -> str:
        """Its address and its log."""

    @abstractmethod
    def start(self) -> None:
        """Begin to start the next incarnation; returns at once (see wait_ready)."""

    @abstractmethod
    def wait_ready(self, progress: Progress | None = None) -> float:
        """Block until the server answers; returns the seconds waited. `progress` is called about every 5 s with a
        sentence. Raises EngineError when it dies or `start_seconds` pass."""

    @abstractmethod
    def alive(self) -> bool:
        """Whether it runs."""

    @abstractmethod
    def stop(self) -> None:
        """End it. Safe to call twice."""

    @abstractmethod
    def death(self, what: str) -> EngineError:
        """The error that tells how this server ended, with the remedy."""

    @property
    def start_seconds(self) -> float:
        """How long its start may take."""
        return start_seconds(self.config, folder_bytes(self.spec.model_path))

    def connect(self, address: str, token: str) -> EngineClient:
        """A client of the present incarnation, at `address` (host:port)."""
        return EngineClient(
            f"http://{address}",
            token=token,
            config=self.config,
            model=str(self.spec.model_path),
            weight_bytes=folder_bytes(self.spec.model_path),
        )

    def restart(self, progress: Progress | None = None) -> None:
        """Stop what is left and start anew with the start checkpoint's weights (version 0).

        Raises EngineError past rollout.max_restarts in one rollout, and what `wait_ready` raises.
        """
        self.stop()
        self.failures += 1
        if self.failures > self.config.max_restarts:
            raise self.death(
                f"failed {self.failures} times since the last whole rollout; rollout.max_restarts is "
                f"{self.config.max_restarts}"
            )
        self.start()
        self.wait_ready(progress)

    def forgive(self) -> None:
        """A whole rollout has succeeded: what failed before it counts no more."""
        self.failures = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
