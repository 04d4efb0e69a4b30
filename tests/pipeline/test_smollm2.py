"""The first two steps of the SmolLM2 example: real weights, real tokens. Minutes, so run by make test-slow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_steps_of_the_example(tmp_path):
    environment = dict(os.environ) | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    words = "--grpo.steps 2 --warm-up.data.holdout 4 --grpo.data.holdout 4 --run-dir".split()
    words.append(str(tmp_path / "run"))
    script = str(ROOT / "examples" / "grpo_smollm2.sh")
    done = subprocess.run(
        ["bash", script, *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "run" / "grpo" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1]
    assert [row["weight_version"] for row in rows] == [0, 1]
    # engine and trainer agree on a real model: a wrong rotary or head mapping would differ by whole nats
    assert all(row["mismatch"] < 0.02 for row in rows)
    assert all(row["length_mean"] > 5 for row in rows)
    texts = [
        json.loads(line)["completion"]
        for line in (tmp_path / "run" / "grpo" / "rollouts.jsonl").read_text().splitlines()
    ]
    assert any(any(character.isalpha() for character in text) for text in texts)
