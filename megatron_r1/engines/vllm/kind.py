"""vLLM as a kind of engine: what rollout.engine `vllm` names."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from megatron_r1.config import RolloutConfig
from megatron_r1.config.schema import RunningServerConfig
from megatron_r1.engines import base
from megatron_r1.engines.source import ShardedSource
from megatron_r1.engines.vllm.activations import record_once
from megatron_r1.engines.vllm.attached import AttachedEngine, ServerFiles
from megatron_r1.engines.vllm.check_arguments import parser_faults
from megatron_r1.engines.vllm.engine import Engine
from megatron_r1.engines.vllm.running import RunningServer
from megatron_r1.engines.vllm.server import LocalEngine
from megatron_r1.engines.vllm.supervise import follow, supervise
from megatron_r1.engines.vllm.sync import WeightSync


class VLLM(base.EngineKind):
    """Servers in processes of their own: this one's, those of other nodes, or somebody else's."""

    def local(self, spec: base.EngineSpec) -> LocalEngine:
        return LocalEngine(spec)

    def weight_sync(
        self,
        config: RolloutConfig,
        *,
        source: ShardedSource,
        engines: Sequence[base.Engine],
        model_path: Path,
        rank: int,
    ) -> WeightSync:
        own = cast("Sequence[Engine]", engines)  # made by `local` or `attached`
        return WeightSync(config, source=source, engines=own, model_path=model_path, rank=rank)

    def attached(self, spec: base.EngineSpec, *, attempt: str) -> AttachedEngine:
        return AttachedEngine(spec, attempt=attempt)

    def supervisor(self, spec: base.EngineSpec, *, attempt: str, logs: Path, nodes: int, node: int) -> Part:
        name = spec.name if node == 0 else f"{spec.name}-node{node}"
        engine = LocalEngine(dataclasses.replace(spec, run_dir=logs, name=name))
        return Part(engine, ServerFiles(spec.run_dir, spec.name, attempt=attempt), nodes=nodes, node=node)

    def running(self, server: RunningServerConfig, config: RolloutConfig) -> RunningServer:
        return RunningServer(server, config)

    def record(self, spec: base.EngineSpec, token_ids: Sequence[int], file: Path) -> None:
        record_once(spec, token_ids, file)

    def faults(self, config: RolloutConfig) -> list[str]:
        return parser_faults(config)


class Part:
    """A node's part of a server: node 0's answers requests, the others' join it."""

    def __init__(self, engine: LocalEngine, files: ServerFiles, *, nodes: int, node: int) -> None:
        self._engine, self._files, self._nodes, self._node = engine, files, nodes, node
        self.name, self.log_path = engine.name, engine.log_path

    def run(self, ended: threading.Event) -> None:
        if self._node:
            follow(self._engine, self._files, ended, nodes=self._nodes, node=self._node)
        else:
            supervise(self._engine, self._files, ended, nodes=self._nodes)

    def stop(self) -> None:
        self._engine.stop()
