"""A pipeline from the command line: stages in order, none run twice for nothing, none lost by a kill."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from written_names import undocumented

from megatron_r1.__main__ import main

SMALL = (
    "--data.base 960 --base.checkpoint-every 1 --data.cold-start 64 --data.held-out 20 --data.problems 100"
).split()


def start(folder, *words):
    command = [sys.executable, "-m", "megatron_r1", "run", "r1_tiny", "--run-dir", str(folder), *SMALL, *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(folder, *words):
    process = start(folder, *words)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


def weights(folder, stage):
    return manifest(folder)["stages"][stage]["outputs"]["model"]["content"]


def wait_for(file, process):
    deadline = time.monotonic() + 120
    while not (file.exists() and file.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert file.exists()


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A pipeline that was killed in the middle of its second stage, which two trackers watch, then started again."""
    folder = tmp_path_factory.mktemp("pipeline") / "run"
    words = ("--until", "base", "--base.track.names", "tensorboard", "wandb", "--base.track.wandb.mode", "offline")
    process = start(folder, *words)
    wait_for(folder / "base" / "checkpoints" / "step_00000001" / "stage.json", process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    before = manifest(folder)
    status, output = run(folder, *words)
    return {"folder": folder, "before": before, "status": status, "output": output}


def test_a_killed_pipeline_goes_on_with_the_stage_that_it_was_in(killed):
    assert killed["status"] == 0, killed["output"]
    states = {name: record["state"] for name, record in killed["before"]["stages"].items()}
    assert states == {"data": "done", "base": "running"}
    assert "[1/2] data: up to date" in killed["output"]
    assert "[2/2] base: done" in killed["output"]
    assert "going on from" in killed["output"] and not (killed["folder"] / "base.1").exists()
    rows = [json.loads(line) for line in (killed["folder"] / "base" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(len(rows))) and len(rows) > 5


def test_trackers_show_a_restarted_stage_as_one_run(killed):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    base = killed["folder"] / "base"
    rows = [json.loads(line) for line in (base / "metrics.jsonl").read_text().splitlines()]
    events = EventAccumulator(str(base / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    loss = [(event.step, event.value) for event in events.Scalars("loss")]
    assert loss == [(row["step"], pytest.approx(row["loss"], rel=1e-6)) for row in rows]
    assert len(list((base / "tensorboard").iterdir())) == 2, "a file a start"
    identity = json.loads((base / "trackers.json").read_text())["wandb"]["id"]
    starts = [folder.name for folder in (base / "wandb").glob("offline-run-*")]
    assert len(starts) == 2 and all(name.endswith(f"-{identity}") for name in starts)
    assert "WARNING" not in killed["output"]


@pytest.mark.parametrize(("stage", "kind"), [("data", "tiny_world"), ("base", "sft")])
def test_every_number_is_in_the_table_of_names(killed, stage, kind):
    assert undocumented(killed["folder"] / stage, kind) == set()


def test_the_report_is_written(killed):
    page = (killed["folder"] / "report.html").read_text()
    assert "2 of 14 stages done" in page and "validation loss" in page


@pytest.mark.slow  # two more starts of a pipeline
def test_it_makes_what_a_run_without_a_kill_makes(killed, tmp_path):
    # Somewhere else, so that nothing of the killed one can be taken; and no stage depends on where it runs.
    status, output = run(tmp_path / "run", "--until", "base")
    assert status == 0, output
    assert weights(tmp_path / "run", "base") == weights(killed["folder"], "base")
    # A stage whose inputs are unchanged is not run again; one with another configuration is.
    status, output = run(tmp_path / "run", "--until", "base")
    assert "[2/2] base: up to date" in output and status == 0
    status, output = run(tmp_path / "run", "--until", "data", "--data.pairs", "50")
    assert "[1/1] data: done" in output and status == 0, output


@pytest.mark.slow  # two more starts of a pipeline
def test_asked_to_end_it_saves_though_no_interval_says_so(killed, tmp_path):
    folder, words = tmp_path / "run", ("--until", "base", "--base.checkpoint-every", "0")
    process = start(folder, *words)
    wait_for(folder / "base" / "metrics.jsonl", process)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 75, output
    assert "asked to end: stopped after step" in output and "run the same command again to go on" in output
    status, output = run(folder, *words)
    assert status == 0 and "going on from" in output, output
    assert weights(folder, "base") == weights(killed["folder"], "base")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--only", "nowhere"), "--only nowhere: no stage is called so; there are data, base"),
        (("--from", "base", "--until", "data"), "--until data comes before --from base"),
        (("--only", "base", "--until", "base"), "--only names one stage"),
        (("--only", "base", "--only", "data"), "--only is given twice"),
        (("--until",), "--until needs the name of a stage"),
        (("--only", "student"), "student.model.path:"),
        (("--base.data.epochs", "0", "--second-sft.data.epochs", "0"), "second_sft.data.epochs is 0"),
    ],
)
def test_a_wrong_choice_is_said_before_anything_runs(tmp_path, capsys, words, said):
    status = main(["run", "r1_tiny", "--run-dir", str(tmp_path / "run"), *SMALL, *words])
    assert status == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run" / "data").exists()


def test_rank_0_under_an_outer_launcher_records_its_stage(tmp_path):
    command = [sys.executable, "-m", "megatron_r1", "run", "r1_tiny", "--run-dir", str(tmp_path / "run"), *SMALL]
    outer = os.environ | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    done = subprocess.run([*command, "--only", "data"], env=outer, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    record = manifest(tmp_path / "run")["stages"]["data"]
    assert record["state"] == "done" and "missing" not in record["outputs"].values()
    again = subprocess.run(command, env=outer, capture_output=True, text=True, timeout=120)
    assert again.returncode == 2 and "add --only STAGE" in again.stderr
    # The whole pipeline, which another command runs, keeps a single stage out; side by side, stages keep nobody out.
    with open(tmp_path / "run" / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        kept_out = subprocess.run([*command, "--only", "data"], env=outer, capture_output=True, text=True, timeout=120)
        assert kept_out.returncode == 2 and "this whole pipeline is already running" in kept_out.stderr
