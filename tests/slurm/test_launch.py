"""launch.sh without Slurm: what it asks srun for, and what it makes of how a step ended.

srun and scontrol are small scripts here: srun notes its words and runs the command once a task, with the variables that
the real one sets. Its sleep lasts a tenth of a second, as it is in launch.sh between two looks at what runs. The same
launch.sh under the real ones is test_jobs.py.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from megatron_r1.__main__ import main

ROOT = Path(__file__).parents[2]

SRUN = """#!/bin/bash
echo "${*//$'\\n'/ }" >> "$WORDS"
tasks=1 output=/dev/stdout
while [[ $1 == --* ]]; do
    case $1 in
    --ntasks=*) tasks=${1#*=} ;;
    --output=*) output=${1#*=} ;;
    esac
    shift
done
pids=()
for ((rank = 0; rank < tasks; rank++)); do
    SLURM_NODEID=$rank SLURM_PROCID=$rank SLURM_NTASKS=$tasks SLURM_LOCALID=0 SLURM_STEP_ID=0 \
        SLURM_STEP_TASKS_PER_NODE="1(x$tasks)" "$@" >"${output//%t/$rank}" 2>&1 &
    pids+=($!)
done
highest=0
for pid in "${pids[@]}"; do
    wait "$pid" || { status=$?; ((status > highest)) && highest=$status; }
done
exit "$highest"
"""
SCONTROL = """#!/bin/bash
[ "$1" = show ] && for ((node = 1; node <= SLURM_JOB_NUM_NODES; node++)); do echo "node$node"; done
[ "$1" = requeue ] && { echo "$2" >> "$REQUEUED"; kill -TERM $PPID; }
exit 0
"""

SLEEP = f"""#!/bin/bash
exec {shutil.which("sleep")} 0.1
"""


@pytest.fixture
def job(tmp_path):
    """A folder to submit from, and a function that runs launch.sh in it as one attempt of job 7."""
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("sleep", SLEEP)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "slurm").symlink_to(ROOT / "slurm")

    def launch(*words, nodes=1, attempt=0, script="slurm/launch.sh", **settings):
        environment = os.environ | {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "WORDS": str(tmp_path / "words"),
            "REQUEUED": str(tmp_path / "requeued"),
            "SLURM_JOB_ID": "7",
            "SLURM_RESTART_COUNT": str(attempt),
            "SLURM_JOB_NUM_NODES": str(nodes),
            "SLURM_JOB_NODELIST": "any",
            "SLURM_CPUS_ON_NODE": "2",
            "PYTHON": sys.executable,
            "GPUS_PER_NODE": "1",
            "NETWORK_INTERFACE": "lo",
            "FOLLOW_SECONDS": "0",
            **settings,
        }
        command = ["bash", script, *map(str, words)]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)

    launch.folder = tmp_path
    return launch


def requeues(job):
    file = job.folder / "requeued"
    return len(file.read_text().splitlines()) if file.exists() else 0


def said(job):
    return (job.folder / "logs" / "7" / "job.log").read_text()


def asked(job):
    return (job.folder / "words").read_text()


def test_what_ends_well_is_not_requeued(job):
    assert job("task", "true").returncode == 0
    assert requeues(job) == 0 and "done" in said(job)


def test_a_failure_is_requeued_a_bounded_number_of_times(job):
    for attempt in range(3):
        job("task", "bash", "-c", "exit 9", attempt=attempt, MAX_FAILURES="3")
    assert requeues(job) == 3
    done = job("task", "bash", "-c", "exit 9", attempt=3, MAX_FAILURES="3")
    assert done.returncode == 9 and requeues(job) == 3
    assert "given up" in said(job)


def test_a_killed_process_is_a_failure(job):
    job("task", "bash", "-c", "kill -9 $$")
    assert requeues(job) == 1 and "status 137" in said(job)


def test_what_got_further_may_fail_again(job):
    """The list begins anew when the heartbeat shows another step than at the last failure."""
    for attempt in range(4):
        (job.folder / "heartbeat.json").write_text(f'{{"time": 0, "phase": "train", "step": {attempt}, "steps": 9}}')
        job("task", "bash", "-c", "exit 9", attempt=attempt, MAX_FAILURES="1")
    assert requeues(job) == 4
    job("task", "bash", "-c", "exit 9", attempt=4, MAX_FAILURES="1")
    assert requeues(job) == 4, "no step forward since the last failure"


def test_a_refusal_is_not_requeued(job):
    done = job("task", "bash", "-c", "exit 2")
    assert done.returncode == 2 and requeues(job) == 0 and "refused" in said(job)


@pytest.mark.parametrize(("left", "status"), [(["1", "2"], 2), (["75", "1"], 75)])
def test_the_rank_that_says_why_counts_and_not_the_highest_status(job, left, status):
    """A rank that is ended with the others has a higher status than the one that refused or asked."""
    write = "; ".join(f"echo {code} > $MEGATRON_R1_JOB/exit/0.{rank}" for rank, code in enumerate(left, start=1))
    done = job("task", "bash", "-c", f"{write}; exit 143")
    assert f"status {status}" in said(job) or done.returncode == status
    assert requeues(job) == (status == 75)


def warn(job):
    """What Slurm does to the batch script some time before the limit, once its task has begun."""
    deadline = time.monotonic() + 60
    while not (job.folder / "begun").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            if process.cmdline()[:3] == ["bash", "slurm/launch.sh", "task"] and process.cwd() == str(job.folder):
                found[process.pid] = process
    # Its subshells have its command line until they run something else.
    (launcher,) = [process for process in found.values() if process.ppid() not in found]
    launcher.send_signal(signal.SIGUSR1)


@pytest.mark.parametrize("status", [1, 2])
def test_what_cannot_be_asked_to_end_is_ended_before_the_time_limit_and_requeued(job, status):
    """Also a conversion, which says 2 when it is stopped, as when it is refused."""
    threading.Thread(target=warn, args=(job,), daemon=True).start()
    words = f"trap 'echo ended > got; exit {status}' TERM; touch begun; while [ -e begun ]; do sleep 0.1; done"
    job("task", "bash", "-c", words)
    (job.folder / "begun").unlink()  # Slurm would kill it; here it ends by itself
    assert requeues(job) == 1 and "before the time limit" in said(job)


def test_a_registry_image_goes_to_pyxis_and_a_sif_file_to_apptainer(job):
    job("task", "true", CONTAINER_IMAGE="registry#team/r1:1", CONTAINER_MOUNTS="/data:/data")
    assert "--container-image=registry#team/r1:1" in asked(job)
    assert f"--container-mounts={job.folder}:{job.folder},/data:/data" in asked(job)
    job("task", "true", CONTAINER_IMAGE="r1.sif")
    last = asked(job).splitlines()[-1]
    assert f"apptainer exec --nv --bind {job.folder}:{job.folder} --pwd {job.folder} r1.sif true" in last.replace(
        "\n", " "
    )
    assert "--container-image" not in last


def test_network_settings_come_from_one_place_and_yield_to_what_is_set(job):
    show = "env | grep -E '^(NCCL|GLOO|CUDA_DEVICE|MEGATRON_R1_INTERFACE)' | sort > shown"
    job("task", "bash", "-c", show, NETWORK_INTERFACE="ib0", NCCL_DEBUG="INFO")
    shown = (job.folder / "shown").read_text().splitlines()
    assert {"NCCL_SOCKET_IFNAME=ib0", "GLOO_SOCKET_IFNAME=ib0", "MEGATRON_R1_INTERFACE=ib0"} <= set(shown)
    assert {"NCCL_DEBUG=INFO", "CUDA_DEVICE_MAX_CONNECTIONS=1"} <= set(shown)


def test_the_nodes_are_waited_for_as_long_as_the_job_says(job):
    done = job("tiny", "--run-dir", job.folder / "run", nodes=2, PREFLIGHT_SECONDS="77")
    assert done.returncode == 2 and "preflight: up to 77 s for all nodes to report; output: " in said(job)
    job("task", "bash", "-c", "echo $MEGATRON_R1_PREFLIGHT_SECONDS > shown")
    assert (job.folder / "shown").read_text() == "900\n"
    done = job("tiny", "--run-dir", job.folder / "run", nodes=3, PREFLIGHT_SECONDS="soon")
    assert done.returncode == 2 and requeues(job) == 0
    assert "PREFLIGHT_SECONDS is 'soon'; it must be whole seconds above 0" in said(job)


def test_too_few_nodes_are_refused_with_one_line_before_anything_starts(job):
    done = job("tiny", "--run-dir", job.folder / "run", nodes=2)
    assert done.returncode == 2 and requeues(job) == 0
    lines = [line for line in said(job).splitlines() if "r1: preflight:" in line]
    assert lines == [
        "megatron-r1: preflight: nodes: tiny needs 3 node(s) of 1 slot(s) (2 for 2 rank(s), 1 for 1 server(s)), and "
        "the job has only 2: submit it with --nodes=3"
    ]
    assert len(asked(job).splitlines()) == 1, "only the check was started"
    assert not (job.folder / "run").exists()


def test_a_wrong_field_is_refused_before_anything_starts(job):
    done = job("tiny", "--run-dir", job.folder / "run", "--group-size", 1, nodes=3)
    assert done.returncode == 2 and requeues(job) == 0
    assert "preflight: group_size is 1" in said(job) and len(asked(job).splitlines()) == 1


@pytest.mark.slow  # imports vLLM
def test_arguments_that_vllm_does_not_know_are_refused_before_anything_starts(job):
    done = job("tiny", "--run-dir", job.folder / "run", "--rollout.vllm-args", "no-such-flag=1", nodes=3)
    assert done.returncode == 2 and requeues(job) == 0 and len(asked(job).splitlines()) == 1
    assert "preflight: rollout.vllm_args is no-such-flag=1; vLLM does not take it: " in said(job)


def test_a_port_in_use_is_refused(job):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = job("tiny", "--run-dir", job.folder / "run", nodes=3, MASTER_PORT=str(port))
    assert done.returncode == 2 and f"preflight: port {port} cannot be used on node1 (127.0.0.1)" in said(job)


def test_the_671b_model_is_prepared_in_a_job_that_says_what_is_missing(job):
    (job.folder / "tools").symlink_to(ROOT / "tools")
    for given, folder in (([], "models/DeepSeek-V3-Base-FP8"), (["here", "there", "--recipe", "grpo_671b"], "here")):
        done = job(*given, script="slurm/prepare_671b.sh")
        assert done.returncode == 2 and requeues(job) == 0
        log = (job.folder / "logs" / "7" / "0" / "task-0.log").read_text()
        assert f"{folder}: does not exist; fetch the published model there first" in log
    assert "tools/prepare_checkpoint.py here there --workers 2 --recipe grpo_671b" in asked(job)


@pytest.mark.parametrize("script", sorted((ROOT / "slurm").glob("*.sh")), ids=lambda path: path.name)
def test_scripts_parse_and_ask_slurm_for_what_a_restart_needs(script):
    subprocess.run(["bash", "-n", script], check=True)
    if script.name != "launch.sh":
        text = script.read_text()
        assert "#SBATCH --requeue" in text and "#SBATCH --signal=B:USR1@" in text and "--open-mode=append" in text


def test_scripts_pass_shellcheck():
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed (apt-get install shellcheck)")
    done = subprocess.run(["shellcheck", *sorted((ROOT / "slurm").glob("*.sh"))], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("script", "recipe"), [("grpo_671b", "grpo_671b"), ("sft_671b", "sft_671b"), ("distill_32b", "distill_32b")]
)
def test_a_script_asks_for_as_many_nodes_as_its_recipe_needs(script, recipe, capsys):
    assert main(["nodes", recipe, "--slots-per-node", "8"]) == 0
    nodes = capsys.readouterr().out.split()[1]
    assert f"#SBATCH --nodes={nodes}\n" in (ROOT / "slurm" / f"{script}.sh").read_text()
