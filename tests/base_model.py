"""A small base model for tests that run GRPO: what the quickstart's warm-up makes, in few steps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

STEPS = 50


def warm_up_words(run_dir: Path, *words: str) -> list[str]:
    """The command that makes it, in `run_dir`/warm_up/model."""
    given = f"--only warm_up --warm-up.steps {STEPS} --warm-up.batch-size 16 --warm-up.data.holdout 8".split()
    return [sys.executable, "-m", "megatron_r1", "run", "quickstart", *given, "--run-dir", str(run_dir), *words]


def make_base(run_dir: Path) -> Path:
    """Run the warm-up in `run_dir`; the model's folder."""
    done = subprocess.run(warm_up_words(run_dir), capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return run_dir / "warm_up/model"


def start_from(base: Path) -> list[str]:
    """The words with which recipe `tiny` starts from it, where it would take random weights."""
    return ["--model.path", str(base), "--model.initialise", "weights"]
