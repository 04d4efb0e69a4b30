"""Trainer and servers that take turns on their memory train the same policy as ones that do not, bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from base_model import make_base, start_from
from safetensors.torch import load_file

from megatron_r1.stages.grpo.mismatch import Mismatch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # three runs with a server each

WORDS = (
    "--steps 3 --prompts-per-step 4 --group-size 4 --data.holdout 8 --data.validation 4 --eval-every 1 --save-every 2 "
    "--checkpoint-every 2"
).split()
COLOCATED = {
    "level 1": "--rollout.sync ipc --rollout.sleep-level 1 --train.offload weights gradients optimizer".split(),
    "level 2": "--rollout.sync ipc --rollout.sleep-level 2 --train.offload gradients optimizer".split(),
}


def run(base: Path, folder: Path, *words: str) -> Path:
    own = [*WORDS, *start_from(base), "--run-dir", str(folder)]
    command = [sys.executable, "-m", "megatron_r1", "run", "tiny", *own, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


def rows(folder: Path) -> list[dict]:
    # vLLM's logprobs differ in their last bit with what else is in the batch, and only the mismatch shows them.
    timed = {"seconds", "tokens_per_second", *Mismatch().metrics()}
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in timed} for row in found]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def apart(base, tmp_path_factory) -> Path:
    return run(base, tmp_path_factory.mktemp("apart") / "run")


@pytest.mark.parametrize("how", COLOCATED)
def test_the_same_metrics_and_weights(base, apart, how, tmp_path):
    together = run(base, tmp_path / "run", *COLOCATED[how])
    assert rows(together) == rows(apart) and len(rows(apart)) == 3
    for name in ("policy_step_000002", "policy"):
        (file,) = (apart / name).glob("*.safetensors")
        expected, found = load_file(file), load_file(together / name / file.name)
        assert expected.keys() == found.keys() and all((expected[key] == found[key]).all() for key in expected), name
