"""Conversion of a reward model's folder: bit for bit there and back, with what says how it judges."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from oracles import make_model
from safetensors.torch import load_file

from megatron_r1.config.shape import load_shape
from megatron_r1.rollout.preference import read_scale
from megatron_r1.weights.convert import ConvertOptions, convert
from megatron_r1.weights.verify import compare

SCALE = {"part": "answer", "template": "chat", "value_mean": 0.25, "value_std": 1.5}


def save_reward_model(name: str, folder: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    base = make_model(name).config
    torch.manual_seed(1)
    fields = base.to_dict() | {"num_labels": 1, "tie_word_embeddings": name == "qwen2"}
    AutoModelForSequenceClassification.from_config(type(base)(**fields)).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {"num_labels": 1, "num_nextn_predict_layers": 0}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "megatron_r1.json").write_text(json.dumps(SCALE))


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen2"])
def test_a_reward_model_comes_back_bit_for_bit(name, tmp_path):
    save_reward_model(name, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "megatron", ConvertOptions(target="torch_dist"))
    convert(tmp_path / "megatron", tmp_path / "back", ConvertOptions(target="hf"))
    before, after = (
        {key: tensor for file in (tmp_path / side).glob("*.safetensors") for key, tensor in load_file(file).items()}
        for side in ("hf", "back")
    )
    assert set(before) == set(after) and "score.weight" in before and "lm_head.weight" not in before
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert load_shape(tmp_path / "back") == load_shape(tmp_path / "hf")
    assert compare(tmp_path / "hf", tmp_path / "megatron").equal
    assert read_scale(tmp_path / "back") == SCALE, "without its scale nothing would serve it"
