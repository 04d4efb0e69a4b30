"""What trackers write, read back with their own readers; and what a run does when one of them is lost."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import socket
import struct
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from megatron_r1.config.track import PACKAGES, PrometheusConfig, TrackConfig, WandbConfig
from megatron_r1.observe import trackers, tracking
from megatron_r1.observe.metrics import OutputError, read_json_lines
from megatron_r1.observe.trackers import TRACKERS
from megatron_r1.observe.trackers.prometheus import metric_name
from megatron_r1.observe.tracking import RECORD, MetricsLog, numbers_of

ROWS = [
    {
        "step": step,
        "loss": 1.0 / (step + 1),
        "reward_mean": np.float64(step),
        "skipped": step == 1,
        "kl": math.nan if step == 1 else 0.5,
        "grad_norm": math.inf if step == 1 else 2,
        "seconds": {"rollout": 3.5, "train": np.float32(0.25)},
        "note": "words",
        "nothing": None,
        "list": [1, 2],
    }
    for step in range(4)
]


@dataclass(frozen=True, kw_only=True)
class Stage:
    run_dir: Path
    track: TrackConfig = field(default_factory=TrackConfig)
    lr: float = 1e-3


@pytest.fixture
def said():
    return []


@pytest.fixture
def log(tmp_path, said):
    """Opens a run's log: log("wandb", first_step=2)."""

    def opened(*names, first_step=0, **parts) -> MetricsLog:
        (tmp_path / "r1" / "base").mkdir(parents=True, exist_ok=True)
        config = Stage(run_dir=tmp_path / "r1" / "base", track=TrackConfig(names=names, **parts))
        return MetricsLog(config, stage="sft", say=said.append, first_step=first_step)

    return opened


def test_what_is_a_number():
    assert numbers_of(ROWS[0]) == {
        "loss": 1.0, "reward_mean": 0.0, "skipped": 0.0, "kl": 0.5, "grad_norm": 2.0,
        "seconds/rollout": 3.5, "seconds/train": 0.25,
    }  # fmt: skip
    found = numbers_of(ROWS[1])
    assert found["skipped"] == 1.0 and math.isnan(found["kl"]) and found["grad_norm"] == math.inf
    assert numbers_of({"step": 1, "huge": 10**400, "parts": {"step": 3}, "array": np.ones(2)}) == {"parts/step": 3.0}


def test_every_name_of_the_configuration_has_its_package_and_its_file():
    assert set(TRACKERS) == set(PACKAGES)
    assert all(Path(module.replace(".", "/") + ".py").name == f"{name}.py" for name, module in TRACKERS.items())


def test_without_trackers_there_is_the_file_alone(log, said, tmp_path):
    with log() as metrics:
        metrics.write(ROWS[1])
    assert [path.name for path in (tmp_path / "r1" / "base").iterdir()] == ["metrics.jsonl"]
    row = next(read_json_lines(tmp_path / "r1" / "base" / "metrics.jsonl"))
    assert row["kl"] is None and row["note"] == "words" and said == []


# ---- TensorBoard


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_reads_every_finite_number(log, said, tmp_path):
    with log("tensorboard") as metrics:
        for row in ROWS:
            metrics.write(row)
    found = scalars(tmp_path / "r1" / "base" / "tensorboard")
    assert set(found) == set(numbers_of(ROWS[0]))
    assert found["loss"] == [(step, pytest.approx(1 / (step + 1), rel=1e-6)) for step in range(4)]
    assert found["kl"] == [(step, 0.5) for step in (0, 2, 3)]
    assert found["seconds/train"] == [(step, 0.25) for step in range(4)]
    assert said == [f"tracked by tensorboard: {tmp_path / 'r1' / 'base' / 'tensorboard'}"]


def test_tensorboard_shows_no_step_of_a_restarted_run_twice(log, tmp_path):
    with log("tensorboard") as metrics:
        for row in ROWS:
            metrics.write(row)
    with log("tensorboard", first_step=2) as metrics:  # the checkpoint was of step 2
        for row in ROWS[2:]:
            metrics.write(row | {"loss": 7.0})
    loss = scalars(tmp_path / "r1" / "base" / "tensorboard")["loss"]
    assert loss == [(0, 1.0), (1, 0.5), (2, 7.0), (3, 7.0)]
    assert [row["loss"] for row in read_json_lines(tmp_path / "r1" / "base" / "metrics.jsonl")] == [1.0, 0.5, 7.0, 7.0]


# ---- Weights & Biases, offline


def offline_records(folder: Path) -> list:
    """The records of one run-*.wandb: LevelDB's log format (blocks of 32 KiB; crc, length and type before each piece)
    after a header of 7 bytes, each a Record of W&B's own protobuf."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("run-*.wandb")
    data, place, whole, found = path.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        piece = data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind == 0:
            continue
        whole = piece if kind in (1, 2) else whole + piece
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()  # pyright: ignore[reportAttributeAccessIssue]
            record.ParseFromString(whole)
            found.append(record)
    return found


def history(folder: Path) -> list[dict]:
    rows = []
    for record in offline_records(folder):
        if record.WhichOneof("record_type") == "history":
            rows.append(
                {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            )
    return rows


OFFLINE = WandbConfig(project="tests", mode="offline")


def test_wandb_goes_on_as_the_same_run_offline(log, said, tmp_path):
    folder = tmp_path / "r1" / "base"
    with log("wandb", wandb=OFFLINE) as metrics:
        for row in ROWS[:3]:
            metrics.write(row)
    (first,) = (folder / "wandb").glob("offline-run-*")
    with log("wandb", wandb=OFFLINE, first_step=2) as metrics:
        metrics.write(ROWS[2])
    (second,) = set((folder / "wandb").glob("offline-run-*")) - {first}
    identity = json.loads((folder / RECORD).read_text())["wandb"]["id"]
    for start in (first, second):
        (run,) = [record.run for record in offline_records(start) if record.WhichOneof("record_type") == "run"]
        told = (run.run_id, run.project, run.display_name, run.run_group, run.job_type)
        assert told == (identity, "tests", "base", "r1", "sft")
        config = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert config["lr"] == 1e-3 and config["track"]["wandb"]["mode"] == "offline"
    rows = history(first)
    assert [row["step"] for row in rows] == [0, 1, 2] and [row["step"] for row in history(second)] == [2]
    numbers = {name for name in rows[0] if not name.startswith("_")}
    assert numbers == {"step", *numbers_of(ROWS[0])} and rows[0]["seconds/train"] == 0.25
    assert "kl" not in rows[1] and "grad_norm" not in rows[1] and rows[1]["loss"] == 0.5
    assert len(said) == 2 and all(f"run {identity}; wandb sync" in line for line in said)


@pytest.mark.slow  # its seconds are those of a machine that is not busy
@pytest.mark.parametrize(
    ("sent", "says"),
    [("SIGKILL", "Connection lost"), ("SIGSTOP", "no end within 3 s: wandb sync|had not finished 3 s|HandleAbandoned")],
)
def test_a_run_outlives_wandbs_uploader(log, said, monkeypatch, sent, says):
    """Killed, and stopped for good: neither may end nor hold up the run, nor stay behind."""
    monkeypatch.setattr(tracking, "CLOSE_SECONDS", 3.0)
    before = set(psutil.Process().children(recursive=True))
    with log("wandb", wandb=OFFLINE) as metrics:
        metrics.write(ROWS[0])
        assert metrics._threads[0].opened.wait(60)
        started = set(psutil.Process().children(recursive=True)) - before
        (core,) = [process for process in started if "wandb-core" in process.name()]
        core.send_signal(getattr(signal, sent))
        for row in ROWS[1:]:
            metrics.write(row)
            time.sleep(0.2)
    warnings = [line for line in said if line.startswith("WARNING")]
    assert len(warnings) == 1 and "wandb is left out from here on, the run goes on" in warnings[0]
    assert re.search(says, warnings[0])  # on a busy machine its thread may be late too
    psutil.wait_procs(started, timeout=10)
    assert not [process for process in started if is_there(process)]


def is_there(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_wandb_without_its_server_is_left_out(log, said, monkeypatch, tmp_path):
    """Online, and nothing listens there: the run waits for no more than the opening and goes on."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{unused.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setattr(tracking, "OPEN_SECONDS", 0.5)
        monkeypatch.setattr(tracking, "CLOSE_SECONDS", 1.0)
        monkeypatch.setattr(tracking, "GRACE_SECONDS", 1.0)
        begun = time.monotonic()
        with log("wandb", wandb=WandbConfig(mode="online")) as metrics:
            metrics.write(ROWS[0])
        assert time.monotonic() - begun < 20
    assert len(said) == 1 and said[0].startswith("WARNING: wandb is left out from here on, the run goes on: ")
    assert [row["step"] for row in read_json_lines(tmp_path / "r1" / "base" / "metrics.jsonl")] == [0]


# ---- Prometheus


def scraped(url: str) -> dict[str, tuple[dict, float]]:
    with urllib.request.urlopen(url, timeout=10) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=")
        text = answer.read().decode()
    families = list(text_string_to_metric_families(text))
    assert all(family.type == "gauge" for family in families)
    return {sample.name: (sample.labels, sample.value) for family in families for sample in family.samples}


def test_prometheus_serves_the_last_step_on_loopback(log, said, tmp_path):
    folder = tmp_path / "r1" / "base"
    with log("prometheus") as metrics:
        url = json.loads((folder / RECORD).read_text())["prometheus"]["url"]
        assert said == [f"tracked by prometheus: {url}"] and url.startswith("http://127.0.0.1:")
        metrics.write(ROWS[0])
        metrics.write(ROWS[1])
        until = time.monotonic() + 20
        while scraped(url).get("megatron_r1_step", ({}, -1))[1] < 1 and time.monotonic() < until:
            time.sleep(0.05)
        found = scraped(url)
    assert found.keys() == {metric_name(name) for name in (*numbers_of(ROWS[0]), "step", "last_step_time_seconds")}
    assert all(labels == {"stage": "sft", "run": str(folder)} for labels, _ in found.values())
    assert found["megatron_r1_loss"][1] == 0.5 and found["megatron_r1_seconds_train"][1] == 0.25
    assert math.isnan(found["megatron_r1_kl"][1]) and found["megatron_r1_grad_norm"][1] == math.inf
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(url, timeout=10)
    assert json.loads((folder / RECORD).read_text())["prometheus"]["url"] is None


def test_prometheus_can_have_the_same_port_again_at_once(log, said):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for _ in range(2):
        with log("prometheus", prometheus=PrometheusConfig(port=port)) as metrics:
            metrics.write(ROWS[0])
            assert scraped(f"http://127.0.0.1:{port}/metrics") is not None
    assert said == [f"tracked by prometheus: http://127.0.0.1:{port}/metrics"] * 2


# ---- trackers that fail


def test_a_full_disk_ends_the_tracker_and_not_the_run(log, said, tmp_path):
    with log("tensorboard", "prometheus") as metrics:
        metrics.write(ROWS[0])
        (events,) = (tmp_path / "r1" / "base" / "tensorboard").iterdir()
        (held,) = [int(fd.name) for fd in Path("/proc/self/fd").iterdir() if fd.exists() and fd.samefile(events)]
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, held)
        os.close(full)
        for row in ROWS[1:]:
            metrics.write(row)
            time.sleep(0.1)
        assert [thread.name for thread in metrics._threads] == ["prometheus"]
    warnings = [line for line in said if line.startswith("WARNING")]
    assert warnings == [
        "WARNING: tensorboard is left out from here on, the run goes on: OSError: [Errno 28] No space left on device"
    ]
    assert len(list(read_json_lines(tmp_path / "r1" / "base" / "metrics.jsonl"))) == len(ROWS)


def test_a_tracker_that_cannot_open_is_left_out(log, said, tmp_path):
    (tmp_path / "r1" / "base").mkdir(parents=True)
    (tmp_path / "r1" / "base" / "tensorboard").write_text("a file")
    with log("tensorboard") as metrics:
        metrics.write(ROWS[0])
    assert len(said) == 1 and "tensorboard is left out" in said[0] and "FileExistsError" in said[0]


STUCK = """
import threading
class Stuck:
    about = "nowhere"
    def log(self, step, metrics):
        threading.Event().wait(60)
    def close(self, seconds): ...
def open_tracker(run, remember):
    return Stuck()
"""


def test_a_tracker_that_hangs_holds_up_nothing(log, said, monkeypatch, tmp_path):
    (tmp_path / "stuck_tracker.py").write_text(STUCK)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(trackers, "TRACKERS", {"tensorboard": "stuck_tracker"})
    monkeypatch.setattr(tracking, "MAX_WAITING", 2)
    begun = time.monotonic()
    with log("tensorboard") as metrics:
        for row in ROWS * 2:
            metrics.write(row)
    assert time.monotonic() - begun < 5
    assert said[-1].endswith("it is 2 steps behind; is its disk or its network there?") and len(said) == 2


def test_the_runs_own_file_is_not_a_tracker(log, tmp_path):
    """A full disk under metrics.jsonl ends the run, as ever."""
    with log("tensorboard") as metrics:
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, metrics._file._file)
        os.close(full)
        with pytest.raises(OutputError, match=r"metrics.jsonl"):
            metrics.write(ROWS[0])
