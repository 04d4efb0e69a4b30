"""The other side of attached.py: start, watch and end a server on this node as the trainer's files ask.

Each function is the whole life of one server, or of one node's part of it, in a thread of its own. A server starts when
the trainer asks for it, because only then is its model there. Who asks too often is the trainer's business
(rollout.max_restarts).
"""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

from megatron_r1.engines.vllm.attached import POLL_SECONDS, Lost, Record, Request, ServerFiles, State
from megatron_r1.engines.vllm.command import NodeSpan
from megatron_r1.engines.vllm.server import LocalEngine, free_port
from megatron_r1.errors import EngineError


def supervise(engine: LocalEngine, files: ServerFiles, ended: threading.Event, *, nodes: int = 1) -> None:
    """Serve until `ended` is set. `nodes` > 1: other nodes' parts (`follow`) join this one, which answers requests."""
    request: Request | None = None
    state: State = "stopped"

    def publish(new: State, message: str = "") -> None:
        nonlocal state
        state = new
        assert request is not None
        files.write(
            Record(
                attempt=files.attempt,
                starts=request.starts,
                state=new,
                host=engine.host,
                port=engine.port,
                model_path=request.model_path,
                seed=request.seed,
                message=message,
                log=str(engine.log_path.resolve()),
                meeting=("", 0) if engine.span is None else (engine.span.address, engine.span.port),
            )
        )

    try:
        while not ended.wait(POLL_SECONDS):
            asked = files.read(Request)
            if asked is None:
                continue
            if request is None or asked.starts > request.starts:
                engine.stop()
                request = asked
                serve(engine, asked)
                if nodes > 1:
                    engine.span = NodeSpan(nodes=nodes, node=0, address=engine.host, port=free_port(engine.host))
                try:
                    engine.start()
                    publish("starting")
                    engine.wait_ready()
                    files.write_token(engine.token)
                    publish("ready")
                except (EngineError, OSError) as error:
                    engine.stop()
                    publish("failed", str(error))
            elif asked.stopped and state == "ready":
                engine.stop()
                publish("stopped")
            elif state == "ready" and not engine.alive():
                publish("dead", str(engine.death("died")))
                engine.stop()
            elif state == "ready" and (lost := files.read(Lost)) is not None and lost.starts == request.starts:
                engine.stop()
                publish("dead", lost.message)
    finally:
        engine.stop()


def serve(engine: LocalEngine, asked: Request | Record) -> None:
    """Let its next start be with the model and the seed that the trainer asks for."""
    engine.spec = dataclasses.replace(engine.spec, model_path=Path(asked.model_path), seed=asked.seed)


def follow(worker: LocalEngine, files: ServerFiles, ended: threading.Event, *, nodes: int, node: int) -> None:
    """Be node `node` of a server over `nodes` nodes: come and go with the part that answers requests."""
    starts = 0
    try:
        while not ended.wait(POLL_SECONDS):
            record = files.read(Record)
            if record is None:
                continue
            if record.state in ("starting", "ready") and record.starts > starts:
                worker.stop()
                starts = record.starts
                serve(worker, record)
                address, port = record.meeting
                worker.span = NodeSpan(nodes=nodes, node=node, address=address, port=port)
                worker.start()
            elif record.state not in ("starting", "ready"):
                worker.stop()
            elif starts and worker.process is not None and not worker.alive():
                message = str(worker.death(f"(node {node} of the server) died"))
                worker.stop()
                files.write(Lost(attempt=files.attempt, starts=starts, message=message))
    finally:
        worker.stop()
