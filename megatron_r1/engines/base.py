"""What rollouts and stages need of an engine. Nothing above engines/ knows more of one than what stands here.

An engine is one source of completions (a server, or a model in this process) that its trainer's rank 0 starts, asks,
gives weights to and starts again when it fails. A kind of engine (`EngineKind`) makes them: vLLM's is engines/vllm/,
and `rollout.engine` says which kind a run has. Left out: how requests and weights travel, which is each kind's own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from megatron_r1.config import RolloutConfig, SamplingConfig
from megatron_r1.config.schema import RunningServerConfig
from megatron_r1.engines.source import ShardedSource
from megatron_r1.errors import ConfigError, UserError
from megatron_r1.types import Completion

Decode = Callable[[Sequence[int]], str]
"""Token ids to text."""
Progress = Callable[[str], None]
"""Is told a sentence now and then."""


class RequestError(UserError, ValueError):
    """An engine refused a request: the request is at fault, sending it again will not help."""


class Client(Protocol):
    """Requests to one incarnation of an engine, from many threads at once.

    Errors: EngineError when the engine fails (it may be started again and asked again); RequestError when it refuses
    the request; ValueError for tokens that have no room in `rollout.max_model_len` (`check_room`), before anything is
    sent. A request that makes tokens has no time limit, but one to an engine that is stuck must end in EngineError.
    """

    def generate(
        self,
        prompt_ids: Sequence[int],
        *,
        num_completions: int,
        sampling: SamplingConfig,
        seed: int | None = None,
        decode: Decode | None = None,
    ) -> tuple[Completion, ...]:
        """Sample `num_completions` answers to one prompt.

        Completion i uses random seed `seed + i` (None: the engine's own stream). Its logprobs (f32[T]) are those of the
        distribution that was sampled from: temperature, top_p and top_k applied (at temperature 0, the plain model's).
        It ends with "stop" (an id of sampling.stop_token_ids, which is its last token, or the model's own end) or
        "length" (sampling.max_new_tokens, or the room that rollout.max_model_len leaves). `weight_version` is that of
        the oldest weights that took part. `decode` fills its text.
        """
        ...

    def score(self, token_ids: Sequence[int]) -> np.ndarray:
        """log p(token i | tokens before i) at temperature 1: f32[L], entry 0 zero. Asked of a teacher."""
        ...

    def value(self, token_ids: Sequence[int]) -> float:
        """The value that a reward model's head gives after the last token, as it is."""
        ...

    def weight_version(self) -> int:
        """The version of the weights that are served now; 0 is what the engine started with."""
        ...

    def healthy(self) -> bool:
        """Whether it answers, asked with a short limit of time. Raises nothing."""
        ...

    def sleep(self, level: int) -> None:
        """Give device memory back (`rollout.sleep_level`), once running requests are done."""
        ...

    def wake(self, tag: str) -> None:
        """Take memory again: "weights" or, last, "kv_cache". With both it serves."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """One engine of a run.

    `model_path`: the Hugging Face folder that it serves at its start; `run_dir`: takes its log; `index`: its place
    among the engines of the run; `seed`: of its own random stream; `name`: what messages and its log file call it
    (empty: the kind chooses); `host`: this process's address, where an engine of this host listens and others reach
    the trainer; `visible_devices`: CUDA_VISIBLE_DEVICES of an engine of this host (None: this process's);
    `reward_model`: it gives values, and keeps the weights of its start.
    """

    config: RolloutConfig
    model_path: Path
    run_dir: Path
    index: int = 0
    seed: int = 0
    name: str = ""
    host: str = "127.0.0.1"
    visible_devices: str | None = None
    reward_model: bool = False


class Engine(Protocol):
    """One source of completions under supervision."""

    @property
    def index(self) -> int:
        """Its place among the engines of the run."""
        ...

    @property
    def name(self) -> str:
        """What messages and its log file call it."""
        ...

    @property
    def where(self) -> str:
        """Its address and its log, for people."""
        ...

    @property
    def config(self) -> RolloutConfig: ...

    @property
    def starts(self) -> int:
        """How many times it was started. It names an incarnation: weights and connections made for an older one are
        gone."""
        ...

    @property
    def client(self) -> Client:
        """Of the present incarnation."""
        ...

    def start(self) -> None:
        """Begin to start; returns at once. EngineError if that fails at once."""
        ...

    def wait_ready(self, progress: Progress | None = None) -> float:
        """Block until it serves; returns the seconds waited. EngineError, with the remedy, if it does not start."""
        ...

    def alive(self) -> bool:
        """Whether it runs (it may not answer yet)."""
        ...

    def stop(self) -> None:
        """End it. Safe to call twice, and from another thread than the one that waits for its start."""
        ...

    def restart(self, progress: Progress | None = None) -> None:
        """Stop what is left and start anew with the weights of its start (version 0); wait for it. EngineError past
        rollout.max_restarts failures since the last `forgive`."""
        ...

    def forgive(self) -> None:
        """A whole rollout has succeeded: what failed before it counts no more."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncReport:
    """One push: the version served after it, bytes sent, seconds in all and by part (rank 0; others know
    seconds).
    """

    version: int
    num_bytes: int
    seconds: float
    parts: dict[str, float] = field(default_factory=dict)


class WeightSync(Protocol):
    """Keeps engines at the trainer's weights. One on every trainer rank; only rank 0's has engines."""

    @property
    def engines(self) -> Sequence[Engine]: ...

    @property
    def version(self) -> int:
        """The last one pushed to all (0: what they started with)."""
        ...

    def push(self, version: int, engines: Sequence[Engine] | None = None) -> SyncReport:
        """Make `engines` (default all) serve the source's current weights as `version`. A collective: every rank
        iterates the source once, whatever happens, so that none waits for another.

        Running requests end first, and no cache of the old weights is used after it. ValueError for names or shapes
        that the model does not have (on every rank, nothing sent); EngineError (on rank 0) when an engine fails; after
        that its weights are undefined until a push succeeds.
        """
        ...

    def close(self) -> None:
        """Leave the engines' connections for weights."""
        ...


class Supervisor(Protocol):
    """One node's part of an engine that the trainer, on another node, asks for."""

    @property
    def name(self) -> str: ...

    @property
    def log_path(self) -> Path: ...

    def run(self, ended: threading.Event) -> None:
        """Serve as the trainer asks until `ended` is set."""
        ...

    def stop(self) -> None:
        """End the engine, also while it starts. Safe to call twice."""
        ...


class EngineKind:
    """What `rollout.engine` names: makes engines and the way weights reach them. Derive, and override what the kind can
    do; the rest is refused. It holds no state."""

    def local(self, spec: EngineSpec) -> Engine:
        """An engine on this host, not started."""
        raise NotImplementedError

    def weight_sync(
        self,
        config: RolloutConfig,
        *,
        source: ShardedSource,
        engines: Sequence[Engine],
        model_path: Path,
        rank: int,
    ) -> WeightSync:
        """On every trainer rank, `engines` empty but on rank 0. `model_path`: the folder that they started from."""
        raise NotImplementedError

    def attached(self, spec: EngineSpec, *, attempt: str) -> Engine:
        """The trainer's side of an engine that a `Supervisor` of the same job's `attempt` runs on another node."""
        raise ConfigError(self._refuses("has no servers on nodes of their own: give the job none"))

    def supervisor(self, spec: EngineSpec, *, attempt: str, logs: Path, nodes: int, node: int) -> Supervisor:
        """The other side of `attached`: part `node` of `nodes` of the engine. The trainer says what model it serves and
        with what seed, when it asks for it; `logs` takes the log, where the trainer's run folder may not be."""
        raise ConfigError(self._refuses("has no servers on nodes of their own: give the job none"))

    def running(self, server: RunningServerConfig, config: RolloutConfig) -> Engine:
        """A server that somebody else runs (`server.url`). ConfigError if it does not answer or has not the model."""
        raise ConfigError(self._refuses("asks no server of somebody else's: leave server.url empty"))

    def record(self, spec: EngineSpec, token_ids: Sequence[int], file: Path) -> None:
        """Write what each module of a fresh engine's model computes for these tokens to `file`, in the form of
        megatron_r1.activations. EngineError if the engine fails."""
        raise ConfigError(self._refuses("does not record what its modules compute: diagnose a server"))

    def faults(self, config: RolloutConfig) -> list[str]:
        """What only the engine's own package can say against a configuration. Asked before a cluster job."""
        del config
        return []

    def _refuses(self, what: str) -> str:
        return f"rollout.engine: {type(self).__name__} {what}, or use vllm"


AnyEngine = TypeVar("AnyEngine", bound=Engine)


def start_all(engines: Sequence[AnyEngine]) -> tuple[AnyEngine, ...]:
    """Start these together and wait for all. If one fails, all are stopped and its EngineError is raised."""
    try:
        for engine in engines:
            engine.start()
        for engine in engines:
            engine.wait_ready()
    except BaseException:
        for engine in engines:
            engine.stop()
        raise
    return tuple(engines)


def check_room(token_ids: Sequence[int], max_model_len: int) -> int:
    """Tokens that still fit after `token_ids`. Raises ValueError when there are none."""
    room = max_model_len - len(token_ids)
    if len(token_ids) == 0:
        raise ValueError("the prompt is empty; it must hold at least one token (the template's or a BOS token)")
    if room < 1:
        raise ValueError(
            f"rollout.max_model_len: a prompt of {len(token_ids)} tokens leaves no room for an answer in "
            f"{max_model_len}; raise rollout.max_model_len or drop the problem"
        )
    return room
