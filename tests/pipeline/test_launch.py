"""How a launch ends, with small processes in the place of ranks; and a run that has nothing left to do."""

import dataclasses
import json
import signal
import subprocess
import sys
import time

import pytest

from megatron_r1.pipeline import launch
from megatron_r1.pipeline.folder import STOP, is_finished, prepare_folder
from megatron_r1.pipeline.launch import Ranks, launch_local
from megatron_r1.pipeline.run import run_stage
from megatron_r1.recipes.tiny import tiny


@pytest.fixture
def processes(tmp_path, monkeypatch):
    """launch(*programs): the exit status of a launch whose rank i runs programs[i]."""
    monkeypatch.setattr(launch, "FOLLOW_SECONDS", 5.0)
    real = subprocess.Popen

    def start(*programs):
        left = iter(programs)
        monkeypatch.setattr(
            subprocess, "Popen", lambda command, **options: real([sys.executable, "-c", next(left)], **options)
        )
        return launch_local(tmp_path, ["tiny"], Ranks(world_size=len(programs), threads=1, cpu=True))

    return start


LATER = "import time; time.sleep(0.5); raise SystemExit({})"


@pytest.mark.parametrize(
    ("programs", "status"),
    [
        (("pass", "pass"), 0),
        (("raise SystemExit(3)", LATER.format(1)), 3),
        # A rank that lost the one that gave up fails first: the reason counts.
        (("raise SystemExit(1)", LATER.format(75)), 75),
        ((LATER.format(75), "raise SystemExit(1)"), 75),
        (("import os; os.kill(os.getpid(), 9)", "pass"), 128 + 9),
    ],
)
def test_the_exit_status_tells_why(processes, programs, status):
    assert processes(*programs) == status


def test_sigusr1_asks_by_a_file(processes, tmp_path):
    program = f"""
import os, signal, time
from pathlib import Path
os.kill({"{parent}"}, signal.SIGUSR1)
deadline = time.monotonic() + 20
while not Path({str(tmp_path / STOP)!r}).exists() and time.monotonic() < deadline:
    time.sleep(0.02)
raise SystemExit(75 if Path({str(tmp_path / STOP)!r}).exists() else 1)
"""
    before = signal.getsignal(signal.SIGUSR1)
    assert processes(program.replace("{parent}", "os.getppid()")) == 75
    assert signal.getsignal(signal.SIGUSR1) == before


@pytest.fixture
def finished(tmp_path):
    """A run's folder as its end leaves it."""
    config = dataclasses.replace(tiny(), run_dir=tmp_path / "run", if_exists="resume")
    prepare_folder(config).lock.close()
    (config.run_dir / "metrics.jsonl").write_text('{"step": 0, "reward_mean": 1.0}\n')
    summary = {"accuracy_before": 0.1, "accuracy_after": 0.2, "steps": 1, "seconds_total": 1.0}
    (config.run_dir / "summary.json").write_text(json.dumps(summary))
    return config


def test_a_finished_run_that_is_to_go_on_has_nothing_to_do(finished, capsys):
    begun = time.monotonic()
    assert run_stage(finished, ["tiny"]) == 0
    assert time.monotonic() - begun < 20
    assert "is finished: nothing to do; report: " in capsys.readouterr().out
    # It may have been killed before it wrote its report.
    assert (finished.run_dir / "report.html").exists()
    assert not finished.run_dir.with_name("run.1").exists()


@pytest.mark.parametrize("fields", [{"seed": 5}, {"if_exists": "archive"}])
def test_another_run_has(finished, fields):
    assert not is_finished(dataclasses.replace(finished, **fields))


def test_another_layout_is_the_same_run_unless_padding_counts(finished):
    wider = dataclasses.replace(finished, parallel=dataclasses.replace(finished.parallel, world_size=4))
    assert is_finished(wider)
    model = dataclasses.replace(finished.model, router_bias_update_rate=1e-3)
    counting = dataclasses.replace(finished, model=model, run_dir=finished.run_dir.with_name("counting"))
    prepare_folder(counting).lock.close()
    (counting.run_dir / "summary.json").write_text("{}")
    assert is_finished(counting)
    assert not is_finished(dataclasses.replace(counting, parallel=wider.parallel))
