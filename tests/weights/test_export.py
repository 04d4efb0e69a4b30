"""Saving a policy: the same folder from every layout; where the disk is full a clear error and nothing half-written."""

from __future__ import annotations

import json

import pytest
import torch
from oracles import save_model
from ranks import run_ranks
from safetensors.torch import load_file

from megatron_r1.resharding.boxes import Box
from megatron_r1.resharding.plan import Shard
from megatron_r1.weights.save import choose_writers


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


LAYOUTS = ("tp2pp2", "ep4", "ep2tp2etp2", "cp2tp2")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("saved")
    save_model("deepseek_v3", root / "model", mtp_layers=1)
    run_ranks("save.py", str(root), ",".join(LAYOUTS), ranks=4)
    return root


@pytest.mark.parametrize("layout", LAYOUTS)
def test_four_ranks_save_what_they_loaded(saved, layout):
    """All tensors with the bits that they had, MTP layer included, in several files and with an index of them."""
    expected, files = load_file(saved / "model" / "model.safetensors"), sorted((saved / layout).glob("*.safetensors"))
    assert len(files) > 4
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    index = json.loads((saved / layout / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}


def test_an_index_that_cannot_be_written_is_an_error_on_all_ranks(saved):
    for rank in range(4):
        assert "refused: cannot be written: " in (saved / f"refused-{rank}").read_text()
    assert not (saved / "refused").exists() and not (saved / "refused.partial").exists()


@pytest.mark.parametrize("work", ["save", "gather"])
@pytest.mark.parametrize("bad", range(4))
def test_a_rank_that_cannot_read_its_weights_fails_all_at_once(saved, work, bad):
    """None waits for it, and the same ranks go on: these failures follow one another."""
    told = json.loads((saved / "failed.json").read_text())[f"{work} {bad}"]
    own, other = f"ValueError: planted on rank {bad}", f"RuntimeError: ValueError: planted on rank {bad}"
    assert told == [own if rank == bad else other for rank in range(4)]
    assert not (saved / "not_saved").exists() and not (saved / "not_saved.partial").exists()


def test_files_are_written_by_all_ranks_that_hold_them():
    """Three tensors of 100 bytes: ranks 0 and 1 hold the first two, rank 2 the third; none writes two."""
    shards = [Shard(0, Box(0, 50, 0, 1), (0, 1)), Shard(1, Box(0, 50, 0, 1), (0, 1)), Shard(2, Box(0, 50, 0, 1), (2,))]
    assert choose_writers(["a", "b", "c"], [100, 100, 100], shards) == {"a": 0, "b": 1, "c": 2}
