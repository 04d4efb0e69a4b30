"""GRPO that is killed, asked to end, or stalls: started again it makes what it would have made, bit for bit."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from base_model import make_base, start_from
from reward_model_folder import save_reward_model
from safetensors.torch import load_file

from megatron_r1.recipes import RECIPES
from megatron_r1.stages.grpo.mismatch import Mismatch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]  # every start of a run starts a server too

STEPS = 8
SMALL = (
    "--prompts-per-step 4 --group-size 4 --data.holdout 8 "
    f"--steps {STEPS} --minibatches 2 --algorithm.kl.refresh-steps 5 --checkpoint-every 1 "
    "--rollout.routes replay "
    "--if-exists resume --rollouts-logged-per-step 100"
).split()


BASE: list[Path] = []


@pytest.fixture(scope="module", autouse=True)
def base(tmp_path_factory) -> None:
    BASE[:] = [make_base(tmp_path_factory.mktemp("base"))]


def start(folder: Path, *words: str, recipe: str = "tiny") -> subprocess.Popen:
    own = [*SMALL, *start_from(*BASE), "--run-dir", str(folder)]
    command = [sys.executable, "-m", "megatron_r1", "run", recipe, *own, *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen, status: int = 0) -> str:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == status, output
    return output


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def count(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_steps(process: subprocess.Popen, folder: Path, steps: int) -> None:
    deadline = time.monotonic() + 400
    while count(folder / "metrics.jsonl") < steps:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)


def ranks(process: subprocess.Popen) -> list[psutil.Process]:
    """The trainer ranks, in order."""
    found = [
        child
        for child in psutil.Process(process.pid).children()
        if "RANK" in child.environ() and "megatron_r1" in " ".join(child.cmdline())
    ]
    return sorted(found, key=lambda child: int(child.environ()["RANK"]))


def wait_until_gone(processes: list[psutil.Process]) -> None:
    _, left = psutil.wait_procs(processes, timeout=60)
    assert not left


def family(process: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def what_it_made(folder: Path) -> dict:
    """Everything that a run leaves, but for times, and for the mismatch: the servers' logprobs depend in their last
    bits on which requests were computed together. Nothing that trains reads them here."""
    passing = {"seconds", "tokens_per_second", *Mismatch().metrics()}
    return {
        "weights": {path.name: path.read_bytes() for path in (folder / "policy").glob("*.safetensors")},
        "metrics": [
            {key: value for key, value in row.items() if key not in passing} for row in lines(folder / "metrics.jsonl")
        ],
        "rollouts": lines(folder / "rollouts.jsonl"),
    }


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    finish(start(folder))
    return folder


def test_killed_at_ten_random_points_it_makes_the_same(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    chance = random.Random(11)
    points = sorted(chance.randrange(STEPS) for _ in range(10))
    for point in points:
        process = start(folder)
        wait_for_steps(process, folder, point)
        # A step takes some two seconds: anywhere in it, in its checkpoint, or, at point 0, in the start.
        time.sleep(chance.uniform(0.0, 2.0))
        children = family(process)
        process.kill()
        process.communicate()
        wait_until_gone(children)
        assert not (folder / "summary.json").exists()
    finish(start(folder))
    assert not folder.with_name("run.1").exists()
    found, expected = what_it_made(folder), what_it_made(uninterrupted)
    assert [row["step"] for row in found["metrics"]] == list(range(STEPS))
    asked, expected_asked = ([row["problem_id"] for row in made["rollouts"]] for made in (found, expected))
    assert asked == expected_asked  # no prompt is lost or repeated
    assert found == expected


def test_a_damaged_checkpoint_costs_only_the_steps_after_the_one_before(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    process = start(folder)
    wait_for_steps(process, folder, 5)
    children = family(process)
    process.kill()
    process.communicate()
    wait_until_gone(children)
    newest = sorted((folder / "checkpoints").glob("step_????????"))[-1]
    with open(newest / "state-00001.safetensors", "r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"\xff" * 8)
    output = finish(start(folder))
    assert f"{newest} is damaged (state-00001.safetensors)" in output
    assert newest.with_name(f"{newest.name}.damaged").is_dir()
    assert what_it_made(folder) == what_it_made(uninterrupted)


def test_asked_to_end_it_goes_on_in_another_layout(tmp_path):
    # Adam divides by the gradient's size; with a large eps, rounding changes the weights in proportion.
    words = ["--optimizer.eps", "1e-3", "--steps", "4"]
    two = ["--parallel.tensor", "2", "--parallel.sequence", "--parallel.expert", "1", "--parallel.expert-tensor", "2"]
    finish(start(tmp_path / "whole", *words, *two))
    folder = tmp_path / "run"
    process = start(folder, *words, *two)
    wait_for_steps(process, folder, 2)
    process.send_signal(signal.SIGUSR1)
    said = finish(process, status=75)
    assert "asked to end: stopped after step" in said
    assert count(folder / "metrics.jsonl") < 4
    output = finish(start(folder, *words))
    assert re.search(r"going on from \S+/checkpoints/step_0000000[23]", output)
    found, expected = (weights_of(run) for run in (folder, tmp_path / "whole"))
    assert found.keys() == expected.keys() and len(found) > 20
    for name, tensor in expected.items():
        scale = tensor.abs().max().clamp_min(1e-3)
        assert ((found[name] - tensor).abs().max() / scale).item() < 1e-5, name


def test_with_stale_samples_it_goes_on_from_a_sync_only(tmp_path):
    """Syncs after steps 3, 6 and 8. Asked to end in step 2 it ends after step 3; killed in step 6 it goes on from 3.
    Without the servers' logprobs in the loss: their last bits depend on what was computed together."""
    words = ["--sync-every", "3", "--checkpoint-every", "3", "--algorithm.correction.weight", "none"]
    finish(start(tmp_path / "whole", *words))
    folder = tmp_path / "run"
    process = start(folder, *words)
    wait_for_steps(process, folder, 1)
    process.send_signal(signal.SIGUSR1)
    assert "asked to end: stopped after step 3" in finish(process, status=75)
    process = start(folder, *words)
    wait_for_steps(process, folder, 5)
    children = family(process)
    process.kill()
    process.communicate()
    wait_until_gone(children)
    assert re.search(r"going on from \S+/checkpoints/step_0000000[36]", finish(start(folder, *words)))
    found, expected = what_it_made(folder), what_it_made(tmp_path / "whole")
    assert found == expected
    assert [row["weight_version"] for row in found["metrics"]] == [0, 0, 0, 3, 3, 3, 6, 6]
    assert [row["staleness"] for row in found["metrics"]] == [0, 1, 2, 0, 1, 2, 0, 1]


JUDGED = """
import dataclasses
from pathlib import Path

from megatron_r1.config.schema import PreferenceConfig
from megatron_r1.recipes import RECIPES


def judged():
    recipe = RECIPES["tiny"]()
    judge = PreferenceConfig(name="helpful", model=Path({folder!r}), domains=({domain!r},))
    return dataclasses.replace(recipe, rewards=dataclasses.replace(recipe.rewards, preferences=(judge,)))
"""


def test_with_a_reward_model_it_makes_the_same(tmp_path):
    """Whose server computes one text at a time: its values would depend on what is computed together."""
    domain, _, _ = RECIPES["tiny"]().data.tasks[0].partition(":")
    folder = save_reward_model(BASE[0], tmp_path / "judge")
    module = tmp_path / "judged_recipe.py"
    module.write_text(JUDGED.format(folder=str(folder), domain=domain))
    recipe = f"{module}:judged"
    finish(start(tmp_path / "whole", recipe=recipe))
    run = tmp_path / "run"
    process = start(run, recipe=recipe)
    wait_for_steps(process, run, 3)
    children = family(process)
    process.kill()
    process.communicate()
    wait_until_gone(children)
    assert "going on from" in finish(start(run, recipe=recipe))
    found, expected = what_it_made(run), what_it_made(tmp_path / "whole")
    assert len({row["helpful"] for row in found["metrics"]}) == STEPS, "it judges"
    assert found == expected


def weights_of(folder: Path) -> dict:
    return {
        name: tensor for file in (folder / "policy").glob("*.safetensors") for name, tensor in load_file(file).items()
    }


@pytest.mark.parametrize("stalled", ["rank", "server", "server of a run that only samples"])
def test_what_stalls_ends_the_run_with_stacks(tmp_path, stalled):
    folder = tmp_path / "run"
    deadlines = [f"--deadlines.{phase}" for phase in ("rollout", "reward", "logprob", "train", "save")]
    words = [word for name in deadlines for word in (name, "15")]
    words += ["--rollout-only"] if "samples" in stalled else []
    process = start(folder, *words)
    wait_for_steps(process, folder, 2)
    children = family(process)
    if stalled == "rank":
        victims = [ranks(process)[1]]
    else:
        victims = [child for child in children if "vllm" in " ".join(child.cmdline()).lower()]
    assert victims
    for victim in victims:
        victim.suspend()
    output = finish(process, status=75)
    wait_until_gone(children)
    stacks = (folder / "stacks" / "rank_00000.txt").read_text()
    assert "its deadline is 15 s" in output and "its deadline is 15 s" in stacks
    assert "thread MainThread:" in stacks and ("sample_only" if "samples" in stalled else "grpo/loop.py") in stacks
    if stalled == "rank":  # rank 0 waits for it in a collective
        assert re.search(r"waits in (broadcast|all_|barrier|reduce|send|recv|batch)\w*", stacks), stacks[:300]
    else:
        assert "phase rollout" in stacks
    heartbeat = json.loads((folder / "heartbeat.json").read_text())
    assert heartbeat["steps"] == STEPS and heartbeat["step"] >= 2
