"""launch.sh under a real Slurm: stages over two tasks on two nodes, servers on a third, killed, warned and refused.

What a job ends with is compared, bit for bit, with the same stage run by the local launcher.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import one_machine
import psutil
import pytest
from base_model import make_base, start_from

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "PYTHONPATH": str(ROOT),
    "PYTHON": sys.executable,
    "GPUS_PER_NODE": "1",
    "NETWORK_INTERFACE": "lo",
    "STOP_SECONDS": "20",
    "FOLLOW_SECONDS": "5",
}
SFT = ("--data.base", 960, "--data.cold-start", 64, "--data.held-out", 20, "--data.problems", 100)
SFT += ("--base.checkpoint-every", 1)
LONG = ("--base.data.epochs", 12)
"""Enough to be caught by a signal that may take half a minute to come."""
GRPO = ("--steps", 3, "--prompts-per-step", 4, "--group-size", 4, "--data.holdout", 8)


def local(*words):
    """Run a command with the launcher of this machine."""
    command = [sys.executable, "-m", "megatron_r1", "run", *map(str, words)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def submit(slurm, folder, nodes, *words, options=(), **settings):
    """sbatch of launch.sh WORDS; the job's number."""
    script = folder / "job.sh"
    script.write_text('#!/bin/bash\nexec bash slurm/launch.sh "$@"\n')
    command = ["sbatch", "--parsable", f"--nodes={nodes}", "--requeue", "--open-mode=append", "--output=%j.out"]
    return slurm.run(*command, f"--chdir={folder}", *options, script, *words, **SETTINGS, **settings).strip()


def logs(folder, job):
    """Everything that the job wrote, for messages."""
    files = [folder / f"{job}.out", *sorted((folder / "logs" / job).rglob("*.log"))]
    return "\n".join(f"--- {file}\n{file.read_text()[-3000:]}" for file in files if file.exists())


def processes(slurm, job, word=""):
    """The job's processes (on whichever node) whose command line has `word`, if one is given."""
    own = {"SLURM_CONF": slurm.environment["SLURM_CONF"], "SLURM_JOB_ID": job}
    found = []
    for process in psutil.process_iter():
        try:
            if (not word or word in process.cmdline()) and own.items() <= process.environ().items():
                found.append(process)
        except psutil.Error:
            continue
    return found


def left_after(slurm, job, seconds=30):
    """The processes of a job that has ended which are still there; a server that lost its supervisor has 8 s to end."""
    deadline = time.monotonic() + seconds
    while (left := processes(slurm, job)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


def kill_rank_1(slurm, job):
    """SIGKILL to the second rank itself, not to the shell around it or to srun."""
    own = [p for p in processes(slurm, job, "megatron_r1") if "run" in p.cmdline() and p.cmdline()[0] == sys.executable]
    (rank,) = [p for p in own if p.environ().get("RANK", p.environ()["SLURM_PROCID"]) == "1"]
    rank.kill()


def until(condition, slurm, folder, job, seconds=240):
    """Wait for a condition while the job may still meet it."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, logs(folder, job)
        assert slurm.job(job)["JobState"] in one_machine.GOING_ON, logs(folder, job)
        time.sleep(0.05)


def same_weights(one, other):
    """Whether two Hugging Face folders hold the same bits."""
    files = [sorted(folder.glob("*.safetensors")) for folder in (one, other)]
    assert files[0] and [file.name for file in files[0]] == [file.name for file in files[1]]
    return all(a.read_bytes() == b.read_bytes() for a, b in zip(*files, strict=True))


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The first two stages of r1_tiny by the local launcher, not interrupted."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    local("r1_tiny", "--run-dir", folder, *SFT, "--until", "base")
    return folder


@pytest.fixture(scope="module")
def chain(slurm, submit_folder, reference):
    """The same two stages as a chain of jobs; a rank of the second is killed after its first checkpoints."""
    run = submit_folder / "runs" / "chain"
    settings = SETTINGS | {"RECIPE": "r1_tiny", "STAGES": "data base", "SBATCH_GPUS_PER_NODE": "0"}
    command = ["bash", "slurm/r1_pipeline_671b.sh", "--run-dir", str(run), *map(str, SFT)]
    done = subprocess.run(
        command, cwd=submit_folder, env=slurm.environment | settings, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    jobs = dict(line.split(": job ") for line in done.stdout.splitlines())
    jobs = {name: rest.split(",")[0] for name, rest in jobs.items()}
    base = jobs["base"]
    until(lambda: (run / "base/checkpoints/step_00000003/stage.json").exists(), slurm, submit_folder, base)
    kill_rank_1(slurm, base)
    return {
        "run": run,
        "output": done.stdout,
        "ended": {name: slurm.wait(job) for name, job in jobs.items()},
        "logs": logs(submit_folder, base),
        "second": (submit_folder / "logs" / base / "1" / "ranks-0.log").read_text(),
    }


def test_a_chain_runs_each_stage_after_those_that_it_needs(chain):
    assert {name: job["JobState"] for name, job in chain["ended"].items()} == dict.fromkeys(
        ("data", "base"), "COMPLETED"
    ), chain["logs"]
    assert "base: job" in chain["output"] and "2 node(s), after" in chain["output"]


def test_a_killed_rank_is_requeued_and_goes_on_from_its_checkpoint(chain):
    assert chain["ended"]["base"]["Restarts"] == "1", chain["logs"]
    assert "going on from" in chain["second"] and "1 time(s) in a row" in chain["logs"]
    rows = [json.loads(line) for line in (chain["run"] / "base/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(len(rows)))


def test_the_weights_are_those_of_a_run_that_was_not_interrupted(chain, reference):
    assert same_weights(chain["run"] / "base/model", reference / "base/model")


def test_rank_0_keeps_the_manifest(chain, reference):
    ours, theirs = (json.loads((run / "manifest.json").read_text())["stages"] for run in (chain["run"], reference))
    assert {name: record["state"] for name, record in ours.items()} == {"data": "done", "base": "done"}
    assert ours["base"]["outputs"] == theirs["base"]["outputs"]
    assert ours["base"]["inputs"]["data.files[0]"]["stage"] == "data"


def test_a_stage_that_is_up_to_date_ends_at_once(slurm, submit_folder, chain):
    job = submit(slurm, submit_folder, 2, "r1_tiny", "--run-dir", chain["run"], *SFT, "--only", "base")
    assert slurm.wait(job)["JobState"] == "COMPLETED"
    assert "nothing to do" in logs(submit_folder, job)
    assert not list((submit_folder / "logs" / job / "0").glob("ranks-*"))


def test_the_signal_before_the_time_limit_requeues_and_nothing_is_lost(slurm, submit_folder, reference):
    """The limit is brought near once training has begun, and Slurm then warns, as it looks at limits twice a minute."""
    run = submit_folder / "runs" / "limit"
    words = ("r1_tiny", "--run-dir", run, *SFT, *LONG)
    data = submit(slurm, submit_folder, 1, *words, "--only", "data")
    assert slurm.wait(data)["JobState"] == "COMPLETED", logs(submit_folder, data)
    options = ("--time=30", "--signal=B:USR1@600")
    job = submit(slurm, submit_folder, 2, *words, "--only", "base", options=options)
    log = submit_folder / "logs" / job / "job.log"
    until(lambda: (run / "base/checkpoints/step_00000002/stage.json").exists(), slurm, submit_folder, job)
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=8")
    until(lambda: "SIGUSR1: the time limit is near" in log.read_text(), slurm, submit_folder, job)
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=30")
    ended = slurm.wait(job)
    assert ended["JobState"] == "COMPLETED" and ended["Restarts"] == "1", logs(submit_folder, job)
    assert "before the time limit: requeued" in log.read_text()
    first, second = ((submit_folder / "logs" / job / number / "ranks-0.log").read_text() for number in "01")
    assert "asked to end: stopped after step" in first
    assert "going on from" in second
    local("r1_tiny", "--run-dir", reference.parent / "long", *SFT, *LONG, "--until", "base")
    assert same_weights(run / "base/model", reference.parent / "long/base/model")


def test_a_wrong_configuration_is_not_requeued(slurm, submit_folder):
    job = submit(slurm, submit_folder, 3, "tiny", "--run-dir", submit_folder / "runs/wrong", "--group-size", 1)
    ended = slurm.wait(job)
    assert (ended["JobState"], ended["Restarts"], ended["ExitCode"]) == ("FAILED", "0", "2:0")
    assert "preflight: group_size is 1" in logs(submit_folder, job)
    assert not (submit_folder / "runs/wrong").exists()


def test_a_cancelled_job_stays_cancelled(slurm, submit_folder):
    job = submit(slurm, submit_folder, 1, "task", "sleep", 300)
    until(lambda: processes(slurm, job, "sleep"), slurm, submit_folder, job)
    slurm.run("scancel", job)
    ended = slurm.wait(job)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0")
    assert left_after(slurm, job) == []


def test_a_job_whose_node_fails_begins_again(slurm, submit_folder):
    again = '[ "${SLURM_RESTART_COUNT:-0}" != 0 ] || sleep 300'
    job = submit(slurm, submit_folder, 1, "task", "bash", "-c", again)
    until(lambda: processes(slurm, job, "sleep"), slurm, submit_folder, job)
    node = slurm.job(job)["NodeList"]
    slurm.run("scontrol", "update", f"NodeName={node}", "State=down", "Reason=test")
    slurm.run("scontrol", "update", f"NodeName={node}", "State=resume")
    ended = slurm.wait(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), logs(submit_folder, job)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """What the GRPO runs start from."""
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def grpo_words(base):
    return ("tiny", *start_from(base), *GRPO)


@pytest.fixture(scope="module")
def grpo_reference(tmp_path_factory, grpo_words):
    folder = tmp_path_factory.mktemp("grpo") / "run"
    local(*grpo_words, "--run-dir", folder)
    return folder


@pytest.fixture(scope="module")
def grpo(slurm, submit_folder, grpo_words):
    """tiny over two ranks on two nodes and a server on the third, which is killed after the first step."""
    run = submit_folder / "runs" / "grpo"
    job = submit(slurm, submit_folder, 3, *grpo_words, "--run-dir", run)
    metrics = run / "metrics.jsonl"
    until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 1, slurm, submit_folder, job)
    token = run / "servers" / "vllm-0.token"
    found = {
        "token_mode": token.stat().st_mode & 0o777,
        "folder_mode": token.parent.stat().st_mode & 0o777,
        "lines": [" ".join(process.cmdline()) for process in processes(slurm, job)],
        "token": token.read_text(),
        "server": json.loads((run / "servers" / "vllm-0.json").read_text()),
    }
    server = processes(slurm, job, "megatron_r1.engines.vllm.launch")[0]
    found["server_node"] = server.environ()["SLURMD_NODENAME"]
    os.killpg(server.pid, signal.SIGKILL)
    ended = slurm.wait(job)
    return found | {"run": run, "job": ended, "logs": logs(submit_folder, job)}


def test_grpo_with_its_server_on_another_node_ends_with_the_weights_of_one_machine(grpo, grpo_reference, base):
    assert grpo["job"]["JobState"] == "COMPLETED" and grpo["job"]["Restarts"] == "0", grpo["logs"]
    assert grpo["server_node"] == "node3"
    assert same_weights(grpo["run"] / "policy", grpo_reference / "policy")
    assert not same_weights(grpo["run"] / "policy", base), "it has learnt something"


def test_a_server_that_dies_is_restarted_by_its_supervisor_and_given_the_current_weights(grpo):
    last = json.loads((grpo["run"] / "servers" / "vllm-0.json").read_text())
    assert (grpo["server"]["starts"], last["starts"]) == (1, 2)
    rows = [json.loads(line) for line in (grpo["run"] / "metrics.jsonl").read_text().splitlines()]
    assert [row["weight_version"] for row in rows] == [0, 1, 2]


def test_the_token_is_in_a_file_of_its_owner_and_on_no_command_line(grpo):
    assert (grpo["token_mode"], grpo["folder_mode"]) == (0o600, 0o700)
    assert len(grpo["token"]) > 30 and grpo["lines"]
    assert not any(grpo["token"] in line for line in grpo["lines"])


def test_no_process_of_a_job_is_left(slurm, grpo):
    assert left_after(slurm, grpo["job"]["JobId"]) == []


@pytest.mark.parametrize("how", ["killed rank", "warned"])
def test_grpo_that_was_interrupted_ends_with_the_same_weights(slurm, submit_folder, grpo_words, grpo_reference, how):
    run = submit_folder / "runs" / f"grpo-{how.split()[0]}"
    words = (*grpo_words, "--run-dir", run, "--if-exists", "resume", "--checkpoint-every", 1)
    job = submit(slurm, submit_folder, 3, *words)
    metrics = run / "metrics.jsonl"
    until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 1, slurm, submit_folder, job)
    if how == "warned":
        slurm.run("scancel", "--batch", "--signal=USR1", job)
    else:
        kill_rank_1(slurm, job)
    ended = slurm.wait(job, seconds=400)
    assert ended["JobState"] == "COMPLETED" and ended["Restarts"] == "1", logs(submit_folder, job)
    assert same_weights(run / "policy", grpo_reference / "policy")
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
