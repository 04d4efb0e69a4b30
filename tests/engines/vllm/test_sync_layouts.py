"""After optimizer steps under each layout: synced vLLM = fresh vLLM on the export = Megatron.

`make test` has other proofs of the parts: a server that was pushed to is a fresh one to the bit (test_reshard.py); at
every step of a run of EP2, pushed through shared memory, server and trainer agree (pipeline/test_run.py); what a layout
exports is what it loaded (policy/test_layouts.py); a push changes what is served, and its version (test_sync.py).
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from oracles import save_model, write_tokenizer
from ranks import run_ranks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # every layout starts an engine
LAYOUTS = ["one", "tp2", "ep2", "pp2"]
"""Pushed one after the other to one server, so the number of the push is the version."""


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict[str, np.ndarray]]:
    """What the layouts found."""
    root = tmp_path_factory.mktemp("sync") / "model"
    save_model("deepseek_v3", root, mtp_layers=1)
    write_tokenizer(root)
    run_ranks("sync.py", str(root), ",".join(LAYOUTS), ranks=2, timeout_seconds=1000)
    exported = [root / f"exported_{name}" for name in LAYOUTS]
    worker = Path(__file__).parents[2] / "workers" / "fresh.py"
    command = [sys.executable, str(worker), str(root / "fixed.npz"), *map(str, exported)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = {name: dict(np.load(root / f"sync_{name}.npz")) for name in LAYOUTS}
    for name, folder in zip(LAYOUTS, exported, strict=True):
        found[name] |= {f"fresh_{i}": array for i, array in enumerate(np.load(folder / "fresh.npz").values())}
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_synced_server_equals_a_fresh_one(results, layout):
    found = results[layout]
    for i in range(6):
        np.testing.assert_allclose(found[f"synced_{i}"], found[f"fresh_{i}"], atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_synced_server_equals_megatron(results, layout):
    found = results[layout]
    for i in range(6):
        np.testing.assert_allclose(found[f"synced_{i}"], found[f"trainer_{i}"], atol=2e-2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_push_changed_what_the_server_says(results, layout):
    """Otherwise the comparisons above would hold for a sync that does nothing."""
    moved = np.abs(results[layout]["synced_0"] - results["one"]["before_0"]).max()
    assert moved > 0.1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_completions_carry_the_pushed_version(results, layout):
    assert results[layout]["version"] == LAYOUTS.index(layout) + 1
