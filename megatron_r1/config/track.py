"""Where a run can be watched live besides its own files, and what must be there for it.

Off by default: metrics.jsonl and the report need none of it. The writers are observe/trackers/, one file each.
"""

from __future__ import annotations

import netrc
import os
import socket
import urllib.parse
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from megatron_r1.bounds import Bound
from megatron_r1.config.packages import SUPPORTED, installed_versions, version_faults

TrackerName = Literal["tensorboard", "wandb", "prometheus"]

PACKAGES: Mapping[TrackerName, str] = {
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "prometheus": "prometheus-client",
}
"""What each tracker imports, as pip calls it; the versions are in packages.py."""

LOOPBACK = "127.0.0.1"
"""Prometheus's only address: the text names models and runs and is served to whoever asks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WandbConfig:
    """How the run is called at Weights & Biases. The key comes from `wandb login` or WANDB_API_KEY, never from here."""

    project: str = "megatron_r1"
    """Project at W&B."""
    entity: str = ""
    """User or team; empty: the account's own."""
    name: str = ""
    """Empty: the last part of run_dir. The part before it is the group, so a pipeline's stages stand together."""
    mode: Literal["online", "offline"] = "online"
    """offline writes to run_dir/wandb without a network; `wandb sync` uploads it later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrometheusConfig:
    """Prometheus's text format at http://127.0.0.1:PORT/metrics, as long as the run lasts."""

    port: Annotated[int, Bound("0 (a free one) or a port, 1 to 65535", least=0, most=65535)] = 0
    """0: a free one, which the run prints and writes to trackers.json in its folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackConfig:
    """Every number of metrics.jsonl goes to these too, as it is written. None can end or hold up the run."""

    names: tuple[TrackerName, ...] = ()
    """Any of tensorboard (run_dir/tensorboard), wandb and prometheus; needs `pip install 'megatron-r1[track]'`."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    prometheus: PrometheusConfig = field(default_factory=PrometheusConfig)


def tracker_faults(config: object) -> list[str]:
    """Of a stage's configuration; of one without trackers, none. Nothing is imported.

    The port and the key are rank 0's: no other rank, which may be on another machine, looks at them."""
    track = getattr(config, "track", None)
    if not isinstance(track, TrackConfig) or not track.names:
        return []
    if len(set(track.names)) < len(track.names):
        return [f"track.names is {' '.join(track.names)}; name each once"]
    here = os.environ.get("RANK", "0") == "0"
    versions = installed_versions()
    packages = [PACKAGES[name] for name in track.names]
    faults = [
        f"track.names has {name}, and {package} is not installed: pip install '{package}{SUPPORTED[package]}'"
        for name, package in zip(track.names, packages)
        if package not in versions
    ]
    faults += version_faults(tuple(packages), versions)
    if "wandb" in track.names:
        faults += _wandb_faults(track.wandb, here)
    if "prometheus" in track.names and here and 0 < track.prometheus.port < 65536:
        faults += _port_faults(track.prometheus.port)
    return faults


def _wandb_faults(wandb: WandbConfig, here: bool) -> list[str]:
    faults = []
    # W&B's own law for names of projects.
    if not wandb.project or len(wandb.project) > 128 or set(wandb.project) & set("/\\#?%:"):
        faults.append(
            f"track.wandb.project is {wandb.project!r}; it must have 1 to 128 characters, and none of / \\ # ? % :"
        )
    if here and wandb.mode == "online" and not has_wandb_key(os.environ):
        faults.append(
            "track.wandb.mode is online, and W&B has no key here: `wandb login`, or set WANDB_API_KEY, or use offline"
        )
    return faults


def has_wandb_key(environment: Mapping[str, str]) -> bool:
    """Whether a key lies where W&B looks for one (docs.wandb.ai, "wandb login"). It is not read any further."""
    if environment.get("WANDB_API_KEY") or environment.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urllib.parse.urlsplit(environment.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname
    files = [environment["NETRC"]] if environment.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for file in map(Path, files):
        try:
            if netrc.netrc(file.expanduser()).authenticators(host or "") is not None:
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def _port_faults(port: int) -> list[str]:
    with closing(socket.socket()) as probe:
        # As the server will: a port whose last connections are still being buried is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError as error:
            return [f"track.prometheus.port is {port}; it cannot be used ({error.strerror}): choose another, or 0"]
    return []
