"""An architecture is one file: the example of docs/models.md, held to transformers' own weights."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from megatron_r1.config.architectures import ARCHITECTURES, Architecture, architecture_of
from megatron_r1.config.shape import load_shape, shape_from_config
from megatron_r1.errors import ConfigError
from megatron_r1.planning.parameters import count_parameters
from megatron_r1.weights.table import build_table

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
MISTRAL = {
    "model_type": "mistral", "vocab_size": 320, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 3,
    "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 512, "rope_theta": 1e6,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "sliding_window": None, "hidden_act": "silu",
}  # fmt: skip


@pytest.fixture
def mistral(tmp_path, monkeypatch) -> Architecture:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.partition("## Adding one\n")[2], flags=re.S)
    (tmp_path / "mistral.py").write_text(code)
    spec = importlib.util.spec_from_file_location("mistral", tmp_path / "mistral.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(ARCHITECTURES, "mistral", module.ARCHITECTURE)
    return module.ARCHITECTURE


def test_the_documented_file_reads_a_shape_with_the_weights_of_transformers(mistral):
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    shape = shape_from_config(MISTRAL)
    with torch.device("meta"):
        theirs = MistralForCausalLM(MistralConfig(**{k: v for k, v in MISTRAL.items() if k != "model_type"}))
    weights = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    table = build_table(shape)
    assert {n: s for entry in table for n, s in zip(entry.hf, entry.hf_shapes, strict=True)} == weights
    assert count_parameters(shape).total == sum(tensor.numel() for tensor in theirs.parameters())


def test_its_defaults_are_those_of_transformers(mistral):
    from transformers import MistralConfig

    assert {name: getattr(MistralConfig(), name) for name in mistral.defaults} == mistral.defaults


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sliding_window": 4096}, "sliding_window is 4096; only None is supported"),
        ({"head_dim": 15}, "head_dim is 15; it must be even"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu' is supported"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3; it must divide num_attention_heads 8"),
    ],
)
def test_its_limits_and_laws_are_held(mistral, change, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        shape_from_config(MISTRAL | change)


def test_without_it_the_model_type_is_refused():
    with pytest.raises(ConfigError, match="model_type is 'mistral'; supported are deepseek_v2, "):
        shape_from_config(MISTRAL)


def test_names_belong_to_one_architecture():
    names = [name for each in ARCHITECTURES.values() for name in (each.name, *each.other_names)]
    assert len(set(names)) == len(names)
    assert architecture_of("kimi_k2") is ARCHITECTURES["deepseek_v3"]
    assert architecture_of(None) is architecture_of(["llama"]) is None


def test_every_architecture_has_a_classifier_that_transformers_knows():
    import transformers

    assert all(hasattr(transformers, each.classifier) for each in ARCHITECTURES.values())


def test_a_packaged_model_is_read(tmp_path):
    folder = Path(__file__).parents[2] / "megatron_r1" / "recipes" / "tiny_v3"
    assert load_shape(folder).architecture == "deepseek_v3"
