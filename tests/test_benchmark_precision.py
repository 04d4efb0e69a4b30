"""The precision benchmark on CPU: what it cuts, what it refuses, and that it measures training."""

import json
from pathlib import Path

import benchmark_precision as tool
import pytest

from megatron_r1.config import load_shape
from megatron_r1.config.packages import has_module
from megatron_r1.config.schema import FP8Config
from megatron_r1.errors import ConfigError
from megatron_r1.planning.parameters import count_parameters

ROOT = Path(__file__).parent.parent


def test_four_layers_at_671b_width(tmp_path):
    tool.cut(ROOT / "tests" / "planning" / "deepseek_v3.json", tmp_path, layers=4, experts=16, vocabulary=16384)
    shape = load_shape(tmp_path)
    assert (shape.num_layers, shape.hidden_size, shape.moe.num_experts, shape.fp8_block) == (4, 7168, 16, None)
    assert [shape.is_moe_layer(layer) for layer in range(4)] == [False, True, True, True]
    # By hand: an expert is 3 * 7168 * 2048 weights, 16 of them in three layers.
    assert count_parameters(shape).routed == 3 * 16 * 3 * 7168 * 2048


@pytest.mark.skipif(has_module("transformer_engine"), reason="Transformer Engine is installed here")
def test_fp8_without_transformer_engine_is_refused_before_anything_is_built(tmp_path):
    tool.cut(ROOT / "megatron_r1" / "recipes" / "tiny_qwen2" / "config.json", tmp_path)
    with pytest.raises(ConfigError, match="Transformer Engine is not installed"):
        tool.measure(tmp_path, ["bf16", "fp8"], steps=1, tokens=64, recipe=FP8Config(), cpu=True)


@pytest.mark.slow
def test_it_trains_each_precision_from_the_same_start(tmp_path, monkeypatch, capsys):
    config = ROOT / "megatron_r1" / "recipes" / "tiny_qwen2" / "config.json"
    words = ["--config", str(config), "--device", "cpu", "--dtypes", "fp32", "bf16", "--steps", "12", "--tokens", "256"]
    monkeypatch.setattr("sys.argv", ["benchmark_precision", *words, "--json", str(tmp_path / "out.json")])
    assert tool.main() == 0
    rows = json.loads((tmp_path / "out.json").read_text())["dtypes"]
    fp32, bf16 = rows["fp32"]["losses"], rows["bf16"]["losses"]
    assert fp32[0] == pytest.approx(bf16[0], rel=1e-2) and fp32 != bf16
    assert fp32[-1] < fp32[0]
    assert "| bf16 |" in capsys.readouterr().out
