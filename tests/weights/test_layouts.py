"""A converted checkpoint loads under every layout, by our loader and by Megatron's own, bit for bit."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from oracles import save_model
from ranks import run_launches
from safetensors.torch import load_file

from megatron_r1.weights.convert import ConvertOptions, convert
from megatron_r1.weights.verify import compare

RANKS = {
    "one": 1, "tp2": 2, "ep2": 2, "pp2": 2, "vpp2": 2, "cp2": 2, "tp2ep2": 2, "tp2pp2ep2": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Made:
    hf: Path
    saved: Path
    failures: dict[int, str]

    def found(self, layout: str) -> list[dict]:
        """What each rank found under a layout; raises what the ranks said if they did not come so far."""
        file = self.saved / f"{layout}.json"
        if not file.exists():
            raise AssertionError(self.failures[RANKS[layout]])
        return json.loads(file.read_text())


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    root = tmp_path_factory.mktemp("layouts")
    hf, converted, out = root / "hf", root / "converted", root / "out"
    save_model("deepseek_v3", hf, mtp_layers=1)
    convert(hf, converted, ConvertOptions(target="torch_dist"))
    out.mkdir()
    launches = {}
    for ranks in sorted(set(RANKS.values())):
        names = ",".join(name for name, count in RANKS.items() if count == ranks)
        launches[ranks] = [str(hf), str(converted), str(out), names]
    return Made(hf, out, run_launches("torch_dist.py", launches, timeout_seconds=400))


def test_no_rank_fails(made):
    assert not made.failures


@pytest.mark.parametrize("layout", RANKS)
def test_our_loader_gives_what_the_hf_folder_gives(made, layout):
    assert [rank["ours"] for rank in made.found(layout)] == [[]] * RANKS[layout]


@pytest.mark.parametrize("layout", RANKS)
def test_megatrons_loader_gives_what_the_hf_folder_gives(made, layout):
    assert [rank["megatron"] for rank in made.found(layout)] == [[]] * RANKS[layout]


@pytest.mark.parametrize("layout", RANKS)
def test_a_rank_reads_its_share_and_what_is_replicated(made, layout):
    for rank in made.found(layout):
        assert rank["split"] + rank["replicated"] <= rank["bytes_read"] * 1.0001  # all of it was read
        assert rank["bytes_read"] <= (rank["split"] + rank["replicated"]) * 1.05
    if layout == "tp2pp2ep2":
        whole = sum(tensor.numel() * 4 for tensor in load_file(made.hf / "model.safetensors").values())
        assert max(rank["bytes_read"] for rank in made.found(layout)) < 0.55 * whole


@pytest.mark.parametrize("layout", RANKS)
def test_what_megatron_saves_under_a_layout_is_exported_bit_for_bit(made, layout, tmp_path):
    made.found(layout)
    convert(made.saved / layout, tmp_path / "exported", ConvertOptions(target="hf", workers=1))
    result = compare(made.hf, tmp_path / "exported")
    assert result.equal and result.compared > 100, result.differences
