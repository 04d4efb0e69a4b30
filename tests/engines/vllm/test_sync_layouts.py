"""After optimizer steps under each layout: synced vLLM = fresh vLLM on the export = Megatron."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from oracles import save_model, write_tokenizer
from ranks import run_ranks

pytestmark = pytest.mark.timeout(1800)  # every layout starts an engine
GROUPS = {"fast": ["one", "tp2"], "slow": ["one", "ep2", "pp2"]}
"""Pushed one after the other to one server, so the number of the push is the version. make test runs EP2 in
pipeline/test_run.py too."""
CASES = [
    pytest.param(group, layout, id=f"{group}-{layout}", marks=[pytest.mark.slow] if group == "slow" else [])
    for group, layouts in GROUPS.items()
    for layout in layouts
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the layouts of a group found; made when first asked for."""

    @cache
    def of(group: str) -> dict[str, dict[str, np.ndarray]]:
        layouts = GROUPS[group]
        root = tmp_path_factory.mktemp("sync") / "model"
        save_model("deepseek_v3", root, mtp_layers=1)
        write_tokenizer(root)
        run_ranks("sync.py", str(root), ",".join(layouts), ranks=2, timeout_seconds=1000)
        exported = [root / f"exported_{name}" for name in layouts]
        worker = Path(__file__).parents[2] / "workers" / "fresh.py"
        command = [sys.executable, str(worker), str(root / "fixed.npz"), *map(str, exported)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        found = {name: dict(np.load(root / f"sync_{name}.npz")) for name in layouts}
        for name, folder in zip(layouts, exported, strict=True):
            found[name] |= {f"fresh_{i}": array for i, array in enumerate(np.load(folder / "fresh.npz").values())}
        return found

    return of


@pytest.mark.parametrize(("group", "layout"), CASES)
def test_synced_server_equals_a_fresh_one(results, group, layout):
    found = results(group)[layout]
    for i in range(6):
        np.testing.assert_allclose(found[f"synced_{i}"], found[f"fresh_{i}"], atol=1e-4)


@pytest.mark.parametrize(("group", "layout"), CASES)
def test_synced_server_equals_megatron(results, group, layout):
    found = results(group)[layout]
    for i in range(6):
        np.testing.assert_allclose(found[f"synced_{i}"], found[f"trainer_{i}"], atol=2e-2)


@pytest.mark.parametrize(("group", "layout"), CASES)
def test_the_push_changed_what_the_server_says(results, group, layout):
    """Otherwise the comparisons above would hold for a sync that does nothing."""
    found = results(group)
    moved = np.abs(found[layout]["synced_0"] - found["one"]["before_0"]).max()
    assert moved > 0.1


@pytest.mark.parametrize(("group", "layout"), CASES)
def test_completions_carry_the_pushed_version(results, group, layout):
    assert results(group)[layout]["version"] == GROUPS[group].index(layout) + 1
