"""Models whose config.json asks for parts of ours, split over two ranks: logits and gradients against transformers.

Packed rows too, so that the positions of every segment meet the scaled rope.
"""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import pytest
from config_cases import config_of, make_model
from grpo_oracle import hf_gradients, oracle_values
from oracles import VOCAB, random_sequences
from ranks import Results, run_launches

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
LENGTHS = [64, 40, 52, 20]
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "truncate": False}
MODELS = {
    "groups": (
        "deepseek_v3",
        {
            "num_hidden_layers": 4, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "norm_topk_prob": False,
            "rms_norm_eps": 1e-3, "rope_scaling": YARN | {"mscale_all_dim": 0.7},
        },
        ["tp2ep2", "pp2", "cp2"],
    ),
    "biases": ("llama", {"attention_bias": True, "rope_scaling": YARN}, ["tp2", "cp2"]),
    "dense layers": (
        "qwen3_moe",
        {
            "num_hidden_layers": 4, "mlp_only_layers": [2], "norm_topk_prob": True,
            "rope_scaling": YARN | {"attention_factor": 1.3},
        },
        ["tp2", "ep2", "pp2"],
    ),
}  # fmt: skip
CASES = [(model, layout) for model, (_, _, layouts) in MODELS.items() for layout in layouts]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Of a model: what every layout computed, and as "oracle" the oracle's values; made when first asked for."""

    @cache
    def of(name: str) -> Results:
        architecture, change, layouts = MODELS[name]
        folder = tmp_path_factory.mktemp(architecture)
        config = config_of(architecture, change | {"vocab_size": VOCAB})
        model = make_model(config)
        model.save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(config))
        oracle = oracle_values(model, random_sequences(LENGTHS), folder)
        launches = {2: [str(folder), ",".join(layouts)]}
        failures = run_launches("layouts.py", launches, timeout_seconds=300)
        found = Results(folder, {2: layouts}, failures)
        found["oracle"] = oracle
        return found

    return of


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_logits_equal_transformers(results, model, layout):
    for i, expected in enumerate(results(model)["oracle"]["logits"]):
        np.testing.assert_allclose(results(model)[layout][f"logits_{i}"], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_gradients_equal_transformers_autograd(results, model, layout):
    expected = hf_gradients(results(model)["oracle"]["gradients"])
    found = results(model)[layout]
    computed = {key.split(":")[1]: value for key, value in found.items() if key.startswith("gradient:")}
    assert set(expected) == set(computed) - {key for key in computed if "e_score_correction_bias" in key}
    for name, gradient in expected.items():
        scale = max(np.abs(gradient).max(), 1e-9)  # 0 for an expert without tokens
        np.testing.assert_allclose(computed[name] / scale, gradient / scale, atol=1e-4, err_msg=name)


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_exported_weights_are_the_folders_bit_for_bit(results, model, layout):
    assert results(model)[layout]["export_difference"] == 0.0
