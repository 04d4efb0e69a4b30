"""Push the trainer's weights into the servers, through vLLM's own weight-transfer interfaces.

`push` is called on every trainer rank: each sends its own shards (shard_channel.py), and rank 0 asks the servers.
Pause, receive, load, finish and resume are vLLM's; prefix caches are dropped, because they hold the old weights' keys
and values. How Megatron shards become boxes of Hugging Face tensors is the source's business (weights/).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

from megatron_r1.agreement import on_rank_zero, together
from megatron_r1.config import RolloutConfig
from megatron_r1.engines import base
from megatron_r1.engines.base import RequestError, SyncReport
from megatron_r1.engines.source import ShardedSource, check_parameters, read_shapes
from megatron_r1.engines.vllm.control import ControlPlane
from megatron_r1.engines.vllm.engine import Engine
from megatron_r1.engines.vllm.server import private_directory
from megatron_r1.engines.vllm.shard_channel import ShardChannel
from megatron_r1.errors import EngineError
from megatron_r1.weights.wire import ParamSpec, num_bytes


class WeightSync:
    """Keeps servers at the trainer's weights. Construct it on every trainer rank, `engines` empty except on
    rank 0.

    `model_path` is the folder that the servers started from: names and shapes are checked against its
    safetensors before a server is disturbed. `version` is the last one pushed (0: the start checkpoint).
    """

    def __init__(
        self,
        config: RolloutConfig,
        *,
        source: ShardedSource,
        engines: Sequence[Engine],
        model_path: Path,
        rank: int = 0,
    ) -> None:
        if rank == 0 and not engines:
            raise EngineError("WeightSync on rank 0 needs the servers to push to; got none")
        self.config = config
        self.source = source
        self.engines = tuple(engines)
        self.rank = rank
        self.version = 0
        self.expected = read_shapes(model_path)
        self.channel: ShardChannel | None = None
        self.connected: object = None
        """What `channel` is open to, on rank 0: incarnations of servers, and the weights."""
        self.private_dir = private_directory() if rank == 0 else None

    def push(self, version: int, engines: Sequence[base.Engine] | None = None) -> SyncReport:
        """Make `engines` (default all) serve the source's current weights as `version`. Collective.

        Raises ValueError for names or shapes that the model does not have (on every rank, nothing sent) and, on rank
        0, EngineError when a server fails; after that its weights are undefined until a push succeeds.
        """
        begun = time.perf_counter()
        specs = [(name, dtype, tuple(shape)) for name, dtype, shape in self.source.metadata()]
        check_parameters(specs, self.expected)
        parts: dict[str, float] = {}
        chosen = cast("Sequence[Engine]", engines or self.engines)  # some of ours
        self.send(version, specs, tuple(chosen), parts)
        if engines is None or len(engines) == len(self.engines):
            self.version = version
        total = sum(num_bytes(spec) for spec in specs)
        seconds = time.perf_counter() - begun
        return SyncReport(version=version, num_bytes=total, seconds=seconds, parts=parts)

    def send(self, version: int, specs: list[ParamSpec], engines: tuple[Engine, ...], parts: dict[str, float]) -> None:
        """Every rank's side of a push; fills `parts` with seconds by name. A failure is raised on rank 0; the others
        know that nothing is open any more."""
        control: ControlPlane | None = None
        try:
            with timed(parts, "connect"):
                channel = self.ensure_channel(specs, engines)
            control = channel.control
            if control is not None:
                control.version = version
            with timed(parts, "pause"):
                together(lambda: control and control.pause())
            with timed(parts, "transfer"):
                channel.send()
            with timed(parts, "resume"):
                together(lambda: control and control.resume())
            with timed(parts, "verify"):
                together(lambda: control and check_versions(control.weight_versions(), version))
        except BaseException as error:
            for position in control.resume_after_failure() if control is not None else ():
                engines[position].stop()  # it hangs, or is dead; the run starts it again
                error.add_note(f"and {engines[position].name} did not resume and was stopped")
            self.disconnect()
            if self.rank == 0 or not isinstance(error, (EngineError, RequestError)):
                raise

    def ensure_channel(self, specs: list[ParamSpec], engines: tuple[Engine, ...]) -> ShardChannel:
        """The open channel for exactly these weights to exactly these incarnations of these servers."""
        wanted = (tuple((engine.index, engine.starts) for engine in engines), tuple(specs))
        if on_rank_zero(lambda: self.channel is None or self.connected != wanted) or self.channel is None:
            self.disconnect()
            self.channel = ShardChannel(
                engines,
                self.source,
                specs,
                sync=self.config.sync,
                rank=self.rank,
                bucket_bytes=self.config.sync_bucket_mib << 20,
                check_tensors=self.config.check_tensors,
                private_dir=None if self.private_dir is None else Path(self.private_dir.name),
            )
            self.connected = wanted
        return self.channel

    def disconnect(self) -> None:
        """Leave the transfer group; the next push makes a new one. One WeightSync is connected to a server at
        a time: a second one takes the server over, and the first must then disconnect.
        """
        if self.channel is not None:
            self.channel.close()
            self.channel = None

    def close(self) -> None:
        """Leave the transfer group and remove the rendezvous folder."""
        self.disconnect()
        if self.private_dir is not None:
            self.private_dir.cleanup()
            self.private_dir = None


def check_versions(served: Sequence[int], version: int) -> None:
    if any(got != version for got in served):
        raise EngineError(f"weight sync: pushed version {version}, the vLLM servers report {list(served)}")


@contextlib.contextmanager
def timed(parts: dict[str, float], name: str) -> Iterator[None]:
    """Record the seconds that the block takes under `name`."""
    begun = time.perf_counter()
    yield
    parts[name] = time.perf_counter() - begun
