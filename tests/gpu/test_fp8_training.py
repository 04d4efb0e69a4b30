"""On a GPU with Transformer Engine: FP8 training follows bf16's loss, and is worth its trouble.

Run by `make test-gpu`. Skipped, with the reason, elsewhere.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_r1.config.trainer_faults import has_module

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module", autouse=True)
def hopper():
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a GPU: torch.cuda.is_available() is False")
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip(f"needs an H100 or newer for blockwise FP8; this is {torch.cuda.get_device_name()}")
    if not has_module("transformer_engine"):
        pytest.skip("needs Transformer Engine: make install-gpu")


def measure(tmp_path: Path, config: Path, *words: str) -> dict:
    out = tmp_path / "out.json"
    command = [sys.executable, str(ROOT / "tools" / "benchmark_precision.py"), "--config", str(config), *words]
    done = subprocess.run([*command, "--json", str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)  # pytest -s shows the table
    return json.loads(out.read_text())["dtypes"]


def check_curves(rows: dict, tolerance: float) -> None:
    """The paper's own measure: FP8's loss stays within a small share of bf16's (V3 report, section 3.3: 0.25 %)."""
    bf16, fp8 = rows["bf16"]["losses"], rows["fp8"]["losses"]
    assert bf16[-1] < 0.8 * bf16[0]  # it learns
    assert fp8 != bf16  # it is another precision
    last = len(bf16) // 5
    mean_bf16, mean_fp8 = sum(bf16[-last:]) / last, sum(fp8[-last:]) / last
    assert abs(mean_fp8 - mean_bf16) / mean_bf16 < tolerance


@pytest.mark.parametrize("recipe", ["blockwise", "tensorwise", "delayed"])
def test_a_dense_model_learns_as_in_bf16(tmp_path, recipe):
    config = ROOT / "megatron_r1" / "recipes" / "tiny_qwen2" / "config.json"
    check_curves(measure(tmp_path, config, "--recipe", recipe, "--steps", "100", "--tokens", "1024"), 0.02)


def test_four_layers_at_671b_width_learn_as_in_bf16_and_faster(tmp_path):
    config = ROOT / "tests" / "planning" / "deepseek_v3.json"
    small = ["--layers", "4", "--experts", "16", "--vocabulary", "16384"]  # 65 GB of weights and state
    rows = measure(tmp_path, config, *small, "--steps", "60", "--tokens", "4096")
    check_curves(rows, 0.01)
    assert rows["fp8"]["tokens_per_second"] > rows["bf16"]["tokens_per_second"]
