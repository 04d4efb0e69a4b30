"""The rows of Megatron's tensors: placement.py (whole tensors) and transforms.py (shards) say the same."""

import pytest
import torch
from oracles import save_model

from megatron_r1.config.shape import load_shape
from megatron_r1.weights.placement import place
from megatron_r1.weights.table import build_table, checkpoint_key
from megatron_r1.weights.transforms import shard


@pytest.mark.parametrize("name", ["deepseek_v3", "llama", "qwen2", "qwen3", "qwen3_moe"])
def test_segments_cover_the_shard_in_its_order(name, tmp_path):
    save_model(name, tmp_path)
    shape = load_shape(tmp_path)
    for entry in build_table(shape):
        parts = [torch.randn(full) for full in entry.hf_shapes]
        whole = shard(entry, shape, lambda hf, *_, e=entry, p=parts: p[e.hf.index(hf)], 0, 1)
        placement = place(entry, shape)
        assert placement.shape == tuple(whole.shape)
        next_row = 0
        for segment in placement.segments:
            assert segment.row == next_row and segment.row % placement.unit < placement.unit
            expected = parts[segment.part][segment.hf_row : segment.hf_row + segment.rows]
            assert torch.equal(whole[segment.row : segment.row + segment.rows], expected)
            next_row += segment.rows
        assert next_row == len(whole)


def test_keys_are_transformer_engines(tmp_path):
    save_model("deepseek_v3", tmp_path, mtp_layers=1)
    shape = load_shape(tmp_path)
    keys = {entry.name: checkpoint_key(entry, shape) for entry in build_table(shape)}
    assert keys["decoder.layers.0.pre_mlp_layernorm.weight"] == (
        "decoder.layers.0.mlp.linear_fc1.layer_norm_weight",
        None,
    )
    assert keys["decoder.layers.1.pre_mlp_layernorm.weight"] == ("decoder.layers.1.pre_mlp_layernorm.weight", None)
    assert keys["decoder.layers.1.mlp.experts.7.linear_fc2.weight"] == (
        "decoder.layers.1.mlp.experts.experts.linear_fc2.weight", 7,
    )  # fmt: skip
    assert keys["decoder.layers.2.self_attention.kv_layernorm.weight"] == (
        "decoder.layers.2.self_attention.linear_kv_up_proj.layer_norm_weight", None,
    )  # fmt: skip
    assert keys["mtp.layers.0.transformer_layer.pre_mlp_layernorm.weight"][0].endswith(".pre_mlp_layernorm.weight")
    assert len(set(keys.values())) == len(keys)
