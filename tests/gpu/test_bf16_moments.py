"""On a GPU with Transformer Engine: Adam with moments in bf16 (optimizer.moments) steps, is restarted and holds the
bytes that the planner counts. Without a GPU tests/gpu_paths/test_fused_adam.py does the same but for the kernel.

Run by `make test-gpu`. Skipped, with the reason, elsewhere.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_r1.config.packages import has_module
from megatron_r1.recipes.tiny import TINY_V3

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def runs(device, tmp_path_factory) -> dict[str, Path]:
    """Folder of a run with moments in bf16, and of one in fp32: four steps, and the last two after a restart."""
    if device == "cpu":
        pytest.skip("Transformer Engine's Adam is a GPU's")
    if not has_module("transformer_engine"):
        pytest.skip("needs Transformer Engine: make install-gpu")
    made = {adam: tmp_path_factory.mktemp(adam) for adam in ("kernel-bf16", "kernel-half")}
    for adam, folder in made.items():
        (folder / "config.json").write_bytes((TINY_V3 / "config.json").read_bytes())
        train(folder, adam, "one:save", "one:one")
    return made


def train(folder: Path, adam: str, *jobs: str) -> None:
    """One rank of tests/workers/fused_adam.py, which counts the bytes too."""
    paths = [ROOT, ROOT / "tests", ROOT / "tests" / "workers", os.environ.get("PYTHONPATH", "")]
    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "WORKER_DEVICE": "cuda"}
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [sys.executable, ROOT / "tests" / "workers" / "fused_adam.py", folder / "store", folder, adam, *jobs]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]


def apart(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """How far the weights are apart, as a share of how far `one` came since its checkpoint; sums of |.|."""
    names = [name for name in one if " " not in name and not name.endswith("bias")]
    moved = sum(np.abs(one[name] - one[f"middle {name}"]).sum() for name in names)
    return sum(np.abs(one[name] - other[name]).sum() for name in names) / moved


def test_a_restart_goes_on(runs, report):
    """Steps counted from 1 again would be twice as long. Sums on a GPU come in any order, so bits may differ."""
    lines = ["| moments | updates after a restart, off by | beside fp32 moments |", "|---|---|---|"]
    straight = {adam: dict(np.load(folder / "one-save.npz")) for adam, folder in runs.items()}
    for adam, folder in runs.items():
        resumed = dict(np.load(folder / "one-one.npz"))
        for name in straight[adam]:
            if name.startswith("middle "):
                np.testing.assert_array_equal(straight[adam][name], resumed[name], err_msg=name)
        assert json.loads((folder / "saved-one" / "policy.json").read_text())["adam_steps"] == 2.0
        off, beside = apart(straight[adam], resumed), apart(straight["kernel-half"], straight[adam])
        lines.append(f"| {adam.partition('-')[2]} | {off:.2%} | {beside:.2%} |")
        assert off < 0.2
        assert beside < 0.5
    report.add("Moments of Adam in bf16", "\n".join(lines))
