"""Watching and grading must not drag in what trains or draws."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "matplotlib", "rich", "megatron.core", "vllm")


@pytest.mark.parametrize(
    "modules",
    [
        "megatron_r1.observe.metrics, megatron_r1.observe.progress, megatron_r1.observe.report, "
        "megatron_r1.observe.rollouts",
        "megatron_r1.rewards.compose, megatron_r1.rewards.math, megatron_r1.rewards.worker",
        "megatron_r1.data.packing, megatron_r1.data.problems, megatron_r1.data.stream, megatron_r1.toy.demonstrations",
    ],
)
def test_import_is_light(modules):
    code = f"import sys, {modules}; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
