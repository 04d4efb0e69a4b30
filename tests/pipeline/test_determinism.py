"""Two runs of one configuration make the same weights, to the bit: 20 steps, with a real server, bf16 rollouts,
experts replayed and a correction in the loss, so that everything the server says is in the gradient."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from base_model import make_base, start_from

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]  # two runs of 20 steps
STEPS = 20
PASSING = {"seconds", "tokens_per_second"}


def run(folder: Path, base: Path, *words: str) -> dict:
    """What it leaves, but for times."""
    given = (
        f"--prompts-per-step 4 --group-size 4 --data.holdout 8 --eval-every 0 --steps {STEPS} --minibatches 2".split()
    )
    given += ["--rollout.routes", "replay", "--rollout.dtype", "bf16", "--algorithm.correction.weight", "token"]
    command = [sys.executable, "-m", "megatron_r1", "run", "tiny", *given, *start_from(base), *words]
    done = subprocess.run(
        [*command, "--run-dir", str(folder)], capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "weights": (folder / "policy" / "model.safetensors").read_bytes(),
        "metrics": [{key: value for key, value in row.items() if key not in PASSING} for row in rows],
        "rollouts": (folder / "rollouts.jsonl").read_text(),
    }


def test_twenty_steps_twice(tmp_path):
    """One problem a step, so that there is one request at a time: which requests vLLM computes together is a matter of
    their arrival, and changes the last bits of its logprobs (docs/restart.md)."""
    base = make_base(tmp_path / "base")
    one, other = (run(tmp_path / name, base, "--train.deterministic") for name in ("one", "other"))
    assert len(one["metrics"]) == STEPS
    assert one["rollouts"] == other["rollouts"]
    for first, second in zip(one["metrics"], other["metrics"], strict=True):
        assert first == second
    assert one["weights"] == other["weights"]
