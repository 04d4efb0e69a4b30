"""Prometheus's text format, served on loopback by the run itself while it lasts.

Gauges `megatron_r1_<metric>{stage, run}` hold the last value of each metric, NaN and infinities included. `run` is the
run's folder as it was given, so that two stages of one pipeline differ.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping

from megatron_r1.config.track import LOOPBACK
from megatron_r1.observe.trackers import Remember, TrackedRun, Tracker

PREFIX = "megatron_r1_"


def metric_name(name: str) -> str:
    """`seconds/rollout` is megatron_r1_seconds_rollout: Prometheus's names have letters, digits and _."""
    return PREFIX + re.sub(r"[^a-zA-Z0-9_]", "_", name)


class Prometheus:
    def __init__(self, run: TrackedRun, remember: Remember) -> None:
        from prometheus_client import CollectorRegistry, Gauge, start_http_server

        self._gauge, self._registry = Gauge, CollectorRegistry()
        self._labels = {"stage": run.stage, "run": str(run.folder)}
        self._gauges: dict[str, Gauge] = {}
        self._server, self._thread = start_http_server(run.track.prometheus.port, LOOPBACK, self._registry)
        self.about = f"http://{LOOPBACK}:{self._server.server_port}/metrics"
        self._remember = remember
        remember(url=self.about)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._set(name, value)
        self._set("step", step)
        self._set("last_step_time_seconds", time.time())

    def close(self, seconds: float) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self._remember(url=None)

    def _set(self, name: str, value: float) -> None:
        full = metric_name(name)
        if full not in self._gauges:
            text = f"{name} of the last step; docs/watching.md"
            self._gauges[full] = self._gauge(full, text, list(self._labels), registry=self._registry)
        self._gauges[full].labels(**self._labels).set(value)


def open_tracker(run: TrackedRun, remember: Remember) -> Tracker:
    return Prometheus(run, remember)
