"""Export of a policy where the disk is full: a clear error, nothing half-written, the earlier export untouched."""

from __future__ import annotations

import pytest
from oracles import save_model
from ranks import run_ranks
from safetensors.torch import load_file


@pytest.mark.slow
def test_an_export_that_does_not_fit_leaves_nothing_and_says_why(tmp_path):
    root = tmp_path / "model"
    save_model("qwen3", root)
    run_ranks("export.py", str(root), ranks=1)
    said = (tmp_path / "said.txt").read_text()
    assert str(tmp_path / "second") in said and "make room" in said and "File too large" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "model", "said.txt"]
    (shard,) = (tmp_path / "first").glob("*.safetensors")
    assert load_file(shard).keys() == load_file(next(root.glob("*.safetensors"))).keys()
