"""The tests that need a GPU, tried on the CPU: their code runs, their tools measure, the page is written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]


def test_the_gpu_suite_runs_on_a_cpu():
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", ROOT / "tests" / "gpu"]
    done = subprocess.run(
        command, cwd=ROOT, env=dict(os.environ) | {"GPU_TESTS_ON_CPU": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:]
    page = (ROOT / "build" / "gpu_results_of_a_cpu.md").read_text(encoding="utf-8")
    for title in ("A GRPO step beside the CPU's", "Head and loss in bf16", "Throughput of a GRPO step"):
        assert f"## {title}" in page
    assert "| failed |" not in page
